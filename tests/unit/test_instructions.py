# SPDX-License-Identifier: BSD-3-Clause
"""
No part of a write costs more on a large volume, or among many writes.

callgrind counts the instructions of instructions.c, which is linked with the engine's
own objects. A count is the same on every run of one build, however busy the machine
is, so a bound on it is no timed test: it fails when the code does more.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import support

from nbd_mirror import _build

SOURCE = Path(__file__).with_name("instructions.c")
# The maps and the range lock, and what they call.
PARTS = (
    *("error", "crc32c", "fault", "file", "clock", "log_header"),
    *("bitmap", "dirty_map", "rangelock"),
)
TRIGGER = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.MULTILINE)
TOTALS = re.compile(r"^totals: (\d+)$", re.MULTILINE)
LAYERS = ("base", "logs")


def build(folder: Path) -> Path:
    """Link the program with the objects that the servers are made of."""
    core = _build.the_target()
    program = folder / "instructions"
    sources = [
        next(path for layer in LAYERS for path in (_build.CSRC / layer).glob(f"{x}.c"))
        for x in PARTS
    ]
    with _build.build_lock():
        objects = [
            _build.compile_object(path, core.headers, verbose=False) for path in sources
        ]
        command = [*_build.compiler(), *_build.C_FLAGS, *_build.WARNINGS, "-Werror"]
        command += [f"-I{_build.CSRC}", *_build.pkg_config("--cflags", "libisal")]
        command += [str(path) for path in (SOURCE, *objects)]
        command += [*_build.pkg_config("--libs", "libisal"), "-o", str(program)]
        subprocess.run(command, check=True)
    return program


def dumped(folder: Path) -> dict[str, int]:
    """Return the instructions of each batch; the dump at the end names none."""
    found = {}
    for path in folder.glob("dump*"):
        text = path.read_text()
        name, total = TRIGGER.search(text), TOTALS.search(text)
        if name and total:
            found[name[1]] = int(total[1])
    return found


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Give the instructions that a call of each case takes."""
    support.requires_program("valgrind")
    folder = tmp_path_factory.mktemp("instructions")
    program = build(folder)
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
    done = subprocess.run(
        [*command, "--callgrind-out-file=dump", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    totals = dumped(folder)
    calls = dict(line.split() for line in done.stdout.splitlines())
    assert totals.keys() == calls.keys()
    return {name: totals[name] / int(number) for name, number in calls.items()}


def test_an_empty_map_is_searched_by_its_pages(instructions: dict[str, float]) -> None:
    """16 TiB have 8,192 pages of bits: a few instructions each, not one a word."""
    pages = (16 << 40) // (64 << 10) // (8 * 4096)
    assert instructions["search/16TiB"] < 24 * pages
    assert instructions["search/1GiB"] < 100


def test_a_mark_costs_the_same_on_a_large_volume(
    instructions: dict[str, float],
) -> None:
    """Nothing on a write's way may grow with the volume."""
    large = instructions["mark/16TiB"]
    assert large == pytest.approx(instructions["mark/1GiB"], rel=0.01)
    assert large < 400


def test_a_range_costs_the_same_among_many(instructions: dict[str, float]) -> None:
    """A range without overlaps does not look at the others, however many there are."""
    many = instructions["lock/64"]
    assert many == pytest.approx(instructions["lock/1"], rel=0.1)
    assert many < 200
