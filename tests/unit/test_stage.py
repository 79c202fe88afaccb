# SPDX-License-Identifier: BSD-3-Clause
"""The demonstration's base: it ends what it has started, and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

from scripts.stage import Stage

PAUSE = ["python3", "-c", "import time; time.sleep(60)"]


@contextlib.contextmanager
def paused(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of the user's, with *words* as arguments."""
    process = subprocess.Popen([*PAUSE, *words])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_end_kills_its_own_processes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a program of the user's that has a file of its folder open, say."""
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path))
    stage = Stage(1)
    with paused(os.fspath(stage.folder / "serve.log")) as users:
        pid_file = stage.folder / "pid"
        # as a server: in a session of its own, and its parent has ended
        start = f"setsid {PAUSE[0]} -c '{PAUSE[2]}' >/dev/null 2>&1 &"
        assert stage.quietly(f"{start} echo $! > {pid_file}")
        ours = int(pid_file.read_text())
        assert support.is_running(ours)
        stage._remove_folder()
        support.wait_until(lambda: not support.is_running(ours), "its process to end")
        assert users.poll() is None
    assert list(tmp_path.iterdir()) == []
