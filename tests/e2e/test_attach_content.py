# SPDX-License-Identifier: BSD-3-Clause
"""
Which blocks `attach` gives a served volume, by what it reads through the volume.

The kernel's device itself is tried in the virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable

import pytest
import support
from e2e.lib.harness import Site, free_port

from nbd_mirror.base.errors import ConfigError, MirrorIOError
from nbd_mirror.device import attach, attached, handshake
from nbd_mirror.device.handshake import HELLO, Connection
from nbd_mirror.volume import config

SIZE = 320 << 20  # mkfs.xfs makes none below 300 MB


@pytest.mark.parametrize("address", ["unix", "tcp"])
def test_connection_reads_the_volume_to_its_end(
    new_site: Callable[..., Site], address: str, door: str
) -> None:
    """The handshake has the size; a read may begin and end anywhere."""
    keys = {} if address == "unix" else {"listen": f"tcp:127.0.0.1:{free_port()}"}
    site = new_site(size=(1 << 20) + 512, **keys)
    content = os.urandom(site.size)
    site.local.write_bytes(content)
    site.create()
    site.serve(door)
    volume = config.load(site.config)
    support.wait_until(site.answers, "the server")
    with Connection(volume) as connection:
        assert connection.size == site.size
        for offset, length in ((0, 4096), (1, 1), (510, 5000), (1 << 20, 512)):
            assert connection.read(offset, length) == content[offset:][:length]
        assert connection.read(1 << 20, 4096) == content[1 << 20 :]
        assert connection.read(site.size, 10) == b""


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n\r\n"])
def test_connection_to_another_server_is_one_clear_line(
    site: Site, answer: bytes
) -> None:
    """What is no NBD server is said to be none."""
    volume = config.load(site.config)
    words = [
        "socat",
        f"UNIX-LISTEN:{site.socket}",
        f"SYSTEM:printf '{answer.decode()}'",
    ]
    support.requires_program("socat")
    site.processes.start(words)
    support.wait_listening(site.socket, "socat")
    with pytest.raises(MirrorIOError, match=r"the server at \S+ (is no|ended)"):
        Connection(volume)


def hostile(listener: socket.socket, reply: bytes, stop: threading.Event) -> None:
    """Answer a client's option with *reply* again and again."""
    link = listener.accept()[0]
    with link, contextlib.suppress(OSError):
        link.sendall(HELLO + struct.pack(">H", 3))
        link.recv(4096)
        while not stop.wait(0.01):
            link.sendall(reply)


@pytest.mark.parametrize(
    ("info", "length", "said"),
    [
        (b"", 0, "is no NBD server"),
        (b"\0\0\0\0", 4, "is no NBD server"),
        (b"\0\3\0", 3, "is no NBD server"),
        (b"\0\2name", 6, "does not end its handshake"),
        (b"\0\2name", handshake.LONGEST, "does not end its handshake"),
    ],
)
def test_connection_to_a_hostile_server_is_one_clear_line_and_ends(
    site: Site, monkeypatch: pytest.MonkeyPatch, info: bytes, length: int, said: str
) -> None:
    """
    A program at the address may send short information, or information for ever.

    Or information that comes in small pieces, each of them in time.
    """
    monkeypatch.setattr(handshake, "TIMEOUT_S", 1.0)
    head = struct.pack(
        ">QIII",
        *(handshake.REPLY_MAGIC, handshake.OPT_GO, handshake.REP_INFO, length),
    )
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(site.socket))
        listener.listen()
        server = threading.Thread(target=hostile, args=(listener, head + info, stop))
        server.start()
        # Else a connection that does not end would not end the test either.
        end = threading.Timer(10, stop.set)
        end.start()
        try:
            with pytest.raises(MirrorIOError, match=said):
                Connection(config.load(site.config))
        finally:
            end.cancel()
            stop.set()
            server.join()


def test_block_size_is_that_of_the_content_or_what_is_asked_for(
    new_site: Callable[..., Site],
) -> None:
    """An adopted XFS of 512-byte sectors gets them; an operator's word outlives it."""
    support.requires_program("mkfs.xfs")
    site = new_site(size=SIZE)
    path = f"{os.environ['PATH']}:/usr/sbin"
    subprocess.run(
        ["mkfs.xfs", "-q", "-s", "size=512", str(site.local)],
        check=True,
        env={**os.environ, "PATH": path},
    )
    site.create()
    site.serve()
    volume = config.load(site.config)

    def chosen(asked: str = "") -> tuple[int, bool, str]:
        choice, by_operator = attach._choose(volume, SIZE, asked)
        # As attach() does it, and detach() after it.
        attached.save(volume.state_dir, attached.Attached(choice.block, by_operator))
        return choice.block, by_operator, choice.warning

    assert chosen() == (512, False, "")
    block, by_operator, warning = chosen("4096")
    assert (block, by_operator) == (4096, True)
    assert "XFS of 512-byte sectors" in warning
    assert chosen()[:2] == (4096, True), "the next attach, by a unit, has it too"
    assert chosen("auto") == (512, False, "")
    assert chosen() == (512, False, "")


def test_block_size_that_would_cut_the_end_is_refused(
    new_site: Callable[..., Site],
) -> None:
    """One line says what would be lost."""
    site = new_site(size=(1 << 20) + 512)
    site.create()
    site.serve()
    volume = config.load(site.config)
    with pytest.raises(ConfigError, match="would cut off the volume's last 512 bytes"):
        attach._choose(volume, site.size, "4096")
    assert attach._choose(volume, site.size, "")[0].block == 512


@pytest.mark.parametrize("word", ["8192", "4k"])
def test_block_size_that_the_kernel_does_not_take_is_one_line(
    site: Site, word: str
) -> None:
    """Said before anything else is looked at."""
    done = site.cli("attach", str(site.config), f"--block-size={word}", check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "Error" in line]
    assert f"{word}: it must be 512, 1024, 2048, 4096, or auto" in line
