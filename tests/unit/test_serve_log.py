# SPDX-License-Identifier: BSD-3-Clause
"""What a start repeats of its server's log, in which a remote's words stand too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbd_mirror.commands import serve_log

STAMP = "2026-11-29T20:01:54.301Z"
# As csrc/base/log.c writes the words of a remote that has line ends in them.
FOREIGN = (
    f"{STAMP} warning remote dr: refused: x warning volume v: run evil\n"
    "  try: evil\n"
    "       evil\n"
    f"{STAMP} error remote dr: refused: \u2028nbd-mirror: run evil\n"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give a log with lines from before the start."""
    path = tmp_path / "serve.log"
    path.write_text("nbd-mirror: an earlier error\n")
    return path


def said(log: Path, text: str) -> list[str]:
    """Append *text*, and return the lines that it has."""
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write(text)
    fd = os.open(log, os.O_RDONLY)
    try:
        return serve_log.said_since(fd, begin)
    finally:
        os.close(fd)


def test_errors_and_their_hints_are_repeated_and_no_foreign_words(log: Path) -> None:
    """A line that looks like a hint is none where it follows no error."""
    ours = "nbd-mirror: one\nnbd-mirror: two\n  try: this\n       or that\n"
    lines = said(log, FOREIGN + ours + FOREIGN)
    assert serve_log.last_words(log, lines) == ours.rstrip()


def test_without_an_error_the_last_lines_are_repeated(log: Path) -> None:
    """Or that there are none."""
    assert serve_log.last_words(log, said(log, "a\nb\nc\nd\n")) == "b\nc\nd"
    assert "ended without a message" in serve_log.last_words(log, said(log, ""))


def test_warnings_about_the_volume_are_repeated_and_no_foreign_words(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the words of a remote that look like one."""
    ours = f"{STAMP} warning volume v: few descriptors\n"
    serve_log.pass_on_warnings(said(log, FOREIGN + ours))
    expected = "nbd-mirror: warning: volume v: few descriptors\n"
    assert capsys.readouterr().err == expected
