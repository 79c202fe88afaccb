# SPDX-License-Identifier: BSD-3-Clause
"""What `status`, `wait` and `watch` show of the nodes of a volume."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from unit.answers import a_local, a_node, a_peer, a_remote, a_status

from nbd_mirror.base.errors import WaitTimeoutError
from nbd_mirror.commands import watch
from nbd_mirror.commands.create import create_volume
from nbd_mirror.commands.show import show_status
from nbd_mirror.server.control_server import ControlServer
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.control import control_path
from nbd_mirror.volume.offline import stopped_status
from nbd_mirror.volume.status import Status


@pytest.fixture
def config(tmp_path: Path) -> VolumeConfig:
    """Give the volume of two nodes, as on beta; its state directory exists."""
    (tmp_path / "pg.toml").write_text(
        f'name = "v"\nsize = "1MiB"\nlocal = "d"\nstate = "st"\ntls = "off"\n'
        f'listen = "unix:{tmp_path}/s"\n'
        '[[node]]\nname = "alpha"\naddress = "10.0.0.1:10810"\n'
        '[[node]]\nname = "beta"\naddress = "10.0.0.2:10810"\n'
        '[[remote]]\nname = "dr"\nuri = "nbd://127.0.0.3/x"\n'
    )
    (tmp_path / "st").mkdir(mode=0o700)
    (tmp_path / "d").write_bytes(bytes(1 << 20))
    return load(tmp_path / "pg.toml", "beta")


def shown(status: dict[str, Any]) -> str:
    """Return what `status` prints."""
    out = io.StringIO()
    show_status(Console(file=out, width=200), Status.model_validate(status), "pg")
    return out.getvalue()


def primary(**changes: Any) -> dict[str, Any]:
    """Return the status of alpha, whose secondary is beta."""
    peer = a_peer(name="beta", role="secondary", address="10.0.0.2:10810", **changes)
    node = a_node(name="alpha", role="primary", peers=[peer])
    node["promotable"] = {"answer": "no", "reason": "it is primary already"}
    return a_status(a_remote(name="beta"), node=node)


def test_secondary_shows_both_nodes_and_the_answer() -> None:
    """The status names the primary, tells if both are equal, and gives the command."""
    assert shown(a_status(node=a_node())).splitlines()[1:4] == [
        "  node beta   secondary  this node, epoch 3, in sync",
        "  node alpha  primary    10.0.0.1:10810, connected, in sync",
        "  fail over now?  yes",
    ]
    assert "    try: nbd-mirror promote pg" in shown(a_status(node=a_node()))


def test_forced_promotion_says_what_it_costs() -> None:
    """In an outage: the reason, what may be lost, and the command."""
    peer = a_peer(connected=False, role="", in_sync=False, why="no route to host")
    promotable = {
        "answer": "force",
        "reason": "another node may have gone on alone",
        "command": "nbd-mirror promote CONFIG --force",
        "lost": "writes since 14:02:11",
    }
    node = a_node(state="waiting", why="alpha is away", peers=[peer])
    node["promotable"] = promotable
    text = shown(a_status(node=node, state="out_of_sync"))
    assert "  node alpha  unknown    10.0.0.1:10810, not connected, no route" in text
    assert "met 2024-01-01T00:00:00+00:00" in text
    assert "    why: alpha is away" in text
    assert "  fail over now?  force: another node may have gone on alone" in text
    assert "    may be lost: writes since 14:02:11" in text
    assert "    try: nbd-mirror promote pg --force" in text


def test_primary_names_the_switchover() -> None:
    """On a primary the question is about the other node."""
    text = shown(primary())
    assert "  node alpha  primary    this node, epoch 3, in sync" in text
    assert "  fail over now?  yes: beta is in sync" in text
    assert "    try: nbd-mirror switchover pg beta" in text
    for changes, why in (
        ({"in_sync": False}, "beta is not in sync"),
        ({"connected": False, "in_sync": True}, "beta is not connected"),
    ):
        text = shown(primary(**changes))
        assert f"fail over now?  no: no other node can take over: {why}" in text
        assert "switchover" not in text


def test_words_of_another_node_are_no_line_of_ours() -> None:
    """They come from another host."""
    peer = a_peer(why="gone\nfail over now?  yes\x1b[2J")
    text = shown(a_status(node=a_node(peers=[peer])))
    assert not [one for one in text.splitlines() if one.startswith("fail over now")]
    assert "\x1b" not in text


def served(config: VolumeConfig, *answers: dict[str, Any]) -> ControlServer:
    """Answer status with each of *answers* in turn, then with the last one."""
    left = list(answers)
    return ControlServer(
        control_path(config.state_dir),
        lambda *_: left.pop(0) if len(left) > 1 else left[0],
    )


def test_wait_on_a_secondary_is_about_itself(config: VolumeConfig) -> None:
    """It has no remotes whose states could count, and that is no success."""
    behind = a_status(node=a_node(), state="out_of_sync", reason="not connected")
    with served(config, behind, a_status(node=a_node())):
        found = watch.wait_for(config, "in_sync", 10, None, lambda _: None)
        assert found == ["beta"]
    for remote in (None, "alpha"):
        with (
            served(config, behind),
            pytest.raises(
                WaitTimeoutError, match="this node is out_of_sync: not connected"
            ),
        ):
            watch.wait_for(config, "in_sync", 0.1, remote, lambda _: None)
    failed = a_status(node=a_node(), local=a_local(state="failed"))
    with served(config, failed), pytest.raises(WaitTimeoutError):
        watch.wait_for(config, "in_sync", 0.1, "local", lambda _: None)


def test_watch_prints_each_change_of_a_node(config: VolumeConfig) -> None:
    """A line for each node and, on a secondary, one for the volume."""
    away = a_peer(connected=False, role="", in_sync=False)
    answers = [
        a_status(node=a_node()),
        a_status(node=a_node(peers=[a_peer(since="2024-02-02T00:00:00+00:00")])),
        a_status(node=a_node(peers=[away], state="waiting"), state="out_of_sync"),
        a_status(node=a_node()),
    ]
    out = io.StringIO()
    with served(config, *answers):
        for _ in range(len(answers)):
            watch.watch(config, Console(file=out, width=200), "pg", "in_sync")
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert "node beta   secondary  this node, epoch 3, in sync" in lines
    assert "node alpha  unknown    10.0.0.1:10810, not connected, met" in str(lines)
    assert "v: in_sync" in lines
    assert "v: out_of_sync" in lines


def test_stopped_node_claims_nothing_of_the_others(config: VolumeConfig) -> None:
    """Its record says what it knew; the answer for now is to serve it."""
    create_volume(config, [], force=False)
    status = stopped_status(config)
    assert status.remotes == ()
    node = status.node
    assert node is not None
    assert (node.name, node.role, node.state) == ("beta", "secondary", "no_data")
    assert (node.generation, node.epoch, node.leader) == ("", 0, "")
    (peer,) = node.peers
    assert (peer.name, peer.address) == ("alpha", "10.0.0.1:10810")
    assert not peer.connected
    assert not peer.in_sync
    assert node.promotable.answer == "no"
    text = shown(status.dump())
    line = "node beta   stopped    this node, was secondary, never promoted, no data"
    assert line in text
    assert "fail over now" not in text
