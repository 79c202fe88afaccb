# SPDX-License-Identifier: BSD-3-Clause
"""Read the documents: sections, tables and fenced blocks of their Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

__all__ = [
    "BLOCK",
    "DESIGN",
    "DOCS",
    "FORMAT",
    "MANUAL",
    "PAGES",
    "README",
    "UNITS",
    "blocks",
    "by_name",
    "code_names",
    "rows",
    "section",
]

README = ROOT / "README.md"
DOCS = ROOT / "docs"
MANUAL = DOCS / "manual.md"
FORMAT = DOCS / "FORMAT.md"
DESIGN = DOCS / "design.md"
PAGES = sorted([README, *DOCS.glob("*.md")])
UNITS = sorted(DOCS.glob("*.service"))

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def by_name(path: Path) -> str:
    """Name a parametrized test after the file."""
    return path.name


def section(page: Path, title: str) -> str:
    """Return what stands below the heading *title*, to the next of its level."""
    text = page.read_text()
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"{page.name} has no section {title}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> Iterator[list[str]]:
    """Give the cells of every table row below its head."""
    body = False
    for line in text.splitlines():
        if not line.startswith("|"):
            body = False
        elif re.fullmatch(r"[|-]+", line):
            body = True
        elif body:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def code_names(cell: str) -> list[str]:
    """Return what a cell has between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(page: Path, kind: str) -> list[str]:
    """Return the fenced blocks of one kind."""
    return [text for what, text in BLOCK.findall(page.read_text()) if what == kind]
