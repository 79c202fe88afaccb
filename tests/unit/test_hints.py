# SPDX-License-Identifier: BSD-3-Clause
"""The commands in hints: each can be pasted, and does what the hint says."""

from __future__ import annotations

import os
import subprocess

import pytest

from nbd_mirror.base.hints import Asked, quote
from nbd_mirror.commands.asked import name_volume
from nbd_mirror.commands.output import plain
from nbd_mirror.volume.config import CONFIG_DIR_ENV

OPTIONS = {"--door": "--door python", "--force": "--force"}
ASKED = Asked("'a b.toml'", "'/x/a b.toml'", "serve", OPTIONS)


@pytest.mark.parametrize(
    ("hint", "named"),
    [
        ("nbd-mirror stop CONFIG", "nbd-mirror stop 'a b.toml'"),
        (
            "sudo -u x nbd-mirror serve CONFIG\nor more",
            "sudo -u x nbd-mirror serve '/x/a b.toml' --door python --force\nor more",
        ),
        (
            "nbd-mirror serve CONFIG --force (all)",
            "nbd-mirror serve 'a b.toml' --door python --force (all)",
        ),
        (
            "nbd-mirror serve CONFIG --without-local, then",
            "nbd-mirror serve 'a b.toml' --door python --without-local, then",
        ),
        (
            "nbd-mirror serve CONFIG --door python, or",
            "nbd-mirror serve 'a b.toml' --force --door python, or",
        ),
        (
            "nbd-mirror resume CONFIG local or nbd-mirror invalidate CONFIG local",
            "nbd-mirror resume 'a b.toml' local or nbd-mirror invalidate 'a b.toml' "
            "local",
        ),
        ("rm /CONFIG/CONFIG CONFIG", "rm /CONFIG/CONFIG CONFIG"),
        ("nbd-mirror serve CONFIG.toml", "nbd-mirror serve CONFIG.toml"),
    ],
)
def test_hint_repeats_what_the_user_asked_for(hint: str, named: str) -> None:
    """The volume and the user's options, and no letter of a path is changed."""
    assert ASKED.name(hint) == named


@pytest.mark.parametrize(
    ("hint", "named"),
    [
        ("nbd-mirror promote CONFIG", "nbd-mirror promote pg --node alpha"),
        (
            "nbd-mirror switchover CONFIG (on beta)",
            "nbd-mirror switchover pg --node beta (on beta)",
        ),
        (
            "nbd-mirror switchover CONFIG (on the primary)",
            "nbd-mirror switchover pg (on the primary)",
        ),
    ],
)
def test_hint_for_another_host_names_its_node(hint: str, named: str) -> None:
    """A --node of this host would be refused there, or do something else."""
    asked = Asked("pg --node alpha", "pg --node alpha", "status", node=" --node alpha")
    assert asked.name(hint) == named


def test_words_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is started prints the same hints; garbled words are none."""
    assert Asked.load() is None
    for name, value in ASKED.dump().items():
        monkeypatch.setenv(name, value)
        assert Asked.load() == ASKED
        for wrong in ("", "[", "[]", "1", '{"config": 1, "x": 2}'):
            monkeypatch.setenv(name, wrong)
            assert Asked.load() is None


def test_sudo_gets_a_name_that_needs_no_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes the caller's variables away, and with them where volumes are found."""
    monkeypatch.setenv(CONFIG_DIR_ENV, "/my volumes")
    hint = "sudo nbd-mirror attach CONFIG, nbd-mirror attach CONFIG"
    path = "'/my volumes/pg.toml'"
    named = f"sudo nbd-mirror attach {path}, nbd-mirror attach pg"
    assert named == name_volume(hint, "pg")


@pytest.mark.parametrize(
    "word",
    [
        b"plain",
        b"a b'c\"d\\e",
        b"\xff/caf\xc3\xa9",
        b"line\nend\ttab",
        b"'\xfe\\1",
        b"\x1b[31m",
        "\u202eleft".encode(),
        "no\u00a0break".encode(),
        b"",
    ],
)
def test_word_that_no_terminal_shows_can_be_pasted(word: bytes) -> None:
    """A shell reads the same bytes from what is printed, in one line."""
    quoted = quote(os.fsdecode(word))
    assert quoted.isprintable()
    assert plain(quoted) == quoted
    done = subprocess.run(
        ["/bin/bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True
    )
    assert done.stdout == word
