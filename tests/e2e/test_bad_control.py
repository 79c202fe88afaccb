# SPDX-License-Identifier: BSD-3-Clause
"""Wrong requests to a running server: each gets an error, and nothing changes."""

from __future__ import annotations

import json
import socket
from typing import Any

from e2e.lib.harness import Site

LINES = (
    b"\xff\xfe\0",
    b"[" * 60000,
    b'{"command": "pause", "remote": ["dr"]}',
    b'{"command": "resume", "remote": {"dr": 1}}',
    b'{"command": "invalidate", "remote": 1e999}',
    b'{"command": "invalidate", "remote": true}',
    b'{"command": "invalidate"}',
    b'{"command": "pause", "remote": "\\ud800"}',
    b'{"command": "\\n\\u0000"}',
)


def ask(site: Site, line: bytes) -> dict[str, Any]:
    """Send a line and return the answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(site.state / "control"))
        sock.sendall(line + b"\n")
        answer: dict[str, Any] = json.loads(sock.makefile("rb").readline())
        return answer


def test_control_garbage_is_refused_and_changes_nothing(site: Site, door: str) -> None:
    """A running server answers a wrong request with an error, never as a bug."""
    site.bring_up(door)
    for line in LINES:
        answer = ask(site, line)
        assert answer["ok"] is False, line
        assert "internal error" not in answer["error"]["message"]
        assert answer["error"]["class"] in (
            "ConfigError",
            "FormatError",
            "UnsupportedError",
        )
        assert site.remote()["state"] == "in_sync"
        assert not site.remote()["dirty_bytes"]
    site.client().pwrite(b"a" * 4096, 0)
    site.stop()
    site.assert_equal()
