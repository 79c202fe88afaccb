# SPDX-License-Identifier: BSD-3-Clause
"""The demonstration's base: it ends all that it has started, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import support

# The demonstration's commands leave processes that go on making others, each of a
# session of its own and with a parent that ends at once, as a server's.
SCRIPT = """
import os, sys, tempfile
from pathlib import Path
tempfile.tempdir = sys.argv[1]
sys.path.insert(0, sys.argv[2])
from stage import Stage

with Stage(1) as stage:
    (stage.folder / "go.sh").write_text(sys.argv[3])
    for _ in range(3):
        assert stage.quietly("setsid bash go.sh 1 >/dev/null 2>&1 &")
    stage.wait_until(lambda: (stage.folder / "7").exists(), "some of them")
    print(stage.folder, flush=True)
    if len(sys.argv) > 4:
        print("in it", flush=True)
        sys.stdin.readline()
"""
# No process of it lives long, and none names the folder.
GO = """
touch $1
sleep 0.02
[ $1 -gt 500 ] || setsid bash go.sh $(($1 + 1)) &
"""


def in_folder(folder: Path) -> list[int]:
    """Return the processes whose current folder it is, or was."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(entry.readlink()).startswith(str(folder)):  # perhaps "(deleted)"
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_end_misses_no_process_that_has_just_started(tmp_path: Path) -> None:
    """Whatever moment it ends at: such processes are always just starting."""
    scripts = os.fspath(support.ROOT / "scripts")
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, os.fspath(tmp_path), scripts, GO],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert in_folder(Path(done.stdout.strip())) == []
        assert list(tmp_path.iterdir()) == []


def test_end_kills_no_stranger(tmp_path: Path) -> None:
    """Not a program of the user's that names a file of the folder, or works in it."""
    scripts = os.fspath(support.ROOT / "scripts")
    words = [sys.executable, "-c", SCRIPT, os.fspath(tmp_path), scripts, GO, "wait"]
    pause = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdin is not None
        assert demo.stdout is not None
        folder = Path(demo.stdout.readline().strip())
        users = subprocess.Popen([*pause, os.fspath(folder / "log")], cwd=folder)
        try:
            assert demo.stdout.readline() == "in it\n"
            demo.stdin.write("\n")
            demo.stdin.flush()
            assert demo.wait(60) == 0
            assert users.poll() is None
            assert in_folder(folder) == [users.pid]
        finally:
            users.kill()
            users.wait()
