# SPDX-License-Identifier: BSD-3-Clause
"""
The command: run the rows one after the other, and report.

Each row starts what it needs in its own folder and leaves nothing behind. So a row that
fails does not affect the others, and each row can be run by name.

Exit status: 0 measured; 1 a row failed to run, or something is missing or cannot be
written; 2 wrong usage; 3 with --check, a minimum was missed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from nbd_mirror.base.errors import MirrorError

from . import report
from .command import held_back, put, run_command
from .machine import SHM, check_machine, machine
from .model import KIB, MIB, BenchError, Context, Outcome, Row
from .rows import GROUPS, ROWS, chosen

RESULTS = Path(__file__).resolve().parent / "results"
FULL = {"rounds": 5, "seconds": 1.5, "size": 1024}
QUICK = {"rounds": 2, "seconds": 1.0, "size": 256}
BOUNDS = {"rounds": (1, 1000), "seconds": (0.1, 3600), "size": (64, 1 << 20)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Compare nbd_mirror with its peers, row by row.",
        epilog="Exit status: 0 measured; 1 a row failed to run, or something is "
        "missing or cannot be written; 2 wrong usage; 3 with --check, a must was "
        "missed; 130 interrupted.",
    )
    parser.add_argument("row", nargs="*", help="only these; all unless given")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument(
        "--seconds", type=float, help="of each measurement; default 1.5"
    )
    parser.add_argument("--size", type=int, help="of an image, MiB; default 1024")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds of 1 second, images of 256 MiB, where not given",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit 3 when a must is missed"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help=f"folder; default {_short(RESULTS)}",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON in the place of the table"
    )
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, (least, most) in BOUNDS.items():
        if not least <= getattr(options, name) <= most:  # also refuses NaN
            parser.error(f"--{name} must be {least:g} to {most}")
    try:
        options.rows = chosen(options.row)
    except KeyError as error:
        parser.error(f"there is no row {error}: see --list")
    return options


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


class Progresses:
    """Shows the progress: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, rows: Sequence[Row]) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("rows", total=len(rows))

    def __enter__(self) -> Progresses:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, row: Row) -> None:
        """Name the row that begins."""
        self.console.print(f"[bold]{row.key}[/]: {row.title}")
        self._bar.update(self._task, description=row.key)

    def say(self, line: str) -> None:
        """Show a line."""
        self.console.print(f"  {line}", markup=False)

    def done(self, outcome: Outcome) -> None:
        """Count a row that has ended."""
        if outcome.error:
            self.say(f"FAILED: {outcome.error}")
        self._bar.advance(self._task)


@contextlib.contextmanager
def context(options: argparse.Namespace, shown: Progresses) -> Iterator[Context]:
    """Give a row its folder; end and remove all that it leaves."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="nbd-mirror-bench.", dir=SHM))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with _uninterrupted_end(stack):
            yield Context(
                folder=folder,
                output=options.output,
                rounds=options.rounds,
                seconds=options.seconds,
                size=options.size * MIB,
                stack=stack,
                say=shown.say,
            )


@contextlib.contextmanager
def _uninterrupted_end(stack: contextlib.ExitStack) -> Iterator[None]:
    """Close *stack* with signals held back, so that the clean-up is complete."""
    try:
        yield
    finally:
        with held_back():
            stack.close()


def run_row(row: Row, options: argparse.Namespace, shown: Progresses) -> Outcome:
    """Run one row; an error becomes its outcome."""
    shown.begin(row)
    started = time.monotonic()
    measured, error = None, ""
    try:
        with context(options, shown) as ctx:
            measured = row.run(ctx)
            absent = {claim.key for claim in row.claims} - measured.values.keys()
            if absent:
                raise BenchError(f"{', '.join(sorted(absent))}: no value was measured")
    except (BenchError, MirrorError, OSError) as why:
        error = str(why)
    except Exception as bug:  # a bug in one row must not lose the others' figures
        error = f"internal error: {bug!r}\n{traceback.format_exc().strip()}"
    outcome = Outcome(row, measured, time.monotonic() - started, error)
    shown.done(outcome)
    return outcome


def files(options: argparse.Namespace) -> tuple[Path, Path]:
    """Return where to save; a partial run does not replace the files of a whole one."""
    name = "results" if len(options.rows) == len(ROWS) else "partial"
    return options.output / f"{name}.json", options.output / f"{name}.md"


def check_output(options: argparse.Namespace) -> None:
    """Before measuring, raise BenchError if the files could not be written."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output) as probe:
            probe.write(bytes(64 * KIB))
        for path in files(options):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise _not_saved(options, error) from None


def _not_saved(options: argparse.Namespace, error: OSError) -> BenchError:
    why = error.strerror or str(error)
    return BenchError(
        f"{options.output}: the figures cannot be saved there: {why}; give another "
        "--output"
    )


def save(
    answer: dict[str, Any], table: str, options: argparse.Namespace
) -> BenchError | None:
    """Write the files; return any error, so that the figures are shown first."""
    try:
        for path, text in zip(files(options), (_json(answer), table), strict=True):
            path.write_text(text)
    except OSError as error:
        return _not_saved(options, error)
    return None


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=2, allow_nan=False) + "\n"


def run(options: argparse.Namespace) -> int:
    """Run the rows, report, save; return the exit status."""
    check_machine(options.size * MIB)
    check_output(options)
    about = machine()
    # With --json standard output is for a program: progress goes elsewhere.
    console = _console(stderr=options.json)
    console.print(report.machine_line(about), markup=False)
    with Progresses(console, options.rows) as shown:
        outcomes = [run_row(row, options, shown) for row in options.rows]
    told = {key: getattr(options, key) for key in FULL}
    answer = report.as_json(outcomes, about, told)
    failure = save(answer, report.as_markdown(outcomes, about, told), options)
    if options.json:
        put(_json(answer))
    else:
        report.show(_console(stderr=False), outcomes, about)
    if failure:
        raise failure
    console.print(f"\nAll figures are in {_short(options.output.resolve())}.")
    if any(outcome.error for outcome in outcomes):
        return 1
    return 3 if options.check and report.missed(outcomes) else 0


def _console(*, stderr: bool) -> Console:
    """Return a console, wide enough for the table if it is no terminal."""
    console = Console(highlight=False, stderr=stderr)
    return (
        console
        if console.is_terminal
        else Console(highlight=False, stderr=stderr, width=120)
    )


def list_rows() -> int:
    """Print the rows, and the names of groups of them."""
    names = [(row.key, row.title) for row in ROWS]
    names += [(name, ", ".join(x.key for x in rows)) for name, rows in GROUPS.items()]
    put("".join(f"{name:<20} {words}\n" for name, words in names))
    return 0


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    return run_command(
        "benchmarks/run",
        lambda: list_rows() if options.list else run(options),
        (BenchError, MirrorError),
    )


if __name__ == "__main__":
    sys.exit(main())
