# SPDX-License-Identifier: BSD-3-Clause
"""
Attach a volume to the kernel's own nbd driver, as /dev/nbdN, and detach it.

The device's time-out is finite and longer than anything the server may make a
request wait for (the hold, eight of the longest deadlines, and 30 s more): a
lost remote never makes the kernel give up, a lost server never hangs a mount
for ever.  `-persist` is not used: nbd-client would then connect again to
whatever listens on the address by that time.

One connection, unless more are asked for. With more the kernel sends a request that
timed out again, on another; a server that was frozen may carry out the first sending
after that, and over a newer write.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from pathlib import Path

from .config import VolumeConfig
from .errors import (
    AccessError,
    BusyError,
    MirrorError,
    MirrorIOError,
    MissingError,
    NotRunningError,
    UnsupportedError,
)
from .programs import find_program, run

__all__ = [
    "attach",
    "attached_device",
    "block_size",
    "check_kernel",
    "detach",
    "fails_after_s",
    "timeout_s",
]

SYS_BLOCK = Path("/sys/block")
MOUNTINFO = Path("/proc/self/mountinfo")
SWAPS = Path("/proc/swaps")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

BLOCK_SIZES = (4096, 2048, 1024, 512)  # what nbd-client allows, best first
# The engine's bound on a command that starves while others are answered, see
# csrc/conn.c.
STARVED_DEADLINES = 8
MAX_SECTORS_KB = 1024  # longest request the kernel sends, KiB
_DEVICE = re.compile(r"(?:/dev/)?(nbd[0-9]{1,4})", re.ASCII)


def timeout_s(config: VolumeConfig) -> int:
    """Return the device's time-out for one request, in seconds."""
    deadline = max(remote.deadline for remote in config.remotes)
    return 30 + math.ceil(config.hold + STARVED_DEADLINES * deadline)


def block_size(size: int) -> int:
    """
    Return the device's block size for a volume of *size* bytes.

    4096, unless that would cut off the volume's end: the kernel rounds down.
    """
    return next((block for block in BLOCK_SIZES if size % block == 0), 512)


def fails_after_s(config: VolumeConfig, connections: int) -> int:
    """
    Return the most a request may take before the kernel fails it, in seconds.

    A request that times out on one connection is sent again on the next (Linux,
    nbd_xmit_timeout in drivers/block/nbd.c), and waits as long there.
    """
    return connections * timeout_s(config)


def attach(
    config: VolumeConfig, size: int, device: str = "", *, connections: int = 1
) -> str:
    """
    Attach the volume, and note the device in the state directory.

    Args:
        config: of a volume that is served.
        size: of the volume, in bytes.
        device: such as /dev/nbd0; empty: the first free one.
        connections: from the kernel to the server.
    Returns:
        The device, as /dev/nbdN.
    Raises:
        UnsupportedError: the kernel has no nbd, or nbd-client is missing.
        BusyError: the device is in use, none is free, or the volume is attached.
        MissingError: no such device. MirrorIOError: nbd-client failed.
    """
    check_kernel(config)
    client = find_program("nbd-client", "nbd-client")
    already = attached_device(config)
    if already:
        raise BusyError(
            f"volume {config.name} is attached already, as {already}",
            "nbd-mirror detach CONFIG",
        )
    name = _check_free(device) if device else _first_free()
    rc, said = run(client, *_arguments(config, name, size, connections))
    if rc:
        raise MirrorIOError(f"nbd-client could not attach /dev/{name}: {said}")
    _set_limits(name)
    _note(config, name)
    return f"/dev/{name}"


def _arguments(
    config: VolumeConfig, name: str, size: int, connections: int
) -> list[str]:
    if config.listen.path is not None:
        server = ["-unix", config.listen.path]
    else:
        server = [config.listen.client_host, str(config.listen.port)]
    options = ["-b", str(block_size(size)), "-t", str(timeout_s(config))]
    return [*server, f"/dev/{name}", *options, "-C", str(connections)]


def _set_limits(name: str) -> None:
    queue = SYS_BLOCK / name / "queue"
    with contextlib.suppress(OSError, ValueError):
        most = int((queue / "max_hw_sectors_kb").read_text())
        (queue / "max_sectors_kb").write_text(str(min(MAX_SECTORS_KB, most)))


# --- devices -------------------------------------------------------------


def check_kernel(config: VolumeConfig) -> None:
    """
    Load the kernel's nbd driver if it is not there.

    Raises:
        UnsupportedError: the kernel has none; the hint shows the other ways.
        AccessError: not root.
    """
    if os.geteuid() != 0:
        raise AccessError(
            "only root may attach a device", "sudo nbd-mirror attach CONFIG"
        )
    if (SYS_BLOCK / "nbd0").exists():
        return
    said = "modprobe is not installed"
    with contextlib.suppress(UnsupportedError):
        _, said = run(find_program("modprobe", "kmod"), "nbd")
    if not (SYS_BLOCK / "nbd0").exists():
        raise UnsupportedError(
            f"this kernel has no nbd driver ({said or 'modprobe nbd made no device'}); "
            "the volume can be used without it",
            other_ways(config),
        )


