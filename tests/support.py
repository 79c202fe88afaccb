# SPDX-License-Identifier: BSD-3-Clause
"""
What all tests share: skipping with a reason, waiting, processes that surely end.

Every process of a test session carries a variable in its environment, whatever started
it and however it went into the background. So a leftover process can be found, and is
certainly ours. pytest makes itself their subreaper, so that they can
be reaped too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

__all__ = [
    "CANNOT_RUN",
    "MARKER",
    "ROOT",
    "Processes",
    "become_subreaper",
    "cpu_s",
    "end",
    "freeze",
    "kill_marked",
    "marked_processes",
    "requires",
    "requires_program",
    "wait_until",
]

ROOT = Path(__file__).resolve().parent.parent
MARKER = "NBD_MIRROR_TEST_SESSION"
CANNOT_RUN = "cannot run here: "
PR_SET_CHILD_SUBREAPER = 36


def freeze(pid: int) -> None:
    """
    Stop a process with SIGSTOP; return once none of its threads runs.

    They stop one after another. On a busy machine a thread still answers a request that
    comes after the signal.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _is_frozen(pid), f"process {pid} to freeze")


def _is_frozen(pid: int) -> bool:
    stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def requires(fact: bool, otherwise: str) -> None:
    """
    Skip the test unless *fact* holds.

    Only for facts of the machine, which the project cannot change: in CI any other
    skip fails the run.

    Args:
        fact: what the test needs of the machine.
        otherwise: what is wrong with the machine if it does not hold.
    """
    if not fact:
        pytest.skip(CANNOT_RUN + otherwise)


def requires_program(*names: str) -> None:
    """Skip the test unless all programs *names* are installed."""
    for name in names:
        found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        requires(found is not None, f"{name} is not installed (see scripts/setup)")


def wait_until(
    condition: Callable[[], object],
    what: str,
    *,
    timeout_s: float = 20.0,
    interval_s: float = 0.02,
    progress: Callable[[], object] | None = None,
) -> None:
    """
    Return once *condition* is true; fail the test if it is not after *timeout_s*.

    Args:
        condition: asked every *interval_s* seconds.
        what: completes the sentence "waited in vain for ...".
        timeout_s: seconds.
        interval_s: seconds.
        progress: what changes while the work that is waited for goes on, at whatever
            speed the machine allows. The time-out is then of a standstill, and the
            test's own time bounds the whole. It is asked after *condition*.
    """
    seen: object = None
    deadline = time.monotonic() + timeout_s
    while not condition():
        if progress is not None and seen != (seen := progress()):
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            how = "without progress " if progress else ""
            pytest.fail(f"waited {timeout_s:g} s {how}in vain for {what}")
        time.sleep(interval_s)


def listens(path: Path) -> bool:
    """
    Tell whether a server listens on the unix socket *path*.

    A socket has its name from bind() on and refuses connections until listen(), so
    the name alone tells nothing; a connection made to find out would be a client more.
    """
    flag, listening = 3, b"00010000"  # the column of flags; __SO_ACCEPTCON
    # Bytes, because the names of other programs' sockets need not be text.
    rows = [line.split() for line in Path("/proc/net/unix").read_bytes().splitlines()]
    name = os.fsencode(path)
    return any(row[-1:] == [name] and row[flag] == listening for row in rows)


def wait_listening(path: Path, what: str) -> None:
    """Return once a server listens on *path*; *what* completes "waited for"."""
    wait_until(lambda: listens(path), what)


def become_subreaper() -> None:
    """Make this process the parent of those its descendants leave behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl PR_SET_CHILD_SUBREAPER")


def is_running(pid: int) -> bool:
    """Tell whether *pid* exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def cpu_s(pid: int) -> float:
    """Return the seconds of processor time that *pid* has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def marked_processes(marker: str = "") -> dict[int, str]:
    """
    Return the running processes of this session but pytest: pid, command line.

    Args:
        marker: another session's.
    """
    wanted = f"{MARKER}={marker or os.environ[MARKER]}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if is_running(int(entry.name)):
            text = command.replace(b"\0", b" ").decode(errors="replace").strip()
            found[int(entry.name)] = text
    return found


def reap() -> None:
    """Reap the daemons that ended and were left to us."""
    while True:
        try:
            # Leaves alone those that subprocess will ask for: none is left then.
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def kill_marked(spare: Mapping[int, str], marker: str = "") -> dict[int, str]:
    """
    Kill every process of this session that is not in *spare*.

    Args:
        spare: by pid.
        marker: another session's.

    Returns:
        those killed: pid and command line.
    """
    killed: dict[int, str] = {}
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        # Again and again: one may have forked before it was killed.
        marked = marked_processes(marker).items()
        left = {p: c for p, c in marked if p not in spare}
        if not left:
            break
        killed |= left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return killed


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill *process*, reap it and close its pipes."""
    with process:
        process.kill()


class Processes:
    """
    Starts the processes of one test, and ends them all, whatever happens.

    Cleanups registered with on_exit() run first, last one first (a file system must
    be unmounted while its server lives); then everything the test started and that
    still runs, daemons included, is killed and reaped.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._spare = marked_processes()
        self._started: list[subprocess.Popen[bytes]] = []
        self._cleanups: list[Callable[[], object]] = []
        self._names: dict[str, int] = {}

    def on_exit(self, cleanup: Callable[[], object]) -> None:
        """Have *cleanup* called at the end, before any process is killed."""
        self._cleanups.append(cleanup)

    def start(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """
        Start *command* in a session of its own, its output in a log file.

        Args:
            command: program and arguments.
            env: added to the environment.
            cwd: the working directory.

        Returns:
            the process; its output is shown if the test fails.
        """
        name = Path(command[0]).name
        self._names[name] = self._names.get(name, 0) + 1
        log = self.log_dir / f"{name}.{self._names[name]}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run *command* to its end and return its output, both streams apart.

        The output goes through files: a daemon that keeps a pipe open would keep
        the caller waiting for it.

        Args:
            command: program and arguments.
            env: added to the environment.
            check: fail the test if the exit code is not 0.
            timeout_s: seconds; then the test fails.
        """
        words = [str(word) for word in command]
        out, err = self.log_dir / "run.out", self.log_dir / "run.err"
        with out.open("w") as out_file, err.open("w") as err_file:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env={**os.environ, **(env or {})},
                timeout=timeout_s,
                check=False,
            )
        result = subprocess.CompletedProcess(
            words,
            done.returncode,
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
        )
        if check and result.returncode != 0:
            pytest.fail(
                f"{' '.join(words)}: exit code {result.returncode}\n"
                f"{result.stdout}{result.stderr}"
            )
        return result

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill *process* as a crash would, and its children; return once it is gone."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        """Run the cleanups, then kill and reap what still runs."""
        failed = []
        while self._cleanups:
            cleanup = self._cleanups.pop()
            try:
                cleanup()
            except Exception as error:
                # The next cleanups must run, and the processes must be killed.
                failed.append(error)
        kill_marked(self._spare)
        for process in self._started:
            process.wait(10)
        reap()
        if failed:
            raise ExceptionGroup("cleanups failed", failed)

    def logs(self) -> str:
        """Return the ends of the logs, for a failure's report."""
        parts = []
        for log in sorted(self.log_dir.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-40:]
            if lines:
                parts.append("\n".join([f"--- {log.name}", *lines]))
        return "\n".join(parts)
