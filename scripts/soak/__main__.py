# SPDX-License-Identifier: BSD-3-Clause
"""
Run random faults against a real site, and judge every block, for as long as wanted.

Each episode makes a volume with one or two secondaries, or one of nodes (--nodes),
runs clients against it, breaks and repairs things, and ends in sync with equal disks.
The register checker judges everything that the clients sent and saw. The same seed
gives the same episodes: the same requests of each client and the same faults. Their
timing depends on the machine, so a violation may need several repeats.

Exit status: 0 nothing was found; 1 a violation, its folder is kept; 2 wrong usage, or a
volume that the product does not take; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from pathlib import Path

import pytest
import support
from rich.console import Console
from rich.text import Text

from ..stage import interruptible
from .field import Field
from .load import ViolationError
from .nemesis import Nemesis
from .nodes.episode import play
from .nodes.hosts import NAMES, possible
from .nodes.plan import NodesPlan
from .nodes.sabotage import NODE_SABOTAGES
from .nodes.volume import RefusedError, Volume
from .plan import Plan
from .sabotage import SABOTAGES, sabotage

DOORS = ("direct", "python")


class Soak:
    """The run: its options, its counts, its terminal."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counts: Counter[str] = Counter()
        self.episodes = 0
        self.began = time.monotonic()
        self._console = Console(stderr=options.json, highlight=False)
        self._act = ""
        self._status = self._console.status("") if self._console.is_terminal else None
        self._field: Field | Volume | None = None
        self._shown = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def tick(self) -> None:
        """Update the live line, a few times a second."""
        now = time.monotonic()
        if self._status is None or self._field is None or now - self._shown < 0.2:
            return
        self._shown = now
        checker = self._field.load.checker
        written = self.counts["writes answered"] + checker.answered
        checked = self.counts["blocks checked"] + checker.checked
        self._status.update(
            f"{self.elapsed_s:.0f} s, episode {self._field.plan.name.split()[-1]}, "
            f"{written:,} writes answered, {checked:,} blocks checked: {self._act}"
        )

    def told(self, act: str) -> None:
        """Store what the nemesis does."""
        self._act = act
        if self.options.verbose:
            self.say(f"  {self.elapsed_s:7.1f} s  {act}", "dim")

    def run(self) -> int:
        """Run episodes until the time is over; return the exit status."""
        options = self.options
        first = 0 if options.episode is None else options.episode
        self.say(
            f"soak: seed {options.seed}, {options.minutes:g} min, "
            + (
                f"{options.nodes} nodes"
                if options.nodes
                else f"doors {', '.join(options.doors)}"
            )
        )
        if self._status is not None:
            self._status.start()
        try:
            number = first
            # Each door gets its turn, however short the time.
            alone = options.episode is not None or options.nodes
            least = 1 if alone else len(options.doors)
            while self.episodes < least or (
                options.episode is None and self.elapsed_s < options.minutes * 60
            ):
                if not self._episode(number):
                    return 1
                number += 1
                self.episodes += 1
        finally:
            if self._status is not None:
                self._status.stop()
        return 0

    def _episode(self, number: int) -> bool:
        folder = Path(tempfile.mkdtemp(prefix="nbdm-soak-"))
        began, keep = time.monotonic(), True
        options = self.options
        plan: Plan | NodesPlan = Plan(options.seed, number, options.doors)
        if options.nodes:
            plan = NodesPlan(options.seed, number, options.nodes)
        try:
            self._play(plan, folder)
            keep = options.keep
        except (ViolationError, AssertionError, pytest.fail.Exception) as error:
            self._violation(plan, folder, error)
            return False
        except RefusedError:
            keep = False
            raise
        # a bug of this tool: reported apart, and kept as well
        except Exception as error:
            error.add_note(traceback.format_exc())
            self._violation(plan, folder, error)
            raise
        except KeyboardInterrupt:
            keep = options.keep
            raise
        finally:
            self._field = None
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        kept = f", kept in {folder}" if keep else ""
        self.say(f"ok  {plan}: {time.monotonic() - began:.0f} s{kept}")
        return True

    def _play(self, plan: Plan | NodesPlan, folder: Path) -> None:
        """Play an episode; all its processes have ended then."""
        options = self.options
        if isinstance(plan, NodesPlan):
            volume = Volume(folder, plan, self.counts, self.tick)
            self._field = volume
            try:
                play(volume, self.told, options.acts, options.sabotage)
            finally:
                volume.close()
            return
        field = Field(folder, plan, self.counts, self.tick)
        self._field = field
        try:
            field.bring_up()
            if options.sabotage:
                sabotage(options.sabotage, field)
            else:
                Nemesis(field, self.told, options.acts).play()
            field.load.pause(field.watch)
            field.wait_in_sync()
            field.stop_primary()
        finally:
            field.close()

    def _violation(
        self, plan: Plan | NodesPlan, folder: Path, error: BaseException
    ) -> None:
        """Print it, and keep it with the images, the state and the logs."""
        doors = ",".join(self.options.doors)
        again = (
            f"scripts/soak/run --seed {self.options.seed} "
            f"--episode {plan.name.split()[-1]} "
            + (
                f"--nodes {plan.nodes}"
                if isinstance(plan, NodesPlan)
                else f"--doors {doors}"
            )
        )
        report = f"{plan}\n{error}\n\nrepeat: {again}\n"
        (folder / "violation.txt").write_text(report)
        self.say(f"VIOLATION in {plan}", "bold red")
        self.say(str(error))
        self.say(f"images, state, logs and this report are kept in {folder}")
        self.say(f"repeat: {again}   (the timing will differ)", "bold")

    def summary(self, status: int) -> None:
        """Print the totals."""
        totals = {
            "seed": self.options.seed,
            "doors": self.options.doors,
            "episodes": self.episodes,
            "seconds": round(self.elapsed_s),
            "violations": int(status == 1),
            **dict(sorted(self.counts.items())),
        }
        if self.options.json:
            print(json.dumps({k.replace(" ", "_"): v for k, v in totals.items()}))
            return
        for name, value in totals.items():
            text = f"{value:,}" if isinstance(value, int) and name != "seed" else value
            self.say(f"  {name:28} {text}")