def other_ways(config: VolumeConfig) -> str:
    """Return the commands that use a volume without the kernel's nbd."""
    uri, folder = config.listen.uri, f"/run/nbd-mirror/{config.name}.fuse"
    if config.listen.path is not None:
        server = f"server.type=unix,server.path={config.listen.path}"
    else:
        server = (
            f"server.type=inet,server.host={config.listen.client_host},"
            f"server.port={config.listen.port}"
        )
    node = re.sub(r"[^A-Za-z0-9-]", "-", config.name)[:31]
    return "\n".join(
        [
            "with FUSE and a loop device (packages libnbd-bin, fuse3):",
            f"  mkdir -p {folder}",
            f"  nbdfuse {folder} '{uri}' &",
            f"  until [ -e {folder}/nbd ]; do sleep 0.1; done",
            f"  mount -o loop {folder}/nbd /mnt    # undo: umount /mnt {folder}",
            "or give it to QEMU as a disk:",
            f"  -drive 'file={uri},format=raw,if=virtio,cache=none'",
            f"  -blockdev driver=nbd,node-name={node},{server} "
            f"-device virtio-blk-pci,drive={node}",
        ]
    )


def _size_of(name: str) -> int:
    """Return sectors; 0 is a device without a connection."""
    try:
        return int((SYS_BLOCK / name / "size").read_text())
    except (OSError, ValueError):
        return 0


def _is_free(name: str) -> bool:
    return _size_of(name) == 0 and not (SYS_BLOCK / name / "pid").exists()


def _first_free() -> str:
    names = [
        path.name for path in SYS_BLOCK.glob("nbd*") if _DEVICE.fullmatch(path.name)
    ]
    for name in sorted(names, key=lambda name: int(name[3:])):
        if _is_free(name):
            return name
    raise BusyError(
        f"all {len(names)} nbd devices are in use",
        "detach one, or load the driver with more: modprobe nbd nbds_max=64",
    )


def _check_free(device: str) -> str:
    name = _name_of(device)
    if not (SYS_BLOCK / name).exists():
        raise MissingError(f"there is no device /dev/{name}")
    if not _is_free(name):
        raise BusyError(
            f"/dev/{name} is in use", "nbd-mirror attach CONFIG (picks one)"
        )
    return name


def _name_of(device: str) -> str:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise MissingError(f"{device} is no nbd device; they are called /dev/nbdN")
    return match[1]


# --- which device a volume has -------------------------------------------


def _identity(name: str) -> dict[str, str]:
    """Return what tells this connection of the device from any later one."""
    return {
        "device": name,
        "boot_id": BOOT_ID.read_text().strip(),
        "pid": (SYS_BLOCK / name / "pid").read_text().strip(),
    }


def _note(config: VolumeConfig, name: str) -> None:
    path = config.state_dir / "attached"
    try:
        path.write_text(json.dumps(_identity(name)) + "\n")
    except OSError as error:
        raise MirrorIOError(
            f"/dev/{name} is attached, but {path} cannot be written: {error.strerror}",
            f"nbd-mirror detach /dev/{name}",
        ) from None


def attached_device(config: VolumeConfig) -> str:
    """Return the device the volume is attached to, as /dev/nbdN, or ""."""
    try:
        noted = json.loads((config.state_dir / "attached").read_text())
        name = _name_of(str(noted["device"]))
        # After a reboot, or a detach by hand, the device may be another's.
        return f"/dev/{name}" if noted == _identity(name) else ""
    except (OSError, ValueError, KeyError, TypeError, MirrorError):
        return ""


# --- detach --------------------------------------------------------------


def detach(config: VolumeConfig | None, device: str = "") -> str:
    """
    Detach a volume, or a device by its name.

    Args:
        config: of the volume; or None, and *device* says which.
        device: such as /dev/nbd0.
    Returns:
        The device, as /dev/nbdN.
    Raises:
        BusyError: it is mounted or in other use. NotRunningError: nothing is
        attached. MirrorIOError: nbd-client failed.
    """
    device = attached_device(config) if config is not None else device
    if not device:
        assert config is not None
        raise NotRunningError(f"volume {config.name} is attached to no device")
    name = _name_of(device)
    if not (SYS_BLOCK / name).exists():
        raise MissingError(f"there is no device /dev/{name}")
    if _is_free(name):
        raise NotRunningError(f"/dev/{name} is not attached")
    user = user_of(name)
    if user:
        raise BusyError(f"/dev/{name} is in use: {user}", "umount or release it first")
    rc, said = run(find_program("nbd-client", "nbd-client"), "-d", f"/dev/{name}")
    if rc:
        raise MirrorIOError(f"nbd-client could not detach /dev/{name}: {said}")
    if config is not None:
        (config.state_dir / "attached").unlink(missing_ok=True)
    return f"/dev/{name}"


def user_of(name: str) -> str:
    """Say who uses the device or a partition of it: a mount, swap, md, LVM; or ""."""
    block = SYS_BLOCK / name
    parts = [block, *(path.parent for path in block.glob(f"{name}p*/dev"))]
    numbers = {(path / "dev").read_text().strip() for path in parts}
    for line in MOUNTINFO.read_text().splitlines():
        fields = line.split()
        if fields[2] in numbers:
            where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
            return f"it is mounted on {where}"
    for line in SWAPS.read_text().splitlines()[1:]:
        with contextlib.suppress(OSError):
            status = Path(line.split()[0]).stat()
            number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            if stat.S_ISBLK(status.st_mode) and number in numbers:
                return "it is used as swap"
    for part in parts:
        for holder in sorted((part / "holders").glob("*")):
            return f"{holder.name} is built on it"
    return ""
