# SPDX-License-Identifier: BSD-3-Clause
"""
Fixtures of all tests, and two checks of the whole run.

In CI (CI=true) a skip fails the run unless it is for a fact of the machine: a test
that silently does not run proves nothing. And a run fails if it left a process,
loop device, mount or network namespace behind: a test that cannot clean up after a
mirror has hidden something.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

SESSION_DIR = pytest.StashKey[Path]()
COMPLAINTS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Mark this session's processes and make its folder."""
    os.environ[support.MARKER] = uuid.uuid4().hex
    # Not inherited from whoever runs the tests: they must hold without it.
    for name in ("NBD_MIRROR_CONFIG_DIR", "NBDM_FAULT", "PYTHONPATH"):
        os.environ.pop(name, None)
    support.become_subreaper()
    # Short: the path of a unix socket has 107 bytes.
    config.stash[SESSION_DIR] = Path(tempfile.mkdtemp(prefix="nbdm-"))
    config.stash[COMPLAINTS] = []


@pytest.fixture
def run_dir(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Give a new folder with a short path, for images, state and sockets."""
    path = Path(tempfile.mkdtemp(prefix="t", dir=pytestconfig.stash[SESSION_DIR]))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def netns_prefix() -> str:
    """Give the beginning that names of a test's network namespaces must have."""
    return f"nbdm-{os.environ[support.MARKER][:8]}-"


@pytest.fixture
def processes(
    run_dir: Path, request: pytest.FixtureRequest
) -> Iterator[support.Processes]:
    """Give the runner of a test's processes; all are gone when the test is over."""
    logs = run_dir / "logs"
    logs.mkdir()
    runner = support.Processes(logs)
    try:
        yield runner
    finally:
        try:
            runner.close()
        finally:
            request.node.add_report_section("teardown", "logs", runner.logs())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the skips that CI does not accept."""
    if report.skipped and not hasattr(report, "wasxfail"):
        note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note whole files that skip themselves."""
    if report.skipped:
        note_skip(report)


SKIPS: list[str] = []


def note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Keep *report* if its reason is no fact of the machine."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "?"
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(support.CANNOT_RUN):
        SKIPS.append(f"{report.nodeid} was skipped: {reason}")


def left_mounts(folder: Path) -> list[str]:
    """Return the mount points below *folder*, and those of its files."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if f"{folder}/" in line]


def left_loops(folder: Path) -> list[str]:
    """Return the loop devices whose backing file is below *folder*."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text()
        except OSError:  # detached meanwhile
            continue
        if f"{folder}/" in file:
            found.append(f"/dev/{backing.parent.parent.name}")
    return found


def left_namespaces() -> list[str]:
    """Return the network namespaces of this session."""
    prefix = f"nbdm-{os.environ[support.MARKER][:8]}-"
    folder = Path("/run/netns")
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if path.name.startswith(prefix)]


def clean_up(folder: Path) -> list[str]:
    """Remove what the session left, and say what it was."""
    complaints = []
    for point in reversed(left_mounts(folder)):
        complaints.append(f"left mounted: {point}")
        subprocess.run(["umount", "-l", point], check=False, timeout=30)
    for device in left_loops(folder):
        complaints.append(f"left loop device: {device}")
        subprocess.run(["losetup", "-d", device], check=False, timeout=30)
    for pid, command in support.kill_marked({}).items():
        complaints.append(f"left running: {pid} {command}")
    support.reap()
    for name in left_namespaces():
        complaints.append(f"left network namespace: {name}")
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)
    shutil.rmtree(folder, ignore_errors=True)
    return complaints


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for what was left behind and, in CI, for unexplained skips."""
    complaints = session.config.stash[COMPLAINTS]
    complaints += clean_up(session.config.stash[SESSION_DIR])
    if os.environ.get("CI") == "true":
        complaints += SKIPS
    if complaints and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say why the run failed though every test passed."""
    for complaint in config.stash[COMPLAINTS]:
        terminalreporter.write_line(f"FAILED the run: {complaint}", red=True)
