# SPDX-License-Identifier: BSD-3-Clause
"""`wait` and `watch`, and the status they ask of a server of any version."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from unit.answers import a_local, a_remote, a_status
from unit.volumes import make_file

from nbd_mirror.base.errors import (
    ConfigError,
    FormatError,
    MetadataFailedError,
    NotRunningError,
    OutputError,
    WaitTimeoutError,
)
from nbd_mirror.commands import watch
from nbd_mirror.commands.show import show_status
from nbd_mirror.server.control_server import ControlServer
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.control import control_path
from nbd_mirror.volume.status import Status


@pytest.fixture
def config(tmp_path: Path) -> VolumeConfig:
    """Give a volume; its state directory exists."""
    return load(make_file(tmp_path))


def _served(config: VolumeConfig, *answers: dict[str, Any]) -> ControlServer:
    """Answer status with each of *answers* in turn, then with the last one."""
    left = list(answers)

    def handler(command: str, _: dict[str, Any]) -> object:
        assert command == "status"
        return left.pop(0) if len(left) > 1 else left[0]

    return ControlServer(control_path(config.state_dir), handler)


def _wait(config: VolumeConfig, timeout_s: float, remote: str | None = None) -> None:
    watch.wait_for(config, "in_sync", timeout_s, remote, lambda _: None)


def test_wait_ends_when_all_remotes_have_the_state(config: VolumeConfig) -> None:
    """It asks again until all are there."""
    later = a_remote(state="resyncing", name="b")
    answers = [a_status(a_remote(), later), a_status(a_remote(), a_remote(name="b"))]
    with _served(config, *answers):
        _wait(config, 10)


def test_wait_for_one_remote_does_not_mind_the_others(config: VolumeConfig) -> None:
    """--remote looks at that one alone."""
    with _served(config, a_status(a_remote(), a_remote(state="failed", name="b"))):
        _wait(config, 10, "dr")


def test_wait_for_all_waits_for_the_local_disk_too(config: VolumeConfig) -> None:
    """Remotes that are in sync are not enough while local is copied back."""
    local = a_local(state="resyncing", reason="1 MiB left")
    answers = [a_status(a_remote(), local=local), a_status(a_remote())]
    with _served(config, *answers):
        _wait(config, 10)
    with (
        _served(config, answers[0]),
        pytest.raises(WaitTimeoutError, match="local is resyncing: 1 MiB left"),
    ):
        _wait(config, 0.2)


def test_wait_for_the_local_disk_alone(config: VolumeConfig) -> None:
    """--remote local does not mind the remotes; one remote does not mind local."""
    failed = a_local(state="failed", reason="EIO")
    with _served(config, a_status(a_remote(state="out_of_sync"))):
        _wait(config, 10, "local")
    with _served(config, a_status(a_remote(), local=failed)):
        _wait(config, 10, "dr")
        with pytest.raises(WaitTimeoutError, match="local is failed: EIO"):
            _wait(config, 0.2, "local")


@pytest.mark.parametrize("remote", [None, "dr"])
def test_wait_for_a_remote_that_the_server_does_not_know_is_refused(
    config: VolumeConfig, remote: str | None
) -> None:
    """The file was changed under the server: what it lacks is in no state at all."""
    with (
        _served(config, a_status(a_remote(name="b"))),
        pytest.raises(ConfigError, match=r"does not mirror to dr: .* it has: b"),
    ):
        _wait(config, 10, remote)


def test_wait_over_its_time_says_state_reason_and_hint(config: VolumeConfig) -> None:
    """A `wait` that times out says why."""
    remote = a_remote(state="out_of_sync", reason="refused", hint="nbd-mirror resume")
    with (
        _served(config, a_status(remote)),
        pytest.raises(WaitTimeoutError, match="dr is out_of_sync: refused") as caught,
    ):
        _wait(config, 0.2)
    assert caught.value.hint == "nbd-mirror resume"


def test_wait_on_a_failed_volume_ends_at_once(config: VolumeConfig) -> None:
    """A state that can never come is not waited for."""
    status = a_status(a_remote(), state="failed", reason="fdatasync: EIO")
    with (
        _served(config, status),
        pytest.raises(MetadataFailedError, match="fdatasync: EIO"),
    ):
        _wait(config, 60)


def test_wait_goes_on_while_a_server_is_silent(
    config: VolumeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the question and answers nothing: the next question may be answered."""
    monkeypatch.setattr(watch, "ASK_S", 0.2)
    path = control_path(config.state_dir)
    asked = threading.Event()

    def be_silent(listener: socket.socket) -> None:
        with listener.accept()[0] as client:
            while client.recv(4096):
                asked.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        silent = threading.Thread(target=be_silent, args=[listener])
        silent.start()
        waiting = threading.Thread(target=_wait, args=[config, 20])
        waiting.start()
        silent.join()
        assert asked.is_set()
        assert waiting.is_alive()
    path.unlink()
    with _served(config, a_status(a_remote())):
        waiting.join(20)
    assert not waiting.is_alive()


