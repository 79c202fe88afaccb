# SPDX-License-Identifier: BSD-3-Clause
"""
Attach a volume to the kernel's own nbd driver, as /dev/nbdN, and detach it.

The device's block size is the one that the content needs (content.py), or the one that
the operator asks for, which is remembered.

The device's time-out is finite, and longer than the longest time that the server may
keep a request (the hold, eight of the longest deadlines, and 30 s more). So a lost
remote never makes the kernel give up, and a lost server never hangs a mount forever.

A server that was started again takes its device back: it gives the kernel a new
connection, for which the requests wait, and the kernel sends unanswered requests again.
The old server is dead by then, so nothing is executed twice. nbd-client's `-persist` is
not used: it would connect again to any server that listens on the address by then, and
the kernel fails the requests under way.

The device has one connection unless the operator asks for more. With more, the kernel
sends a request that timed out again, on another connection. A server that was frozen
may execute the first request after the second, over a newer write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import time

from ..base.errors import (
    BusyError,
    ConfigError,
    MirrorError,
    MirrorIOError,
    MissingError,
    NotRunningError,
    UnsupportedError,
)
from ..base.interrupts import put_off
from ..base.programs import Ended, find_program, run
from ..rules.content import Choice, Need, choose, need_of
from ..volume.client import serving_pid
from ..volume.config import STARVED_DEADLINES, VolumeConfig
from . import attached, devices, netlink
from .attached import Attached
from .handshake import Connection
from .kernel import again, check_kernel, check_root

__all__ = [
    "attach",
    "attached_device",
    "block_size",
    "check_kernel",
    "check_root",
    "detach",
    "fails_after_s",
    "let_go",
    "take_back",
    "timeout_s",
]

# The time that requests wait for a restarted server, seconds.
RECONNECT_S = 120
# The time-out of requests that a stopping server may leave unanswered, seconds: the
# kernel sends them again only after it.
LEFT_S = 2
TAKE_BACK_S = 10.0  # for the kernel to notice that the old connection is lost


def timeout_s(config: VolumeConfig) -> int:
    """Return the device's time-out for one request, in seconds."""
    deadline = max(copy.deadline for copy in config.copies)
    return 30 + math.ceil(config.hold + STARVED_DEADLINES * deadline)


def block_size(size: int, need: Need | None = None) -> int:
    """
    Return the device's block size for a volume of *size* bytes.

    4096, unless the content needs another, or unless that would cut off the volume's
    end, because the kernel rounds down.
    """
    return choose(size, 1, need).block


def fails_after_s(config: VolumeConfig, connections: int) -> int:
    """
    Return the longest time of a request before the kernel fails it, in seconds.

    A request that times out on one connection is sent again on the next (Linux,
    nbd_xmit_timeout in drivers/block/nbd.c), and waits as long there. After the last
    connection it waits for a new one.
    """
    return connections * timeout_s(config) + RECONNECT_S


def attach(
    config: VolumeConfig,
    size: int,
    device: str = "",
    *,
    connections: int = 1,
    asked: str = "",
) -> tuple[str, Choice]:
    """
    Attach the volume, and note the device in the state directory.

    A volume that is attached already stays attached; if its server was restarted since,
    the device gets a new connection.

    Args:
        config: of a volume that is served.
        size: of the volume, in bytes.
        device: such as /dev/nbd0; empty: the first free one.
        connections: from the kernel to the server.
        asked: block size in bytes; "auto": forget one that was asked for earlier.
    Returns:
        The device, as /dev/nbdN, and its block size.
    Raises:
        UnsupportedError: the kernel has no nbd, nbd-client is missing, or the server
        needs TLS.
        BusyError: the device is in use, none is free, or the volume is attached
        in another way.
        MissingError: no such device. ConfigError: *asked* cannot be used.
        MirrorIOError: nbd-client failed.
    """
    _check_plain(config)
    check_kernel(config, device)
    client = find_program("nbd-client", "nbd-client")
    already = attached_device(config)
    if already and not asked and device in ("", already):
        take_back(config)
        return already, Choice(attached.load(config.state_dir).block_size, "as before")
    if already:
        raise BusyError(
            f"volume {config.name} is attached already, as {already}",
            "nbd-mirror detach CONFIG",
        )
    choice, by_operator = _choose(config, size, asked, device)
    name = devices.check_free(device) if device else devices.first_free()
    # Not torn apart: a device that is not noted looks like none, and the next attach
    # takes a second one for the same disk.
    with put_off():
        arguments = _arguments(config, name, choice.block, connections)
        done = run(client, *arguments, apart=True)
        if done.status:
            raise _failed(config, name, choice.block, client, done)
        devices.set_limits(name)
        _note(config, name, choice.block, asked=by_operator, connections=connections)
    _await_servers(name)
    return f"/dev/{name}", choice


