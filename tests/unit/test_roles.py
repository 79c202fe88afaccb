# SPDX-License-Identifier: BSD-3-Clause
"""
`promote`, `demote` and `switchover`: what they wait for, and what they say.

The control socket is a real one; what the server behind it says is each test's. Real
nodes change their roles in tests/e2e/test_pair.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.answers import a_node, a_peer, a_status
from unit.command_line import nbd_mirror

from nbd_mirror.base.errors import (
    ConfigError,
    NotRunningError,
    RoleError,
    WaitTimeoutError,
)
from nbd_mirror.commands import roles
from nbd_mirror.server.control_server import ControlServer
from nbd_mirror.volume.client import Process
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.control import control_path


@pytest.fixture
def config(tmp_path: Path) -> VolumeConfig:
    """Give the volume of two nodes, as on beta; its state directory exists."""
    (tmp_path / "pg.toml").write_text(
        f'name = "v"\nsize = "1MiB"\nlocal = "d"\nstate = "st"\ntls = "off"\n'
        f'listen = "unix:{tmp_path}/s"\n'
        '[[node]]\nname = "alpha"\naddress = "10.0.0.1:10810"\n'
        '[[node]]\nname = "beta"\naddress = "10.0.0.2:10810"\n'
    )
    (tmp_path / "st").mkdir(mode=0o700)
    return load(tmp_path / "pg.toml", "beta")


class Server:
    """Answers as a server whose node is each of *nodes* in turn, then the last."""

    def __init__(self, config: VolumeConfig, *nodes: dict[str, Any]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuses: Exception | None = None
        self._left = list(nodes)
        self._control = ControlServer(control_path(config.state_dir), self._handle)

    def _handle(self, command: str, args: Any) -> object:
        if command == "ping":
            return {"volume": "v", "pid": os.getpid()}
        if command == "status":
            more = len(self._left) > 1
            return a_status(node=self._left.pop(0) if more else self._left[0])
        self.asked.append((command, dict(args)))
        if self.refuses is not None:
            raise self.refuses
        return {"role": "?"}

    def __enter__(self) -> Server:
        self._control.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._control.__exit__(None, None, None)


PRIMARY = a_node(role="primary", epoch=4, peers=[a_peer(role="secondary")])


def test_promote_waits_until_the_node_is_primary(config: VolumeConfig) -> None:
    """The server's answer is only the beginning of the change."""
    with Server(config, a_node(), a_node(), a_node(), PRIMARY) as server:
        found = roles.promote(config, force=False)
    assert (found.role, found.epoch) == ("primary", 4)
    assert server.asked == [("promote", {"force": False})]


def test_demote_waits_until_the_node_is_secondary(config: VolumeConfig) -> None:
    """And passes the option on."""
    with Server(config, PRIMARY, PRIMARY, a_node()) as server:
        assert roles.demote(config, force=True).role == "secondary"
    assert server.asked == [("demote", {"force": True})]


def test_switchover_waits_until_the_other_node_is_primary(
    config: VolumeConfig,
) -> None:
    """Between the two no node is primary, which is not the end."""
    none = a_node(peers=[a_peer(role="secondary")])
    with Server(config, PRIMARY, PRIMARY, PRIMARY, none, a_node()) as server:
        assert roles.switchover(config, None) == "alpha"
    assert server.asked == [("switchover", {"node": "alpha"})]


def test_switchover_that_does_not_come_about_is_an_error(config: VolumeConfig) -> None:
    """The node took its role back: in a later epoch it is primary again."""
    none = a_node(peers=[a_peer(role="secondary")])
    again = {**PRIMARY, "epoch": 5}
    with (
        Server(config, PRIMARY, PRIMARY, PRIMARY, none, again),
        pytest.raises(RoleError, match="alpha did not take the role: beta is primary"),
    ):
        roles.switchover(config, "alpha")


def test_switchover_runs_on_the_primary(config: VolumeConfig) -> None:
    """A secondary says where that is."""
    with (
        Server(config, a_node()) as server,
        pytest.raises(RoleError, match="beta is secondary: alpha is primary"),
    ):
        roles.switchover(config, None)
    assert server.asked == []


def test_names_of_no_other_node_are_refused_before_anything(
    config: VolumeConfig,
) -> None:
    """Not even by the name of this node."""
    for name in ("beta", "gamma"):
        with pytest.raises(ConfigError, match=f'other nodes: alpha; none .* "{name}"'):
            roles.switchover(config, name)


def test_refusal_is_the_servers_own(config: VolumeConfig) -> None:
    """With its class, its hint and its exit code."""
    with Server(config, a_node()) as server:
        server.refuses = RoleError("only by force: x", "nbd-mirror promote CONFIG")
        with pytest.raises(RoleError, match="only by force: x") as caught:
            roles.promote(config, force=False)
        assert caught.value.hint == "nbd-mirror promote CONFIG"
        done = nbd_mirror("promote", config.source, "--node", "beta")
        assert done.returncode == RoleError.exit_code
        assert f"try: nbd-mirror promote {config.source} --node beta" in done.stderr


def test_change_that_takes_too_long_says_where_it_is(
    config: VolumeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's state, with its reason."""
    monkeypatch.setattr(roles, "SETTLE_S", 0.3 - config.stop_limit_s)
    with (
        Server(config, a_node(state="waiting", why="alpha is away")),
        pytest.raises(WaitTimeoutError, match="beta is secondary: alpha is away"),
    ):
        roles.promote(config, force=True)


@pytest.fixture
def ended() -> Iterator[int]:
    """Give the process id of a process that has ended and is not reaped."""
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process.pid


def test_server_that_ends_is_told_at_once(
    config: VolumeConfig, monkeypatch: pytest.MonkeyPatch, ended: int
) -> None:
    """It could not start again: nothing is waited for."""
    with Server(config, a_node()) as server:

        def ask(*_: object, **__: object) -> object:
            server.__exit__()
            raise NotRunningError("gone")

        monkeypatch.setattr(roles, "ask", ask)
        monkeypatch.setattr(roles, "ask_process", lambda _: Process(ended, seen=True))
        with pytest.raises(NotRunningError, match='the server ended during "promote"'):
            roles.promote(config, force=False)


def test_volume_without_nodes_has_no_roles(tmp_path: Path) -> None:
    """One line, and exit code 3."""
    (tmp_path / "v.toml").write_text(
        'name="v"\nsize="1MiB"\nlocal="d"\nstate="st"\n'
        f'listen="unix:{tmp_path}/s"\n[[remote]]\nname="dr"\nuri="nbd://h/x"\n'
    )
    for word in ("promote", "demote", "switchover"):
        done = nbd_mirror(word, tmp_path / "v.toml")
        assert done.returncode == ConfigError.exit_code
        assert "volume v has no [[node]] tables, so it has no roles" in done.stderr
