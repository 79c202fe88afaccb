# SPDX-License-Identifier: BSD-3-Clause
"""How the benchmarks' commands take signals and output that cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.command import SIGNALS, held_back, run_command


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_held_back_signals_come_at_the_end() -> None:
    """Again and again, and with another thread that could take them."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    done = []

    def clean_up() -> None:
        with held_back():
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            clean_up()
    finally:
        over.set()
        other.join()
    assert len(done) == 5


def test_held_back_elsewhere_changes_nothing() -> None:
    """A thread that is not the main one never gets a signal."""
    found: list[object] = []

    def hold() -> None:
        with held_back():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_interrupts(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is open is closed; then a line, and 130."""
    closed = []

    def run() -> int:
        try:
            signal.raise_signal(number)
        finally:
            closed.append(1)
        return 0

    assert run_command("name", run, ()) == 130
    assert closed == [1]
    assert "name: interrupted" in capsys.readouterr().err


def test_errors_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are named, and the system's; another is a bug."""

    def run(error: Exception) -> int:
        raise error

    for error in (KeyError("a key"), OSError("a file")):
        assert run_command("name", lambda e=error: run(e), (KeyError,)) == 1
        assert str(error) in capsys.readouterr().err
    with pytest.raises(ValueError, match="a bug"):
        run_command("name", lambda: run(ValueError("a bug")), (KeyError,))


def listed(stdout: int, **options: object) -> subprocess.CompletedProcess[str]:
    """List the rows on *stdout*."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks", "--list"],
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, **options},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_list_into_a_full_device_is_an_error() -> None:
    """A line and no traceback."""
    with open("/dev/full", "wb") as full:
        done = listed(full.fileno())
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "standard output cannot be written: No space left" in line


def test_list_into_a_closed_pipe_says_nothing() -> None:
    """Whoever read it has what they wanted."""
    reader, writer = os.pipe()
    os.close(reader)
    done = listed(writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_package_of_the_tree_is_measured_from_any_folder(tmp_path: Path) -> None:
    """One of the same name where the caller stands is passed over."""
    for name in ("benchmarks", "nbd_mirror"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('wrong')\n")
    done = listed(subprocess.PIPE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "write_4k_qd1 " in done.stdout
