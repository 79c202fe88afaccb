# SPDX-License-Identifier: BSD-3-Clause
"""What the whole run is judged by, with one process and with several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

# posix_spawn returns once the program runs: before that it is not marked as ours.
LEAVES = """
import os
def test_leaves():
    os.posix_spawnp("sleep", ["sleep", "1234"], os.environ)
    {then}
def test_two(run_dir):
    assert run_dir.is_dir()
"""
SKIPS = """
import pytest, support
def test_for_a_reason():
    support.requires(False, "there is no such machine")
def test_for_none():
    pytest.skip("not today")
"""


def run(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest over one file, with our conftest.py."""
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--noconftest"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", *options]
    return subprocess.run(
        [*command, str(folder / "test_it.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CI": "true"},
    )


@pytest.mark.parametrize("options", [(), ("-n2", "--dist=loadgroup")], ids=str)
def test_what_is_left_fails_the_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A process that outlives the tests is named and killed."""
    done = run(tmp_path, LEAVES.format(then="pass"), *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert done.stdout.count("FAILED the run: left running") == 1
    assert "sleep 1234" in done.stdout


def test_what_a_dead_worker_left_fails_the_run(tmp_path: Path) -> None:
    """The controller looks for it in the place of the worker."""
    done = run(tmp_path, LEAVES.format(then="os._exit(3)"), "-n1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED the run: left running" in done.stdout


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=str)
def test_a_skip_needs_a_fact_in_ci(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of two skips the one without a fact of the machine fails the run."""
    done = run(tmp_path, SKIPS, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 skipped" in done.stdout
    assert done.stdout.count("FAILED the run: ") == 1
    assert "not today" in done.stdout
