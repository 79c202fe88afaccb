# SPDX-License-Identifier: BSD-3-Clause
"""The [hooks] table: what a command is, and the line each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd_mirror.base.errors import ConfigError
from nbd_mirror.volume.config import VolumeConfig, load

NODES = """\
name = "pg"
size = "10GiB"
local = "/srv/pg.img"
state = "/var/lib/nbd-mirror/pg"
listen = "unix:/run/nbd-mirror/pg.sock"
tls = "off"
[[node]]
name = "alpha"
address = "10.0.0.1:10810"
[[node]]
name = "beta"
address = "10.0.0.2:10810"
"""


def loaded(folder: Path, text: str) -> VolumeConfig:
    """Load a file of nodes with *text* behind it."""
    path = folder / "pg.toml"
    path.write_text(NODES + text)
    return load(path, "alpha")


def test_a_command_is_a_path_or_a_list(tmp_path: Path) -> None:
    """And a volume without the table has no hooks and waits for none."""
    hooks = loaded(
        tmp_path,
        '[hooks]\npromoted = ["/bin/echo", "a b"]\ndemoting = "/x"\ntimeout = "90s"\n',
    ).hooks
    assert (hooks.promoted, hooks.demoting) == (("/bin/echo", "a b"), ("/x",))
    assert (hooks.demoted, hooks.timeout, hooks.limit_s) == ((), 90.0, 180.0)
    assert loaded(tmp_path, "").hooks.limit_s == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[hooks]\npromoted = []",
            "hooks: promoted: must be a program's absolute path",
        ),
        ('[hooks]\npromoted = "x"', 'hooks: promoted = "x": must be a program\'s abs'),
        (
            '[hooks]\ndemoted = ["/x", 1]',
            "hooks: demoted: must be a program's absolute",
        ),
        ('[hooks]\ndemoted = "/x\\u0000"', "hooks: demoted = "),
        ('[hooks]\ntimeout = "0s"', 'hooks: timeout = "0s": must be a time from 1s'),
        ("[hooks]\npromoted = true", "hooks: promoted = true: must be a program's abs"),
        (
            '[hooks]\ndemotin = "/x"',
            "hooks: demotin: unknown key; did you mean demoting?",
        ),
        ('[[remote]]\npromoted = "/x"', "it stands in the [hooks] table"),
    ],
)
def test_each_mistake_gets_one_line(tmp_path: Path, text: str, line: str) -> None:
    """It names the key, the value and the rule."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text + "\n")
    assert line in caught.value.message


def test_hooks_need_nodes(tmp_path: Path) -> None:
    """A volume without roles would never run them."""
    path = tmp_path / "pg.toml"
    head = NODES.partition("tls")[0]
    remote = '[[remote]]\nname = "dr"\nuri = "nbd://h/pg"\n'
    path.write_text(head + remote + '[hooks]\npromoted = "/x"\n')
    with pytest.raises(ConfigError, match="hooks: is of use only with"):
        load(path)
    path.write_text("hooks = 5\n" + NODES)
    with pytest.raises(ConfigError, match=r"hooks = 5: must be a \[hooks\] table"):
        load(path, "alpha")
