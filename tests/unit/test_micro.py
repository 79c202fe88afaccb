# SPDX-License-Identifier: BSD-3-Clause
"""
The micro-benchmarks: how counts are read and judged, and some that are taken.

What is counted is the same on every run of one build, however busy the machine is,
so bounds on it are no timed test: they fail when the code does more.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support
from rich.console import Console

from benchmarks.micro import counts, micro

BASELINE = support.ROOT / "benchmarks" / "micro" / "baseline.json"


DUMP = """# callgrind format
part: 1
desc: Trigger: Client Request: bitmap_set/1GiB/clear

positions: line
events: Ir
summary: 0
fn=(12) change
153 32768
totals: 688161
"""


def some(**instructions: float) -> dict[str, object]:
    """Return figures with these counts."""
    return {name: counts.Figures(value) for name, value in instructions.items()}


class TestParsing:
    """What valgrind and micro print."""

    def test_dump_gives_the_case_and_its_total(self) -> None:
        """The dump at the end, which has no trigger of ours, is passed over."""
        last = "desc: Trigger: Program termination\ntotals: 7\n"
        assert counts.parse_dumps([DUMP, last]) == {"bitmap_set/1GiB/clear": 688161}

    @pytest.mark.parametrize(
        "texts", [[DUMP, DUMP], [DUMP.replace("totals", "total")]], ids=["twice", "cut"]
    )
    def test_dump_that_is_not_whole_is_refused(self, texts: list[str]) -> None:
        """A case counted twice, or without a total, is no count."""
        with pytest.raises(counts.CountError):
            counts.parse_dumps(texts)

    def test_line_of_another_form_is_refused(self) -> None:
        """What micro did not print is not guessed at."""
        assert counts.parse_lines("a/1 512 1.5\n") == {"a/1": (512, 1.5)}
        for line in ("a 512", "a many 1.5", "a 1 2 3"):
            with pytest.raises(counts.CountError):
                counts.parse_lines(line)

    def test_case_that_ran_uncounted_is_an_error(self) -> None:
        """A count that is not there must not look like a cheap call."""
        ran = {"a": (10, 0.0), "b": (10, 0.0)}
        with pytest.raises(counts.CountError, match="nothing of b"):
            counts.figures({"a": 50}, ran, {})
        both = counts.figures({"a": 50, "b": 70}, ran, {"a": (10, 1.5)})
        assert both == {"a": counts.Figures(5.0, 1.5), "b": counts.Figures(7.0)}


class TestFiles:
    """The JSON that runs are compared by."""

    def test_what_is_written_is_read(self) -> None:
        """With and without times."""
        cases = {"a": counts.Figures(5.25, 1.5), "b": counts.Figures(7.0)}
        about = {"compiler": "gcc 12", "cpu": "some"}
        assert counts.from_json(counts.as_json(cases, about)) == (cases, about)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[]", "{}", '{"about": {}, "cases": {"a": {}}}'),
            *(
                f'{{"about": {{}}, "cases": {{"a": {{"instructions": {value}}}}}}}'
                for value in ("0", "-1", "NaN", "Infinity", "1" + "0" * 400, '"nan"')
            ),
            "[" * 100_000,
        ],
        ids=lambda text: text[:50],
    )
    def test_any_other_file_is_refused(self, text: str) -> None:
        """Compared with nothing, nothing would be worse."""
        with pytest.raises(counts.CountError):
            counts.from_json(text)

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{}", b""])
    def test_what_is_wrong_is_said_with_the_files_name(
        self, content: bytes, tmp_path: Path
    ) -> None:
        """Also of a file that is no text."""
        file = tmp_path / "other.json"
        file.write_bytes(content)
        with pytest.raises(counts.CountError, match=r"other\.json: no counts of ours"):
            counts.read(file)

    def test_baseline_names_what_it_was_counted_with(self) -> None:
        """The committed counts are readable, and say by what they were made."""
        cases, about = counts.from_json(BASELINE.read_text())
        assert set(counts.TOOLS) <= about.keys()
        assert len(cases) > 40


class TestComparing:
    """What counts as worse."""

    def test_only_more_than_the_limit_is_worse(self) -> None:
        """Better is never worse, and the limit itself is not."""
        before = some(up=100, same=100, down=100, gone=100)
        after = some(up=106, same=105, down=10, new=1000)
        changes = counts.compare(before, after)
        assert [x.case for x in changes] == ["up", "same", "down"]
        assert [x.is_worse(5.0) for x in changes] == [True, False, False]
        assert round(changes[0].percent, 6) == 6

    def test_what_is_not_compared_is_no_pass(self) -> None:
        """A whole run lacks what is gone; of some cases one at least is compared."""
        before = some(a=100, b=100)
        assert counts.uncompared(before, some(a=1, c=1), whole=True) == ["b"]
        assert counts.uncompared(before, some(a=1, b=1, c=1), whole=True) == []
        assert counts.uncompared(before, some(a=1, c=1), whole=False) == []
        assert counts.uncompared(before, some(c=1), whole=False) == ["c"]

    def test_another_compiler_is_named(self) -> None:
        """A count depends on it as much as on our code."""
        before = dict.fromkeys(counts.TOOLS, "x") | {"commit": "1"}
        after = before | {"compiler": "y", "commit": "2"}
        assert counts.differing_tools(before, after) == [("compiler", "x", "y")]


# --- counting -----------------------------------------------------------------

CASES = ("bitmap_next_set/*/empty", "dirty_map_mark/*/1", "rangelock_newest/*")


def count(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the benchmark, without its set-up."""
    command = [sys.executable, "-m", "benchmarks.micro.micro", "--no-times", *words]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=support.ROOT,
        timeout=100,
        check=False,
    )


