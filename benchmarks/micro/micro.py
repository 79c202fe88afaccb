# SPDX-License-Identifier: BSD-3-Clause
"""
Micro-benchmarks: instructions a call of the parts that every write passes.

micro.c has the cases. It is linked with the engine's own objects, compiled as the
servers' are, and run under callgrind, which counts the same on every run however
busy the machine is. Hardware counters are left alone: few virtual machines have
them, and their counts would not compare with callgrind's.

Exit status: 0 counted; 1 something is missing or failed; 2 wrong usage; 3 with
--compare, a case got worse or was not compared; 130 interrupted.
"""

from __future__ import annotations

import argparse
import fnmatch
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nbd_mirror import _build

from ..command import put, run_command
from . import counts
from .counts import Change, CountError, Figures

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "micro"
RESULTS = HERE.parent / "results" / "micro.json"
# The logs and maps: what runs without a thread and without the network.
PARTS = (
    *("error", "crc32c", "fault", "file", "bitmap", "dirty_map", "inflight"),
    *("activity", "activity_file", "rangelock", "classify"),
)
WORSE_PERCENT = 5.0
MOST_PERCENT = 1000.0
TIMEOUT_S = 300.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/micro/run",
        description="Count the instructions a call of the engine's parts takes.",
        epilog="Exit status: 0 counted; 1 something is missing or failed; 2 wrong "
        "usage; 3 with --compare, a case got worse or was not compared; 130 "
        "interrupted.",
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="such as 'classify/*'; default: all"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an earlier run's JSON"
    )
    parser.add_argument(
        "--worse",
        type=float,
        default=WORSE_PERCENT,
        metavar="PERCENT",
        help=f"more than this is worse; default {WORSE_PERCENT:g}",
    )
    parser.add_argument(
        "--no-times", action="store_true", help="do not take the time as well"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"where to write the counts; default {RESULTS.relative_to(ROOT)}",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.worse <= MOST_PERCENT:  # nor is NaN
        parser.error(f"--worse must be 0 to {MOST_PERCENT:g}")
    return options


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return what it printed; raises CountError if it failed."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CountError(f"{words[0]} did not end within {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise CountError(f"{words[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def build() -> Path:
    """Compile what has changed and return the program."""
    if shutil.which("valgrind") is None:
        raise CountError("valgrind is not installed: apt-get install valgrind")
    core, _ = _build.targets()
    program = FOLDER / "micro"
    with _build.build_lock():
        FOLDER.mkdir(exist_ok=True)
        objects = [
            _build.compile_object(_build.CSRC / f"{x}.c", core.headers, verbose=False)
            for x in PARTS
        ]
        command: list[str | Path] = [*_build.compiler(), *_build.C_FLAGS]
        command += [*_build.warning_flags(), f"-I{_build.CSRC}"]
        command += [*_build.pkg_config("--cflags", "libisal"), HERE / "micro.c"]
        command += [*objects, *_build.pkg_config("--libs", "libisal")]
        run(*command, "-o", program)
    return program


def choose(program: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names of the cases that *patterns* match, in the program's order."""
    names = run(program, "--list").split()
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CountError(f"no case is named {pattern}: --list shows them")
    return [
        name
        for name in names
        if not patterns or any(fnmatch.fnmatchcase(name, x) for x in patterns)
    ]


def count(program: Path, cases: Sequence[str], *, times: bool) -> dict[str, Figures]:
    """Run *cases* under callgrind, and with *times* without it too."""
    with tempfile.TemporaryDirectory(prefix="dumps-", dir=FOLDER) as name:
        folder = Path(name)
        command = ("valgrind", "--tool=callgrind", "--instr-atstart=no")
        options = ("--callgrind-out-file=dump",)
        counted = run(*command, *options, program, *cases, cwd=folder)
        totals = counts.parse_dumps(x.read_text() for x in sorted(folder.iterdir()))
    timed = run(program, *cases) if times else ""
    return counts.figures(
        totals, counts.parse_lines(counted), counts.parse_lines(timed)
    )


def cpu_model() -> str:
    """Name the CPU: isa-l chooses its code by it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """Name the commit, where this is a checkout."""
    try:
        return run("git", "-C", ROOT, "describe", "--always", "--dirty").strip()
    except (CountError, OSError):
        return "unknown"


def about() -> dict[str, str]:
    """Describe what was counted, and with what."""
    return {
        "commit": commit(),
        "compiler": run(*_build.compiler(), "--version").splitlines()[0],
        "flags": " ".join([*_build.compiler()[1:], *_build.C_FLAGS]),
        "valgrind": run("valgrind", "--version").strip(),
        "libisal": run("pkg-config", "--modversion", "libisal").strip(),
        "cpu": cpu_model(),
    }


def table(cases: Mapping[str, Figures], changes: Sequence[Change] | None) -> Table:
    """Lay the figures out, with *changes* beside them if there are any."""
    shown = Table()
    shown.add_column("case", overflow="fold")  # a name that is cut is no name
    for title in ("instructions a call", "ns a call"):
        shown.add_column(title, justify="right")
    if changes is not None:
        shown.add_column("before", justify="right")
        shown.add_column("change", justify="right")
    by_name = {change.case: change for change in changes or ()}
    for name, one in cases.items():
        cells = [name, f"{one.instructions:,.1f}"]
        cells.append("" if one.ns is None else f"{one.ns:,.1f}")
        if changes is not None and name in by_name:
            change = by_name[name]
            cells += [f"{change.before:,.1f}", f"{change.percent:+.1f} %"]
        elif changes is not None:
            cells += ["", "new"]
        shown.add_row(*cells)
    return shown


def judge(
    console: Console,
    old: tuple[Mapping[str, Figures], Mapping[str, str]],
    cases: Mapping[str, Figures],
    facts: Mapping[str, str],
    limit_percent: float,
    *,
    whole: bool,
) -> bool:
    """
    Print what became worse and what it may be due to; tell whether none did.

    Args:
        whole: all cases were run: one that *old* alone has was not compared.
    """
    before, facts_before = old
    for tool, was, now in counts.differing_tools(facts_before, facts):
        console.print(
            f"Counted with another {tool}: {was!r} before, {now!r} now; the counts "
            "may differ for that alone.",
            style="yellow",
        )
    worse = [x for x in counts.compare(before, cases) if x.is_worse(limit_percent)]
    for change in worse:
        console.print(
            f"{change.case}: {change.percent:+.1f} %, more than {limit_percent:g} %",
            style="bold red",
        )
    absent = counts.uncompared(before, cases, whole=whole)
    for name in absent:
        console.print(f"{name}: not compared, as one run lacks it", style="bold red")
    return not worse and not absent


def check_output(path: Path) -> None:
    """Raise CountError if *path* could not be written, before all is counted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        why = error.strerror or str(error)
        raise CountError(f"{path} cannot be written: {why}; give --json") from None


def _console() -> Console:
    """Return a console, wide enough for the table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def run_cases(options: argparse.Namespace) -> int:
    """Count the cases, report, save; return the exit status."""
    old = counts.read(options.compare) if options.compare else None
    program = build()
    names = choose(program, options.cases)
    if options.list:
        put("\n".join(names) + "\n")
        return 0
    check_output(options.json)
    console = _console()
    facts = about()
    cases = count(program, names, times=not options.no_times)
    console.print(table(cases, counts.compare(old[0], cases) if old else None))
    console.print(
        f"Counted by callgrind, {facts['valgrind']}; {facts['compiler']}. The "
        "case `loop` is what every other one pays for the loop around it. "
        "Times are for information: they are of this minute on this machine."
    )
    options.json.write_text(counts.as_json(cases, facts))
    if old is None:
        return 0
    whole = not options.cases
    return 0 if judge(console, old, cases, facts, options.worse, whole=whole) else 3


def main() -> int:
    """Run the command line."""
    options = parse_arguments()
    return run_command(
        "micro", lambda: run_cases(options), (CountError, _build.BuildError)
    )


if __name__ == "__main__":
    sys.exit(main())