def _failed(
    config: VolumeConfig, name: str, block: int, client: str, done: Ended
) -> MirrorIOError:
    """Return the error for nbd-client's failure; the kernel may have the device."""
    words = f"nbd-client could not attach /dev/{name}: {done.said}"
    if devices.is_free(name):
        return MirrorIOError(words)
    if devices.pid_of(name) != str(done.pid):
        # Another command attached it first, or the kernel's numbers differ from ours.
        return MirrorIOError(
            f"{words}; it is attached now, perhaps by another program",
            f"nbd-mirror detach /dev/{name}, if no other program has attached it",
        )
    if run(client, "-d", f"/dev/{name}").status == 0:
        return MirrorIOError(words)
    _note(config, name, block)  # or the next attach would take a second device
    return MirrorIOError(
        f"{words}; it is attached all the same", "nbd-mirror detach CONFIG"
    )


def _check_plain(config: VolumeConfig) -> None:
    if config.listen.tls:
        raise UnsupportedError(
            f'listen = "{config.listen}": the kernel\'s client has no TLS',
            'listen = "unix:/absolute/path", for a device on this host',
        )


def _choose(
    config: VolumeConfig, size: int, asked: str, device: str = ""
) -> tuple[Choice, bool]:
    """Return the block size, and whether an operator asked for it."""
    before = attached.load(config.state_dir)
    wanted = int(asked) if asked not in ("", "auto") else None
    if not asked and before.asked:
        wanted = before.block_size
    need, smallest = None, 1
    try:
        with Connection(config) as connection:
            smallest = connection.smallest
            need = need_of(connection.read, size)
    except MirrorIOError as error:
        if wanted is None:
            raise MirrorIOError(
                f"{error.message}; the block size cannot be read from the content",
                again(device, "--block-size 512"),
            ) from None
    try:
        choice = choose(
            size, smallest, need, asked=wanted, before=before.block_size or None
        )
    except ValueError as error:
        hint = again(device, "--block-size auto") if wanted else ""
        raise ConfigError(f"volume {config.name}: {error}", hint) from None
    return choice, wanted is not None


def _arguments(
    config: VolumeConfig, name: str, block: int, connections: int
) -> list[str]:
    if config.listen.path is not None:
        server = ["-unix", config.listen.path]
    else:
        server = [config.listen.client_host, str(config.listen.port)]
    options = ["-b", str(block), "-t", str(timeout_s(config))]
    return [*server, f"/dev/{name}", *options, "-C", str(connections)]


def _index(device: str) -> int:
    return int(devices.name_of(device).removeprefix("nbd"))


def _await_servers(name: str) -> None:
    """Let requests wait for a restarted server, and show partitions."""
    # Without netlink in the kernel or nbd-client, a lost server stays an error.
    with contextlib.suppress(OSError):
        netlink.wait_for_new_socket(_index(name), RECONNECT_S)
    # The kernel reads the partition table at the first open.
    with contextlib.suppress(OSError):
        os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))


def let_go(config: VolumeConfig) -> None:
    """
    Prepare the volume's device for the end of its server.

    Requests that the kernel sends while the connection ends are lost. It sends them
    again to the next server once their time-out is over. The old server has ended by
    then, so the time-out may be short.
    """
    device = attached_device(config)
    if device:
        with contextlib.suppress(OSError):
            netlink.set_timeout(_index(device), LEFT_S)


