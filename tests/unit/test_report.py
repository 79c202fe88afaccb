# SPDX-License-Identifier: BSD-3-Clause
"""A status made of facts says everything, and is read as it was said."""

from __future__ import annotations

import contextlib
import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from nbd_mirror.base.errors import FormatError
from nbd_mirror.commands import watch
from nbd_mirror.commands.show import show_status
from nbd_mirror.rules.progress import Progress
from nbd_mirror.rules.state import Facts, LocalFacts, LocalState, RemoteState
from nbd_mirror.volume.answers import read
from nbd_mirror.volume.config import VolumeConfig
from nbd_mirror.volume.model import LocalStatus, RemoteStatus, VolumeStatus
from nbd_mirror.volume.report import LocalView, RemoteView, Server, report
from nbd_mirror.volume.status import Status

SERVER = Server("direct", 7, 9, 1, 2)
CONFIG = VolumeConfig.model_validate(
    {
        "name": "v",
        "size": "adopt",
        "local": "/local",
        "state": "/st",
        "listen": "unix:/sock",
        "remote": [{"name": "dr", "uri": "nbd://h"}],
    }
)
LOCAL = LocalStatus(LocalState.OK, False, 0, 0, 0, 0, 0, 0, "")
VOLUME = VolumeStatus(
    uuid="u",
    size=(1 << 20) + 512,
    region_size=65536,
    generation=(1 << 64) - 1,
    session=1,
    nr_remotes=1,
    local=LOCAL,
    failed=False,
    fenced=False,
    policy="degrade",
    fenced_reads="serve",
    stopping=False,
    clean=False,
    clients=1,
    inflight=2,
    active_extents=3,
    extent_size=1 << 20,
    reads=4,
    writes=5,
    flushes=6,
    write_s=0.5,
    activity_persists=7,
    superblock_persists=8,
    dirty_persists=9,
    reason="",
)
REMOTE = RemoteStatus(
    name="dr",
    state=RemoteState.RESYNCING,
    paused=False,
    assumed=False,
    connected=True,
    admitted=True,
    dirty_regions=16,
    late_regions=0,
    unflushed_regions=17,
    flush_bound=1 << 26,
    outstanding=0,
    remote_size=1 << 20,
    commands=1,
    copied_bytes=65536,
    answered_bytes=65536,
    answered_zero_bytes=0,
    answer_s=0.1,
    since=1,
    serial=1,
    reason="",
)


def made(server: Server | None) -> Status:
    """Return the status of a volume whose remote is copied to."""
    progress = Progress(0.0, VOLUME.size, 0)
    progress.update(1.0, 1 << 20, 65536)
    facts = Facts("dr", RemoteState.RESYNCING, admitted=True, dirty_bytes=1 << 20)
    local = LocalView(LocalFacts(LocalState.OK), LOCAL, "/no utf-8: \udcff")
    remotes = [RemoteView(facts, REMOTE, "nbd://h", progress)]
    return report(CONFIG, VOLUME, local, remotes, server=server)


@pytest.mark.parametrize("server", [SERVER, None], ids=str)
def test_status_leaves_nothing_to_defaults_and_is_read_as_it_was_said(
    server: Server | None,
) -> None:
    """Defaults are for a server of an earlier version; JSON carries all there is."""
    status = made(server)
    for one in (status, *status.disks, status.remotes[0].resync):
        assert one is not None
        assert one.model_fields_set == set(type(one).model_fields)
    assert read(Status, json.loads(json.dumps(status.dump()))) == status


def test_status_says_clean_stop_without_a_server_alone() -> None:
    """The key is there or not; the others, and their order, are the same."""
    served, stopped = list(made(SERVER).dump()), list(made(None).dump())
    assert "clean_stop" not in served
    assert served == [key for key in stopped if key != "clean_stop"]


def test_last_region_counts_with_the_bytes_that_it_has() -> None:
    """A volume of 16 regions and a sector has never more unflushed than its size."""
    assert made(SERVER).remotes[0].unflushed_bytes == VOLUME.size


MOST = 1 << 64
NASTY = [
    *(None, True, "", "ok", "failed", "resyncing", "\ud800", [], [7], {}, {"a": 1}),
    *(-1, 0, 0.5, MOST - 1, 1 - MOST, MOST, 1 << 4000, math.inf, -math.inf, math.nan),
]


def parts(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of an answer that has one of each."""
    remote = answer["remotes"][0]
    return [answer, answer["local"], remote, remote["resync"], answer["persists"]]


@pytest.mark.parametrize("value", NASTY, ids=lambda value: repr(value)[:20])
def test_any_value_of_a_key_is_shown_or_is_one_clear_error(value: object) -> None:
    """Any value from another user's server is an error of a command, and no bug."""
    whole = json.dumps(made(SERVER).dump())
    keys = [(i, key) for i, one in enumerate(parts(json.loads(whole))) for key in one]
    for i, key in keys:
        answer = json.loads(whole)
        parts(answer)[i][key] = value
        with contextlib.suppress(FormatError):
            status = read(Status, json.loads(json.dumps(answer)))
            console = Console(file=io.StringIO(), width=80)
            show_status(console, status, "v")
            console.print(watch._picture(status, "v"), *watch._lines(status))
            watch.reached(status, "in_sync", None)
            json.dumps(status.dump(), allow_nan=False)
