# SPDX-License-Identifier: BSD-3-Clause
"""
Fixtures of all tests, the order in which they run, and two checks of the whole run.

In CI (CI=true) a skip fails the run unless it is for a fact of the machine: a test
that silently does not run proves nothing. And a run fails if it left a process,
loop device, mount or network namespace behind: a test that cannot clean up after a
mirror has hidden something.

With pytest-xdist (-n) each worker is a part of the run with processes and a folder of
its own. It judges what it left, and the controller once more, for a worker may die.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import support


class Part(NamedTuple):
    """A part of the run: the *marker* of its processes, and the *folder* of files."""

    marker: str
    folder: str


# The first is this process's; a controller has its workers' behind it.
PARTS = pytest.StashKey[list[Part]]()
COMPLAINTS = pytest.StashKey[list[str]]()

# No example has a deadline, nor their making: both would measure the machine's load.
# Random in CI too, where Hypothesis would repeat the same examples in every run.
hypothesis.settings.register_profile(
    "nbd_mirror",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nbd_mirror")

# Their tests share a server or a compiled module, so one worker has them all.
SHARING = ("tests/unit/", "tests/e2e/direct/", "tests/e2e/test_requests.py")


def new_part() -> Part:
    """Make a part of the run."""
    # Short: the path of a unix socket has 107 bytes.
    return Part(uuid.uuid4().hex, tempfile.mkdtemp(prefix="nbdm-"))


def pytest_configure(config: pytest.Config) -> None:
    """Mark this session's processes and make its folder."""
    given = getattr(config, "workerinput", None)
    part = Part(*given["part"]) if given else new_part()
    config.stash[PARTS] = [part]
    os.environ[support.MARKER] = part.marker
    # Not inherited from the shell that runs the tests: they must hold without it.
    for name in ("NBD_MIRROR_CONFIG_DIR", "NBDM_FAULT", "PYTHONPATH"):
        os.environ.pop(name, None)
    support.become_subreaper()
    config.stash[COMPLAINTS] = []


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker its part of the run."""
    part = new_part()
    node.workerinput["part"] = tuple(part)
    node.config.stash[PARTS].append(part)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker complains of; one that died says nothing."""
    node.config.stash[COMPLAINTS] += getattr(node, "workeroutput", {}).get("left", [])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow ones first, so that none is left alone at the end of a run."""
    for item in items:
        file, _, _ = item.nodeid.partition("::")
        grouped = item.get_closest_marker("xdist_group") is not None
        if file.startswith(SHARING) and not grouped:
            item.add_marker(pytest.mark.xdist_group(file))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def run_dir(pytestconfig: pytest.Config) -> Iterator[Path]:
    """Give a new folder with a short path, for images, state and sockets."""
    folder = pytestconfig.stash[PARTS][0].folder
    path = Path(tempfile.mkdtemp(prefix="t", dir=folder))
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
        except OSError:  # detached while this looked
            continue
        if f"{folder}/" in file:
            found.append(f"/dev/{backing.parent.parent.name}")
    return found


def left_namespaces(marker: str) -> list[str]:
    """Return the network namespaces of a part of the run."""
    folder = Path("/run/netns")
    if not folder.is_dir():
        return []
    prefix = f"nbdm-{marker[:8]}-"
    return [path.name for path in folder.iterdir() if path.name.startswith(prefix)]


def clean_up(part: Part) -> list[str]:
    """Remove what a part of the run left, and say what it was."""
    complaints = []
    folder = Path(part.folder)
    for point in reversed(left_mounts(folder)):
        complaints.append(f"left mounted: {point}")
        subprocess.run(["umount", "-l", point], check=False, timeout=30)
    for device in left_loops(folder):
        complaints.append(f"left loop device: {device}")
        subprocess.run(["losetup", "-d", device], check=False, timeout=30)
    for pid, command in support.kill_marked({}, part.marker).items():
        complaints.append(f"left running: {pid} {command}")
    support.reap()
    for name in left_namespaces(part.marker):
        complaints.append(f"left network namespace: {name}")
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)
    shutil.rmtree(folder, ignore_errors=True)
    return complaints


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for what was left behind and, in CI, for unexplained skips."""
    parts = session.config.stash[PARTS]
    complaints = session.config.stash[COMPLAINTS]
    for part in parts:
        complaints += clean_up(part)
    # A controller hears of its workers' skips from them.
    if os.environ.get("CI") == "true" and len(parts) == 1:
        complaints += SKIPS
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = complaints
    if complaints and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say why the run failed though every test passed."""
    for complaint in config.stash[COMPLAINTS]:
        terminalreporter.write_line(f"FAILED the run: {complaint}", red=True)