def doors(text: str) -> list[str]:
    """Read the option --doors."""
    names = text.split(",")
    if not set(names) <= set(DOORS):
        raise argparse.ArgumentTypeError(f"of {', '.join(DOORS)}")
    return names


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak/run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=5.0,
        help="how long, and an episode a door at least; 5 unless told otherwise",
    )
    add("--seed", type=int, help="of all choices; a fresh one unless told otherwise")
    add("--episode", type=int, help="run this one episode alone")
    add("--doors", type=doors, default=list(DOORS), help="direct,python: in turn")
    add(
        "--nodes",
        type=int,
        choices=range(2, len(NAMES) + 1),
        help="a volume of so many nodes, each in a network namespace; needs root",
    )
    add(
        "--acts",
        type=lambda text: text.split(","),
        help="only these, by their names in scripts/soak/nemesis.py, acts*.py, nodes/",
    )
    add("--keep", action="store_true", help="keep every episode's folder")
    add("--json", action="store_true", help="print the totals as JSON, all else aside")
    add("--verbose", action="store_true", help="print each act")
    add(
        "--sabotage",
        choices=sorted([*SABOTAGES, *NODE_SABOTAGES]),
        help="spoil a disk or a log behind the mirror's back: must end in a violation",
    )
    options = parser.parse_args()
    if options.sabotage and bool(options.nodes) != (options.sabotage in NODE_SABOTAGES):
        parser.error("--sabotage nodes-... needs --nodes, and no other may have it")
    if options.nodes and not possible():
        parser.error("--nodes needs root, ip and nsenter")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def prepare() -> None:
    """Make started programs findable, reapable and independent of the caller."""
    interruptible()
    os.environ.setdefault(support.MARKER, uuid.uuid4().hex)
    for name in ("NBD_MIRROR_CONFIG_DIR", "NBDM_FAULT", "PYTHONPATH"):
        os.environ.pop(name, None)
    support.become_subreaper()


def main() -> int:
    """Run it."""
    options = parse()
    prepare()
    soak = Soak(options)
    try:
        status = soak.run()
    except RefusedError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        print("soak: interrupted; all is cleaned up", file=sys.stderr)
        status = 130
    soak.summary(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