def test_wait_for_a_server_that_stays_silent_says_so(
    config: VolumeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's queue of connections is full, too."""
    monkeypatch.setattr(watch, "LAST_ASK_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(control_path(config.state_dir)))
        listener.listen(0)
        with pytest.raises(WaitTimeoutError, match="did not answer"):
            _wait(config, 0.5)
    with pytest.raises(NotRunningError):
        _wait(config, 0.1)


def test_wait_without_server_ends_in_time(config: VolumeConfig) -> None:
    """No server in time: said as such."""
    with pytest.raises(NotRunningError):
        _wait(config, 0.2)


def test_status_of_another_volumes_server_is_refused(config: VolumeConfig) -> None:
    """A wrong `state` reaches another volume: nothing is shown or done."""
    with (
        _served(config, a_status(a_remote(), volume="other")),
        pytest.raises(FormatError, match="is the state of volume other, not of v"),
    ):
        watch.status_of(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "1"},
        {"remotes": {}},
        {"remotes": [7]},
        {"local": None},
        {"local": {"path": "/d.img"}},
        {"hint": None},
        {"clients": 1 << 4000},
        {"max_clients": "1"},
        {"remotes": [{"name": "dr"}]},
        {"local": {**a_local(), "resync": {"done_bytes": 1}}},
        {"local": {**a_local(), "dirty_bytes": 1e999}},
    ],
)
def test_status_that_is_none_is_one_clear_error(
    config: VolumeConfig, changes: dict[str, Any]
) -> None:
    """Of another user's server, or another version's, no answer is a bug of ours."""
    with (
        _served(config, a_status(a_remote(), **changes)),
        pytest.raises(FormatError, match="no nbd-mirror server, or one of another"),
    ):
        watch.status_of(config)


def test_status_of_an_earlier_versions_server_is_shown(config: VolumeConfig) -> None:
    """A running server stays as it is when a newer version is installed."""
    remote, local = a_remote(), {"path": "/d.img", "state": "ok"}
    del remote["flush_bound_bytes"]
    status = a_status(remote, local=local)
    del status["fenced_reads"]
    out = io.StringIO()
    with _served(config, status):
        answer = watch.status_of(config)
        show_status(Console(file=out, width=200), answer, "v")
        _wait(config, 10)
    assert "in_sync" in out.getvalue()
    assert "/d.img" in out.getvalue()
    # Programs find every key; an unknown one has the value from before any event.
    found = answer.dump()
    assert (found["fenced_reads"], found["persists"]) == ("serve", None)
    assert (found["local"]["dirty_bytes"], found["local"]["reason"]) == (0, "")
    assert found["remotes"][0]["flush_bound_bytes"] is None


def test_status_of_a_later_versions_server_is_shown(config: VolumeConfig) -> None:
    """Keys that this version does not know are left out."""
    later = {"from_now_on": {"x": [1 << 4000]}}
    status = a_status({**a_remote(), **later}, local={**a_local(), **later}, **later)
    with _served(config, status):
        answer = watch.status_of(config)
    assert "from_now_on" not in json.dumps(answer.dump())
    assert answer.remotes[0].state == "in_sync"


def test_watch_off_a_terminal_prints_a_line_a_change(config: VolumeConfig) -> None:
    """Same states give no second line; it ends at --until."""
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1,
        "eta_s": None,
    }
    answers = [
        a_status(a_remote(state="out_of_sync", dirty_bytes=1 << 20)),
        a_status(a_remote(state="out_of_sync", dirty_bytes=1 << 20)),
        a_status(a_remote(state="resyncing", resync=resync)),
        a_status(a_remote()),
    ]
    out = io.StringIO()
    with _served(config, *answers):
        watch.watch(config, Console(file=out, width=100), "v", "in_sync")
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "dr: out_of_sync, 1MiB dirty",
        "dr: resyncing, 50% of 1MiB",
        "dr: in_sync",
    ]


