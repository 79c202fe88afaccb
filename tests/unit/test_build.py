# SPDX-License-Identifier: BSD-3-Clause
"""The build of the C code: what is compiled again, and what becomes of warnings."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd_mirror import _build

# The compiler sees the first one only when it optimizes.
UNINITIALIZED = "int f (int x);\nint f (int x) { int y; if (x) y = x; return y; }\n"
SHADOW = "int f (int x);\nint f (int x) { { int x = 1; return x; } }\n"
CLEAN = "int f (int x);\nint f (int x) { return x; }\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a source tree for the build; its C file is still to be written."""
    csrc = tmp_path / "csrc"
    (csrc / "doors").mkdir(parents=True)
    (csrc / "nbdm.h").write_text("")
    for name in ("CI", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_build, "ROOT", tmp_path)
    monkeypatch.setattr(_build, "CSRC", csrc)
    return csrc / "doors" / "plugin.c"


@pytest.mark.parametrize(
    ("code", "flag"),
    [(UNINITIALIZED, "-Wmaybe-uninitialized"), (SHADOW, "-Wshadow")],
    ids=["uninitialized", "shadow"],
)
def test_a_warning_is_shown_until_it_is_gone(
    tree: Path, code: str, flag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An earlier build compiled the object with the warning: it is shown again."""
    tree.write_text(code)
    for _ in range(2):
        assert _build.main(["--warnings"]) == 1
        assert flag in capfd.readouterr().err
    tree.write_text(CLEAN)
    assert _build.main(["--warnings"]) == 0


def test_an_unchanged_file_is_not_compiled_again(tree: Path) -> None:
    """A file that has changed is compiled, and each file whose header has changed."""
    tree.write_text(CLEAN)
    out = tree.parents[2] / "build" / "plugin.o"

    def made() -> int:
        _build.check_warnings()
        return out.stat().st_mtime_ns

    first = made()
    assert made() == first
    tree.write_text(CLEAN + CLEAN.replace("f (", "g ("))
    second = made()
    assert second > first
    (tree.parents[1] / "nbdm.h").write_text("/* other */\n")
    assert made() > second