def take_back(config: VolumeConfig) -> bool:
    """
    Give the volume's device a connection to the server, if that was restarted.

    Returns:
        False: there is no such device, or it has this very server. A running server
        could still execute the requests that the kernel would send again.
    Raises:
        MirrorError: the device cannot be given a connection.
    """
    if not attached_device(config):
        return False
    noted = attached.load(config.state_dir)
    server = attached.process_identity(serving_pid(config) or 0)
    if server in ("", noted.server):
        return False
    for _ in range(noted.connections):
        if not _give(config, noted.device, server):
            return False
    with contextlib.suppress(OSError):
        netlink.set_timeout(_index(noted.device), timeout_s(config))
    attached.save(config.state_dir, dataclasses.replace(noted, server=server))
    return True


def _give(config: VolumeConfig, name: str, server: str) -> bool:
    """Give a device a connection; False if another process did that for *server*."""
    with Connection(config) as connection:
        if connection.size >> 9 != devices.size_of(name):
            raise MirrorIOError(f"/dev/{name} is of another size than the volume")
        connection.socket.settimeout(None)
        until = time.monotonic() + TAKE_BACK_S
        while attached.load(config.state_dir).server != server:
            try:
                netlink.give_socket(_index(name), connection.socket)
                return True
            except OSError as error:
                # The kernel has not noticed yet that the old one is lost.
                if error.errno != errno.ENOSPC or time.monotonic() > until:
                    raise MirrorIOError(
                        f"/dev/{name} takes no new connection: {error.strerror}"
                    ) from None
            time.sleep(0.05)
    return False


# --- devices -------------------------------------------------------------


def _note(
    config: VolumeConfig,
    name: str,
    block: int = 0,
    *,
    asked: bool = False,
    connections: int = 1,
) -> None:
    server = attached.process_identity(serving_pid(config) or 0)
    what = Attached(
        *(
            block,
            asked,
            name,
            attached.boot_id(),
            devices.pid_of(name),
            server,
            connections,
        )
    )
    try:
        attached.save(config.state_dir, what)
    except MirrorIOError as error:
        raise MirrorIOError(
            f"/dev/{name} is attached, but {error.message}",
            f"nbd-mirror detach /dev/{name}",
        ) from None


def attached_device(config: VolumeConfig) -> str:
    """Return the device that the volume is attached to, as /dev/nbdN, or ""."""
    noted = attached.load(config.state_dir)
    try:
        name = devices.name_of(noted.device)
        # After a reboot or a manual detach the device may belong to another volume.
        pid = devices.pid_of(name)
        same = pid != "" and (noted.boot_id, noted.pid) == (attached.boot_id(), pid)
    except (OSError, MirrorError):
        return ""
    return f"/dev/{name}" if same else ""


# --- detach --------------------------------------------------------------


def detach(config: VolumeConfig | None, device: str = "") -> str:
    """
    Detach a volume, or a device by its name.

    Args:
        config: of the volume; or None, if *device* names the device.
        device: such as /dev/nbd0.
    Returns:
        The device, as /dev/nbdN.
    Raises:
        BusyError: it is mounted or otherwise in use. NotRunningError: nothing is
        attached. MirrorIOError: nbd-client failed.
    """
    device = attached_device(config) if config is not None else device
    if not device:
        assert config is not None
        raise NotRunningError(f"volume {config.name} is attached to no device")
    name = devices.name_of(device)
    if not (devices.SYS_BLOCK / name).exists():
        raise MissingError(f"there is no device /dev/{name}")
    if devices.is_free(name):
        raise NotRunningError(f"/dev/{name} is not attached")
    user = devices.user_of(name)
    if user:
        raise BusyError(f"/dev/{name} is in use: {user}", "umount or release it first")
    done = run(find_program("nbd-client", "nbd-client"), "-d", f"/dev/{name}")
    if done.status:
        raise MirrorIOError(f"nbd-client could not detach /dev/{name}: {done.said}")
    if config is not None:
        noted = attached.load(config.state_dir)
        attached.save(config.state_dir, noted.detached())
    return f"/dev/{name}"