def test_watch_off_a_terminal_does_not_count_every_byte(config: VolumeConfig) -> None:
    """While clients write, a line a poll would make the log of it endless."""
    dirty = [
        a_remote(state="out_of_sync", dirty_bytes=kib << 10) for kib in range(64, 512)
    ]
    resync = {"done_bytes": 0, "bytes_per_s": 1, "eta_s": None}
    growing = [
        a_remote(state="resyncing", resync={**resync, "total_bytes": kib << 10})
        for kib in range(512, 600)
    ]
    out = io.StringIO()
    statuses = [Status.model_validate(a_status(one)) for one in (*dirty, *growing)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_statuses", lambda *_: iter(statuses))
        watch.watch(config, Console(file=out, width=100), "v", None)
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "dr: out_of_sync, 64KiB dirty",
        "dr: out_of_sync, 128KiB dirty",
        "dr: out_of_sync, 256KiB dirty",
        "dr: resyncing, 0% of 512KiB",
    ]


class _Gone(io.StringIO):
    def write(self, _: str) -> int:
        raise OutputError("no reader", quiet=True)


def test_watch_until_a_state_outlives_the_reader_of_its_output(
    config: VolumeConfig,
) -> None:
    """Its end, with exit status 0, says that the state is reached."""
    answers = [a_status(a_remote(state=one)) for one in ("out_of_sync", "in_sync")]
    asked = []

    def handler(*_: object) -> object:
        asked.append(1)
        return answers[min(len(asked), 3) // 3]

    with ControlServer(control_path(config.state_dir), handler):
        watch.watch(config, Console(file=_Gone()), "v", "in_sync")
        assert len(asked) == 3
        with pytest.raises(OutputError):
            watch.watch(config, Console(file=_Gone()), "v", None)


def test_watch_shows_the_local_disk_until_it_is_ok(config: VolumeConfig) -> None:
    """The copy back has its lines and its bar, and ends like a resync."""
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1 << 20,
        "eta_s": 3.0,
        "growing": False,
    }
    answers = [
        a_status(a_remote(), local=a_local(state="failed", dirty_bytes=1 << 20)),
        a_status(a_remote(), local=a_local(state="resyncing", resync=resync)),
        a_status(a_remote()),
    ]
    plain, live = io.StringIO(), io.StringIO()
    with _served(config, *answers):
        watch.watch(config, Console(file=plain, width=100), "v", "in_sync")
    console = Console(file=live, width=120, force_terminal=True)
    with _served(config, *answers):
        watch.watch(config, console, "v", "in_sync")
    lines = [line.split(" ", 1)[1] for line in plain.getvalue().splitlines()]
    assert lines == [
        "local: failed, 1MiB dirty",
        "dr: in_sync",
        "local: resyncing, 50% of 1MiB",
    ]
    for part in ("local", "50.0%", "3s left"):
        assert part in live.getvalue()


def test_watch_on_a_narrow_terminal_is_readable(config: VolumeConfig) -> None:
    """At 40 columns the state is whole, and the reason has the line to itself."""
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system=None)
    reason = "could not connect to the remote host: Connection refused"
    first = a_status(a_remote(state="out_of_sync", reason=reason))
    with _served(config, first, a_status(a_remote())):
        watch.watch(config, console, "v", "in_sync")
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert "could not connect to the remote" in lines
    assert "host: Connection refused" in lines
    assert any(line.startswith("dr  out_of_sync  ") for line in lines)


def test_watch_on_a_terminal_draws_and_ends(config: VolumeConfig) -> None:
    """The live picture holds state, bar and reason."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1 << 20,
        "eta_s": 3.0,
    }
    first = a_status(a_remote(state="resyncing", resync=resync, reason="copying"))
    with _served(config, first, a_status(a_remote())):
        watch.watch(config, console, "v", "in_sync")
    text = out.getvalue()
    for part in ("resyncing", "50.0%", "3s left", "copying", "in_sync"):
        assert part in text
