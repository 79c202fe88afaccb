# SPDX-License-Identifier: BSD-3-Clause
"""
The benchmark: our mirror through both doors, one copy, and qemu's mirror.

All set-ups are served at once; in each round every workload is measured on every
set-up in turn, in an order that rotates from round to round, so that whatever else
the machine does falls on all of them alike.

Exit status: 0 measured; 1 something could not be run or is wrong; 3 with --check,
a target was missed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import report
from load import WORKLOADS, Figures, Workload, fill, measure
from rich.console import Console
from servers import KINDS, BenchError, SetUp

from nbd_mirror.errors import MirrorError

SHM = Path("/dev/shm")
RESULTS = Path(__file__).resolve().parent / "results" / "latest.json"
PROGRAMS = {
    "nbdkit": "nbdkit",
    "fio": "fio",
    "qemu-storage-daemon": "qemu-utils",
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Compare nbd_mirror with one copy and with qemu's mirror.",
        epilog="Exit status: 0 measured; 1 something failed to run; 3 with --check, "
        "a target was missed; 130 interrupted.",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of each measurement; default 3"
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="of each image, MiB; default 1024"
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of 1 second, images of 256 MiB"
    )
    parser.add_argument("--deep", action="store_true", help="also queue depth 64")
    parser.add_argument(
        "--check", action="store_true", help="exit 3 when a target is missed"
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help=f"default {_short(RESULTS)}"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.size = 2, 1.0, 256
    if options.rounds < 1 or options.seconds < 0.1 or options.size < 64:
        parser.error("at least 1 round, 0.1 seconds and 64 MiB")
    return options


def check_machine(size: int) -> None:
    """Raise BenchError if a program or the room for the images is missing."""
    for name, package in PROGRAMS.items():
        if shutil.which(name) is None:
            raise BenchError(f"{name} is not installed: apt-get install {package}")
    # Seven images, and room for logs. Memory counts too: tmpfs lives in it.
    needed = 7 * size + (256 << 20)
    if shutil.disk_usage(SHM).free < needed or _available_memory() < needed * 5 // 4:
        raise BenchError(
            f"the images need {needed >> 20} MiB in {SHM}, and memory for them; "
            "use a smaller --size"
        )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


@contextlib.contextmanager
def served(size: int, console: Console) -> Iterator[list[SetUp]]:
    """Start every set-up and write its disk once; end and remove all afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="nbd-mirror-bench.", dir=SHM))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_ignore_interrupts)  # whatever comes now, it is cleaned up
        set_ups = []
        for kind in KINDS:
            console.print(f"starting {kind.title}")
            set_up = kind(folder, size)
            stack.callback(set_up.stop)
            set_up.start()
            fill(set_up.uri, set_up.folder, size)
            set_up.check()
            set_ups.append(set_up)
        yield set_ups


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def one_round(
    number: int,
    set_ups: Sequence[SetUp],
    workloads: Sequence[Workload],
    options: argparse.Namespace,
    console: Console,
) -> dict[str, dict[str, Figures]]:
    """Measure every workload on every set-up, beginning with another one each time."""
    figures: dict[str, dict[str, Figures]] = {}
    for index, work in enumerate(workloads):
        first = (number + index) % len(set_ups)
        by_set_up = {}
        for set_up in [*set_ups[first:], *set_ups[:first]]:
            by_set_up[set_up.key] = measure(
                set_up.uri, set_up.folder, work, set_up.size, options.seconds
            )
            set_up.check()
        figures[work.key] = by_set_up
        rates = "".join(f"{by_set_up[one.key].iops:>12,.0f}" for one in set_ups)
        console.print(f"{number + 1}/{options.rounds}  {work.title:<14}{rates}")
    return figures


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure, compare the images, report; return the exit status."""
    size = options.size << 20
    check_machine(size)
    workloads = [work for work in WORKLOADS if options.deep or not work.optional]
    about = report.machine()
    with served(size, console) as set_ups:
        names = "".join(f"{one.key:>12}" for one in set_ups)
        console.print(f"\n{'requests/s':<19}{names}")
        rounds = [
            one_round(number, set_ups, workloads, options, console)
            for number in range(options.rounds)
        ]
        for set_up in set_ups:
            set_up.stop()
            if not set_up.images_equal():
                raise BenchError(f"{set_up.title}: its images differ: no mirror")
    console.print()
    report.show(console, rounds, workloads, about)
    answer = report.as_json(rounds, workloads, about)
    answer["options"] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "size": size,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(answer, indent=2) + "\n")
    console.print(f"\nAll raw figures are in {_short(options.json.resolve())}.")
    missed = not all(target["met"] for target in answer["targets"])
    return 3 if missed and options.check else 0


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    console = Console(highlight=False)
    try:
        return run(options, console)
    except (BenchError, MirrorError, OSError) as error:
        print(f"benchmarks/run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks/run: interrupted; all is cleaned up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
