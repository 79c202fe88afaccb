# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's options, its files, and what of the caller's it does not take on."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, machine, servers
from benchmarks.micro import micro
from benchmarks.model import BenchError, Claim, Measured, Row
from benchmarks.rows import FIO_ROWS

# --- options -------------------------------------------------------------


def parsed(*words: str) -> tuple[int, float, int]:
    """Return rounds, seconds and size."""
    options = bench.parse_arguments(words)
    return options.rounds, options.seconds, options.size


def test_what_is_given_wins_over_quick() -> None:
    """In any order; what is not given is quick's, or a whole run's."""
    assert (5, 1.5, 1024) == parsed()
    assert (2, 1.0, 256) == parsed("--quick")
    assert (1, 1.0, 64) == parsed("--quick", "--rounds", "1", "--size", "64")
    assert (2, 0.3, 256) == parsed("--seconds", "0.3", "--quick")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("seconds", x) for x in ("nan", "inf", "-inf", "0", "-1", "1e9", "x")),
        *(("rounds", x) for x in ("0", "-1", "1.5", "9999999")),
        *(("size", x) for x in ("63", "-64", "99999999999")),
    ],
)
def test_a_value_out_of_bounds_is_wrong_usage(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started, and with the option's name."""
    with pytest.raises(SystemExit) as ended:
        bench.parse_arguments([f"--{option}={value}"])
    assert ended.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [bench, micro])
def test_help_names_every_exit_status(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever calls it from a script need not read the source."""
    with pytest.raises(SystemExit):
        command.parse_arguments(["--help"])
    words = capsys.readouterr().out.split("Exit status:")[1].split()
    assert {"0", "1", "2", "3", "130"} <= set(words)


# --- files ---------------------------------------------------------------


def run_made_up(
    monkeypatch: pytest.MonkeyPatch, output: Path, row: Row, *words: str
) -> argparse.Namespace:
    """Make *row* the one there is; return the options."""
    options = bench.parse_arguments(["--output", str(output), *words])
    options.rows = [row]
    monkeypatch.setattr(bench, "check_machine", lambda _: None)
    return options


def made_up(value: float, spoil: Path | None = None) -> Row:
    """Return a row that measures *value*, and makes *spoil* a folder."""

    def measure(_: object) -> Measured:
        if spoil:
            spoil.mkdir()
        found = Measured(rounds=[{"raw": value}])
        found.add("x", value)
        return found

    return Row("made_up", "Made up", measure, (Claim("x", "of nothing"),))


def test_output_that_cannot_be_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after forty minutes."""
    (tmp_path / "file").touch()
    ran = tmp_path / "ran"
    row = made_up(1.0, spoil=ran)
    options = run_made_up(monkeypatch, tmp_path / "file" / "x", row)
    with pytest.raises(BenchError, match=r"file/x: .* cannot be saved.* --output"):
        bench.run(options)
    assert not ran.exists()


def test_a_file_that_cannot_be_replaced_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder can be written, and what lies in the file's place cannot."""
    (tmp_path / "partial.md").mkdir()
    options = run_made_up(monkeypatch, tmp_path, made_up(1.0))
    with pytest.raises(BenchError, match="cannot be saved"):
        bench.run(options)


def test_figures_are_shown_if_saving_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They were measured: the table comes, then the error."""
    row = made_up(1.25, spoil=tmp_path / "partial.json")
    with pytest.raises(BenchError, match="cannot be saved"):
        bench.run(run_made_up(monkeypatch, tmp_path, row))
    assert "1.25 (1.25 .. 1.25)" in capsys.readouterr().out


def test_what_is_no_number_is_null_in_json(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not NaN, which no other program reads; the other figures are kept."""
    options = run_made_up(monkeypatch, tmp_path, made_up(math.nan), "--json")
    assert bench.run(options) == 0
    texts = [(tmp_path / "partial.json").read_text(), capsys.readouterr().out]
    for text in texts:
        assert "NaN" not in text
        (row,) = json.loads(text)["rows"]
        assert [None] == row["claims"][0]["values"]
        assert [{"raw": None}] == row["rounds"]


# --- what it runs on -----------------------------------------------------


def test_commit_is_unknown_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What git says then is no commit."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.machine()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.machine()["commit"] == "unknown"


def test_callers_environment_changes_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row says which transport it measures; where programs are found stays."""
    monkeypatch.setenv("PATH", "/usr/bin")
    for name in ("NBDM_TRANSPORT", "NBDM_FAULT", "PYTHONPATH", "LIBNBD_DEBUG"):
        monkeypatch.setenv(name, "libnbd")
    found = servers.environment_of({"NBDM_TRANSPORT": "plain"})
    assert {"NBDM_TRANSPORT": "plain"} == {
        name: value
        for name, value in found.items()
        if name.startswith(("NBDM_", "PYTHON", "LIBNBD_"))
    }
    assert found["PATH"] == "/usr/bin"


def test_room_is_asked_for_as_many_images_as_any_row_has() -> None:
    """A claim for each peer, and each set-up but one copy has two images."""
    images = [
        2 + sum(1 if claim.key in ("one_copy", "proxy") else 2 for claim in row.claims)
        for row in FIO_ROWS
    ]
    assert max(images) == machine.IMAGES
