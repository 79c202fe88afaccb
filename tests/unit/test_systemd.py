# SPDX-License-Identifier: BSD-3-Clause
"""
The shipped hook for systemd: what it calls in each case, and that the units are valid.

No systemd runs where the tests do, so programs that note their words stand in for
systemctl and nbd-mirror. The hook is the real one, with another search path.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unit.pages import DOCS, MANUAL, blocks

HOOK = DOCS / "nbd-mirror-hook"
TARGET = "nbd-mirror-primary@pg.target"


def run(folder: Path, hook: str, **statuses: int) -> tuple[int, list[str]]:
    """Run the hook; *statuses*: of a program's commands. Give its status and calls."""
    calls = folder / "calls"
    calls.write_text("")
    for name in ("systemctl", "nbd-mirror"):
        ends = "".join(
            f"[ $1 != {word} ] || exit {code}\n" for word, code in statuses.items()
        )
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n{ends}')
        (folder / name).chmod(0o755)
    text, count = re.subn(
        "(?m)^PATH=.*$", f"PATH={folder}:/usr/bin:/bin", HOOK.read_text()
    )
    assert count == 1
    (folder / "hook").write_text(text)
    environment = {
        "NBD_MIRROR_HOOK": hook,
        "NBD_MIRROR_VOLUME": "pg",
        "NBD_MIRROR_CONFIG": "/etc/pg.toml",
    }
    done = subprocess.run(["/bin/sh", folder / "hook"], env=environment, check=False)
    return done.returncode, calls.read_text().splitlines()


ATTACH = "nbd-mirror attach /etc/pg.toml"
DETACH = "nbd-mirror detach /etc/pg.toml"
STOP = f"systemctl stop {TARGET}"


def test_the_device_is_there_before_the_services(tmp_path: Path) -> None:
    """And no service is started without it."""
    start = f"systemctl start --no-block {TARGET}"
    assert run(tmp_path, "promoted") == (0, [ATTACH, start])
    assert run(tmp_path, "promoted", attach=9) == (9, [ATTACH])
    assert run(tmp_path, "promoting") == (0, [])


@pytest.mark.parametrize("hook", ["demoting", "demoted"])
def test_services_end_before_the_device(tmp_path: Path, hook: str) -> None:
    """A device in use fails the hook; one that is not attached does not."""
    assert run(tmp_path, hook) == (0, [STOP, DETACH])
    assert run(tmp_path, hook, detach=10) == (0, [STOP, DETACH])
    assert run(tmp_path, hook, detach=5) == (1, [STOP, DETACH])
    assert run(tmp_path, hook, stop=3) == (3, [STOP])


def test_the_units_are_valid(tmp_path: Path) -> None:
    """The shipped ones, and the examples of the manual."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    shutil.copy(DOCS / "nbd-mirror-primary@.target", tmp_path)
    mount, service = blocks(MANUAL, "ini")
    (tmp_path / "srv-pg.mount").write_text(mount)
    unit = tmp_path / "postgresql@15-main.service"
    unit.write_text(f"{service}\n[Service]\nExecStart=/bin/true\n")
    served = tmp_path / "nbd-mirror@pg.service"
    served.write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / TARGET).symlink_to("nbd-mirror-primary@.target")
    names = [TARGET, "srv-pg.mount", unit.name]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert (done.returncode, ours) == (0, []), done.stderr
