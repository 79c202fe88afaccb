# SPDX-License-Identifier: BSD-3-Clause
"""A volume's own address is known in whatever spelling, and no other is its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nbd_mirror.base.listen import parse_listen
from nbd_mirror.volume.loops import own_address


@pytest.mark.parametrize(
    ("listen", "uri", "own"),
    [
        ("tcp:127.0.0.1:10809", "nbd://127.0.0.1/x", True),
        ("tcp:127.0.0.1:10809", "nbd://localhost:10809", True),
        ("tcp:127.0.0.1:10809", "nbd://0.0.0.0:10809/", True),
        ("tcp:127.0.0.1:10809", "nbd://[::ffff:127.0.0.1]/", True),
        ("tcp:localhost:10810", "nbds://127.0.0.1:10810/", True),
        ("tcp:0.0.0.0:10809", "nbd://127.0.0.2/", True),
        ("tcp:[::]:10809", "nbd://127.0.0.1/", True),
        ("tcp:[::1]:10809", "nbd://[::]/", True),
        ("tcp:127.0.0.1:10809", "nbd://127.0.0.1:10810/", False),
        ("tcp:127.0.0.1:10809", "nbd://127.0.0.2/", False),
        ("tcp:0.0.0.0:10809", "nbd://192.0.2.1/", False),
        ("tcp:0.0.0.0:10809", "nbd://no.such.host.invalid/", False),
        ("tcp:127.0.0.1:10809", "nbd+unix:///?socket=/run/v.sock", False),
        ("unix:/run/v.sock", "nbd+unix:///x?socket=/run/../run/v.sock", True),
        ("unix:/run/v.sock", "nbd+unix:///?socket=/run/w.sock", False),
        ("unix:/run/v.sock", "nbd://127.0.0.1/", False),
    ],
)
def test_own_address(listen: str, uri: str, *, own: bool) -> None:
    """Names, wildcards and mapped addresses lead to the same listener."""
    assert own == bool(own_address(uri, parse_listen(listen)))


def test_own_address_by_the_hosts_own_name() -> None:
    """A name of this host is an address of it, where it has one."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        found = "127.0.0.1"
    assert own_address(f"nbd://{found}/", parse_listen("tcp:0.0.0.0:10809"))


def test_own_address_over_links(tmp_path: Path) -> None:
    """A link to the socket, to its folder, or a second name of it is the socket."""
    path = tmp_path / "v.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").symlink_to(tmp_path)
    os.link(path, tmp_path / "second")
    listen = parse_listen(f"unix:{path}")
    for name in ("link", "folder/v.sock", "second"):
        assert own_address(f"nbd+unix:///?socket={tmp_path}/{name}", listen), name
