# SPDX-License-Identifier: BSD-3-Clause
"""`status`, as a user sees what a server answers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from unit.answers import a_local, a_remote, a_status

from nbd_mirror.base.errors import BusyError
from nbd_mirror.commands import cli_app, watch
from nbd_mirror.commands.ending import report
from nbd_mirror.commands.show import describe_resync, show_status
from nbd_mirror.volume.status import Resync, Status


def _shown(status: dict[str, Any], **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, **options)
    show_status(console, Status.model_validate(status), "pg")
    return out.getvalue()


def test_words_of_a_server_command_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Root may ask another user's server: nothing that is said is an escape."""
    words = "no\x1b[2J \x9b2J\x7f caf\xe9"
    status = a_status(a_remote(state=f"out{words}", reason=words, name=words))
    out = io.StringIO()
    Console(file=out, width=200).print(
        watch._picture(Status.model_validate(status), "pg")
    )
    report(BusyError(words, words))
    cli_app.say(f"policy {words}")
    said = capsys.readouterr()
    for shown in (_shown(status), out.getvalue(), said.err, said.out):
        assert "no?[2J ?2J? caf\xe9" in shown
        assert not set("\x1b\x9b\x7f") & set(shown)


@pytest.mark.parametrize("end", ["\n", "\x0b", "\x85", "\u2028", "\u2029"])
def test_words_of_a_server_are_no_line_of_ours(end: str) -> None:
    """Nor do they show a line in another order than it has."""
    said = f"gone{end}pg  in_sync{end}\u202e\u2066rm"
    status = a_status(a_remote(state="failed", reason=said, hint=said, name=said))
    out = io.StringIO()
    Console(file=out, width=200).print(
        watch._picture(Status.model_validate(status), "pg")
    )
    for shown in (_shown(status), out.getvalue()):
        assert "gone" in shown
        assert not [one for one in shown.splitlines() if one.startswith("pg  in_sync")]
        assert not set("\u202e\u2066") & set(shown)


def test_long_name_leaves_the_other_lines_readable() -> None:
    """One of 63 characters: all others begin where they would, and fit."""
    long = "x" * 63
    resync = {"done_bytes": 1, "total_bytes": 4, "bytes_per_s": 1, "eta_s": 3}
    status = a_status(
        a_remote(name="dr", state="resyncing", resync=resync),
        a_remote(name=long, state="out_of_sync"),
    )
    lines = _shown(status).splitlines()
    (dr,) = [line for line in lines if line.startswith("  dr ")]
    assert dr.index("resyncing") <= 20
    assert any(line.startswith(f"  {long}  out_of_sync ") for line in lines)
    out = io.StringIO()
    Console(file=out, width=80).print(
        watch._picture(Status.model_validate(status), "pg")
    )
    shown = out.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "out_of_sync" in shown
    assert "25.0%" in shown
    assert long in "".join(line[:16].strip() for line in shown.splitlines())


def test_status_shows_why_and_what_to_try_with_the_volumes_name() -> None:
    """Reason and hint stand under the state they belong to."""
    text = _shown(
        a_status(
            a_remote(
                state="out_of_sync",
                reason="Connection refused",
                hint="nbd-mirror resume CONFIG dr",
                dirty_bytes=3 << 20,
                last_error="timed out",
            )
        )
    )
    assert "out_of_sync" in text
    assert "3MiB dirty" in text
    assert "why: Connection refused" in text
    assert "try: nbd-mirror resume pg dr" in text
    assert "last error: timed out" in text
    assert "\x1b" not in text


def test_status_of_a_failed_local_disk_is_loud_and_said_once() -> None:
    """Reason, what it misses and both commands stand under it, and not twice."""
    local = a_local(
        state="failed",
        reason="Input/output error; the remotes serve reads and writes",
        hint="nbd-mirror resume CONFIG local",
        dirty_bytes=3 << 20,
        errors=1,
        since="2024-01-01T00:00:00+00:00",
    )
    text = _shown(
        a_status(
            a_remote(),
            local=local,
            state="failed",
            reason=f"local: {local['reason']}",
            hint=local["hint"],
        )
    )
    assert "/d.img, 3MiB dirty, 1 error, since 2024" in text
    assert text.count("why: Input/output error; the remotes serve") == 1
    assert text.count("try: nbd-mirror resume pg local") == 1


def test_status_counts_repaired_regions_of_a_disk_that_is_ok() -> None:
    """A disk that loses sectors is shown to, before it fails as a whole."""
    local = a_local(errors=2, repaired_regions=2, last_error="failed to read at 512")
    text = _shown(a_status(a_remote(), local=local))
    assert "/d.img, 2 errors, 2 regions repaired" in text
    assert "last error: failed to read at 512" in text


def test_status_on_a_terminal_is_coloured_unless_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NO_COLOR is respected."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in _shown(a_status(a_remote()), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in _shown(a_status(a_remote()), force_terminal=True)


def test_resync_is_never_called_complete_before_it_is() -> None:
    """One byte left of a terabyte is not 100 per cent."""
    resync = {
        "done_bytes": (1 << 40) - 1,
        "total_bytes": 1 << 40,
        "bytes_per_s": 1 << 20,
        "eta_s": 1.0,
        "growing": False,
    }
    assert describe_resync(Resync.model_validate(resync)).startswith("99.9%")
    resync["growing"] = True
    assert "growing" in describe_resync(Resync.model_validate(resync))
