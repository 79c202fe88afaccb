# SPDX-License-Identifier: BSD-3-Clause
"""Includes and imports that leave the plan of layers are found, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest
import support

from scripts import layers


def complaints_of(root: Path, file: str, text: str) -> list[str]:
    """Return what is said of a tree with this one file, beside two to be used."""
    for name, content in {
        "csrc/wire/conn.h": "",
        "csrc/nbdm.h": "",
        file: text,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return layers.complaints(root)


def test_tree_keeps_to_its_layers() -> None:
    """Nothing points up."""
    assert layers.complaints(support.ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("nbd_mirror/base/units.py", "from ..rules.state import RemoteState"),
        ("nbd_mirror/base/__init__.py", "from ..rules import state"),
        ("nbd_mirror/rules/state.py", "from ..volume import model"),
        ("nbd_mirror/rules/state.py", "import nbd_mirror.volume.model"),
        ("nbd_mirror/volume/client.py", "def f():\n    from ..server import keeper"),
        ("nbd_mirror/device/attach.py", "from nbd_mirror.commands.serve import start"),
        ("nbd_mirror/server/volume.py", "from ..commands.show import state_text"),
        ("nbd_mirror/commands/cli.py", "from ..server import policy"),
        ("nbd_mirror/commands/cli.py", "import os, nbd_mirror.server.policy as p"),
        ("nbd_mirror/server/keeper.py", "from nbd_mirror._core import lib"),
        ("nbd_mirror/server/keeper.py", "from nbd_mirror import __main__"),
        ("nbd_mirror/server/keeper.py", "from nbd_mirror.errors import MirrorError"),
        ("nbd_mirror/_build.py", "from .base import errors"),
        ("nbd_mirror/errors.py", ""),
        ("nbd_mirror/tools/errors.py", ""),
        ("csrc/base/file.c", '#include "wire/conn.h"'),
        ("csrc/base/file.c", '#include "conn.h"'),
        ("csrc/file.c", ""),
    ],
)
def test_one_that_points_up_is_named(tmp_path: Path, file: str, text: str) -> None:
    """The complaint begins with the file, and there is one."""
    (line,) = complaints_of(tmp_path, file, text)
    assert line.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("nbd_mirror/__main__.py", "from .commands.cli import main"),
        ("nbd_mirror/commands/cli.py", "from .. import __version__"),
        ("nbd_mirror/commands/cli.py", "from ..device import attach as kernel"),
        ("nbd_mirror/commands/cli.py", "from . import serve\nimport os, cffi"),
        ("nbd_mirror/server/plugin.py", "from nbd_mirror.server.volume import Volume"),
        ("nbd_mirror/volume/core/boundary.py", "from nbd_mirror._core import ffi, lib"),
        ("csrc/doors/direct.c", '#include "nbdm.h"\n#include "wire/conn.h"'),
    ],
)
def test_one_that_points_down_is_not(tmp_path: Path, file: str, text: str) -> None:
    """Folders below, one's own, and what is not ours, are used freely."""
    assert complaints_of(tmp_path, file, text) == []