def instructions(file: Path) -> dict[str, float]:
    """Return the counts in a file."""
    return {
        name: one.instructions
        for name, one in counts.from_json(file.read_text())[0].items()
    }


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the counts of some cases."""
    support.requires_program("valgrind")
    file = tmp_path_factory.mktemp("micro") / "first.json"
    done = count(*CASES, "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    return file


def test_counts_are_the_same_twice(counted: Path) -> None:
    """The same program again differs by less than half a percent, in no case more."""
    second = counted.with_name("second.json")
    done = count(*CASES, "--json", second, "--compare", counted, "--worse", "0.5")
    assert done.returncode == 0, done.stdout
    before, after = instructions(counted), instructions(second)
    assert before.keys() == after.keys()
    assert len(before) == 7
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=0.005), name


def test_a_case_that_got_worse_is_named_and_fails(counted: Path) -> None:
    """Against counts a tenth lower one case is worse, and says so."""
    lower = json.loads(counted.read_text())
    lower["cases"]["dirty_map_mark/16TiB/1"]["instructions"] *= 0.9
    file = counted.with_name("lower.json")
    file.write_text(json.dumps(lower))
    done = count(*CASES, "--json", counted.with_name("third.json"), "--compare", file)
    assert done.returncode == 3
    (line,) = [x for x in done.stdout.splitlines() if "more than 5 %" in x]
    assert line.startswith("dirty_map_mark/16TiB/1: +11.1 %")


def test_an_empty_map_is_searched_by_its_pages(counted: Path) -> None:
    """16 TiB have 8,192 pages of bits: a few instructions each, not one a word."""
    pages = (16 << 40) // (64 << 10) // (8 * 4096)
    found = instructions(counted)
    assert found["bitmap_next_set/16TiB/empty"] < 24 * pages
    assert found["bitmap_next_set/1GiB/empty"] < 100


def test_a_mark_costs_the_same_on_a_large_volume(counted: Path) -> None:
    """Nothing on a write's way may grow with the volume."""
    found = instructions(counted)
    assert found["dirty_map_mark/16TiB/1"] == pytest.approx(
        found["dirty_map_mark/1GiB/1"], rel=0.01
    )
    assert found["dirty_map_mark/16TiB/1"] < 400


def test_a_range_costs_the_same_among_many(counted: Path) -> None:
    """Who overlaps nobody does not look at the others, however many there are."""
    found = instructions(counted)
    assert found["rangelock_newest/64"] == pytest.approx(
        found["rangelock_newest/1"], rel=0.1
    )
    assert found["rangelock_newest/64"] < 200


def test_a_case_that_is_gone_fails(counted: Path) -> None:
    """Run by another name than the earlier run's, and compared with nothing."""
    file = counted.with_name("renamed.json")
    file.write_text(counted.read_text().replace("dirty_map_mark/1GiB/1", "gone"))
    words = ("--json", counted.with_name("fourth.json"), "--compare", file)
    done = count("dirty_map_mark/1GiB/1", *words)
    assert done.returncode == 3
    assert "dirty_map_mark/1GiB/1: not compared" in done.stdout


@pytest.mark.parametrize("percent", ["nan", "inf", "-1", "x"])
def test_a_limit_that_is_none_is_wrong_usage(percent: str) -> None:
    """Nothing is worse than NaN."""
    done = count(f"--worse={percent}")
    assert done.returncode == 2
    assert "--worse" in done.stderr


def test_a_name_is_whole_in_a_pipe() -> None:
    """The table is not cut to a terminal that is not there."""
    name = "dirty_map_mark/16TiB/" + "x" * 60
    console = Console(file=io.StringIO(), width=80)
    console.print(micro.table(some(**{name: 1.0}), []))
    cells = re.findall(
        "\N{BOX DRAWINGS LIGHT VERTICAL} (\\S+)", console.file.getvalue()
    )
    assert name in "".join(cells)


def test_counts_that_cannot_be_written_are_said_first(tmp_path: Path) -> None:
    """Not after all was counted."""
    (tmp_path / "file").touch()
    done = count("loop", "--json", tmp_path / "file" / "x.json")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "x.json cannot be written" in line
    assert done.stdout == ""


def test_wrong_usage_is_said(tmp_path: Path) -> None:
    """An unknown case, and a file that holds no counts, are errors."""
    support.requires_program("valgrind")
    done = count("no_such/*", "--json", tmp_path / "x.json")
    assert done.returncode == 1
    assert "no case is named no_such/*" in done.stderr
    (tmp_path / "other.json").write_text("{}")
    done = count("loop", "--compare", tmp_path / "other.json")
    assert done.returncode == 1
    assert "no counts of ours" in done.stderr
