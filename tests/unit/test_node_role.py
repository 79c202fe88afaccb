# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes change their roles at once: real engines and records, calls within the test.

At a named step of one node the other one does something: it is promoted, killed, or cut
off. So each order of two promotions is a case, and none depends on time. Never are two
nodes primary unless an operator forced one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.volumes import make_params

from nbd_mirror.base.errors import AccessError, MirrorError, RemoteError, RoleError
from nbd_mirror.rules.node_side import Role
from nbd_mirror.server.node_calls import NodeCalls, Wishes
from nbd_mirror.server.node_handover import HAND_OVER_S
from nbd_mirror.server.node_local import LocalNode
from nbd_mirror.server.node_others import Others, Wire
from nbd_mirror.server.node_role import (
    GRANT_VARIABLE,
    HAND_OVER_VARIABLE,
    NodeRole,
)
from nbd_mirror.volume import core

STEPS = ("promote_asked", "promote_consented", "promote_stored", "promote_fenced")


class KilledError(BaseException):
    """A node was killed: nothing of its code runs on, whatever it catches."""


class Door:
    """A door without sessions: nothing is to be cut."""

    def fence(self, timeout_s: float, keep: Any = None) -> int:
        """Cut nothing."""
        assert timeout_s > 0 or keep
        return 0


class Host:
    """One node: its engine, and what its server has of the control."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self._world = world
        self.name = name
        (other,) = {"alpha", "beta"} - {name}
        params = make_params(folder, hold_ms=0)
        remote = replace(params.remotes[0], name=other, is_node=True)
        self._params = replace(params, node=name, remotes=(remote,))
        core.create(self._params)
        self.at: dict[str, Callable[[], object]] = {}  # done once, at a step
        self.time = 0.0
        self.start()

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Open as a server's start does."""
        given = environment or {}
        params, grant = self._params, given.get(GRANT_VARIABLE)
        if grant:
            params = replace(params, primary=True, epoch=int(grant))
        try:
            self.engine = core.Engine(params)
        except AccessError:
            self.engine = core.Engine(self._params)
        self.engine.start()
        self.up = True
        self.local = LocalNode(
            self.engine,
            "v",
            [remote.name for remote in self._params.remotes],
            primary=self.engine.status().role is Role.PRIMARY,
            reach=self._reach,
        )
        wired = Wire(self._world.carry(self), lambda *_: b"")
        self.others = Others(self.local, wired, lambda node, _: node)
        wishes = Wishes(
            demote=self._overrule,
            token=self._take_token,
        )
        self.calls = NodeCalls(self.local, self.others, Door(), wishes, lambda *_: None)
        self.role = NodeRole(
            self.local,
            self.others,
            self.calls,
            Door(),
            leave=self._leave,
            log=lambda *_: None,
            hand_over=given.get(HAND_OVER_VARIABLE, ""),
            clock=lambda: self.time,
        )

    def _overrule(self, later: str) -> None:
        self.role.overrule(later)

    def _take_token(self, generation: int, term: tuple[int, str]) -> None:
        self.role.take_token(generation, term)

    def _reach(self, step: str) -> None:
        act = self.at.pop(step, None)
        if act:
            act()
        if not self.up:
            raise KilledError

    def _leave(self, environment: Mapping[str, str]) -> None:
        """End cleanly, and start in the new role."""
        if self.up:
            self.role.before_stop()
            self.engine.stop()
            self.kill()
            self.start(environment)

    def kill(self) -> None:
        """End without a stop, if it was not stopped before."""
        if self.up:
            self.up = False
            self.engine.close()

    @property
    def primary(self) -> bool:
        """Whether its door is open."""
        return self.up and self.local.primary

    def order(self, request: str, **args: Any) -> str:
        """Do what an operator orders; return why it was refused, or ""."""
        try:
            getattr(self.role, request)(**args)
        except MirrorError as error:
            return error.message
        return ""

    def turn(self) -> None:
        """Let the thread of the role do its next step; it may be killed there."""
        if self.up:
            with contextlib.suppress(KilledError):
                self.role.turn()


class World:
    """Both nodes, and whether they reach each other."""

    def __init__(self, folder: Path) -> None:
        self.linked = True
        self.hosts: dict[str, Host] = {}
        for name in ("alpha", "beta"):
            (folder / name).mkdir()
            self.hosts[name] = Host(self, name, folder / name)
        self.alpha, self.beta = self.hosts["alpha"], self.hosts["beta"]

    def carry(self, sender: Host) -> Callable[[str, bytes, float], bytes]:
        """Give what carries the calls of *sender*."""

        def call(node: str, words: bytes, _: float) -> bytes:
            target = self.hosts[node]
            if not (self.linked and target.up and sender.up):
                raise RemoteError(f"{node} cannot be reached")
            try:
                return target.calls.meta(words)
            except KilledError:
                if target.up:
                    raise
                raise RemoteError(f"{node} has ended the connection") from None

        return call

    def cut(self) -> None:
        """Let no node reach the other one."""
        self.linked = False

    @property
    def primaries(self) -> list[str]:
        """The nodes whose doors are open."""
        return [host.name for host in self.hosts.values() if host.primary]


@pytest.fixture
def world(run_dir: Path) -> Iterator[World]:
    """Give two nodes without data, neither of them primary."""
    found = World(run_dir)
    yield found
    for host in found.hosts.values():
        host.kill()


def test_the_first_promotion_needs_both_nodes(world: World) -> None:
    """Without the other one it needs force, which may make unrelated data."""
    world.cut()
    assert "only by force" in world.alpha.order("promote", force=False)
    world.linked = True
    assert world.alpha.order("promote", force=False) == ""
    assert world.primaries == ["alpha"]
    record = world.alpha.local.record()
    assert (record.epoch, record.leader) == (1, "alpha")
    assert record.lineage.generation > 0
    assert world.beta.local.own_term() == (1, "alpha")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("first", ["alpha", "beta"])
def test_two_promotions_at_once(world: World, first: str, step: str) -> None:
    """At each step of one, the other node is promoted as a whole."""
    one = world.hosts[first]
    (other,) = (host for host in world.hosts.values() if host is not one)
    one.at[step] = lambda: other.order("promote", force=False)
    with contextlib.suppress(MirrorError):
        one.role.promote(force=False)
    assert len(world.primaries) <= 1
    if not world.primaries:
        assert "" in [host.order("promote", force=False) for host in (one, other)]
    assert len(world.primaries) == 1


@pytest.mark.parametrize("step", STEPS)
def test_a_promotion_beside_a_resume(world: World, step: str) -> None:
    """The last primary comes back just as the other node is promoted."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.kill()
    world.alpha.start()
    world.beta.at[step] = world.alpha.turn
    world.beta.order("promote", force=False)
    assert len(world.primaries) <= 1
    world.alpha.turn()
    assert len(world.primaries) == 1


@pytest.mark.parametrize("step", [*STEPS, "consent_asked", "consent_stored"])
@pytest.mark.parametrize("event", ["kill", "cut"])
def test_a_promotion_that_is_cut_off(world: World, step: str, event: str) -> None:
    """Killed, or without the link, at each step of either node: then it heals."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.kill()
    world.alpha.start()
    faulty = world.alpha if step in STEPS else world.beta
    faulty.at[step] = faulty.kill if event == "kill" else world.cut
    world.alpha.turn()
    assert len(world.primaries) <= 1
    world.linked = True
    for host in world.hosts.values():
        if not host.up:
            host.start()
    for _ in range(3):
        world.alpha.turn()
    assert world.primaries == ["alpha"]


def test_a_record_alone_opens_no_door(world: World) -> None:
    """The last primary, started without a grant and without the other node, waits."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.kill()
    world.cut()
    world.alpha.start()
    world.alpha.turn()
    assert world.primaries == []
    why, hint = world.alpha.role.waits
    assert "cannot be asked" in why
    assert "--force" in hint


def test_start_alone_bounds_the_wait(world: World) -> None:
    """But only for the last primary."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.kill()
    world.beta.kill()
    for host in (world.alpha, world.beta):
        world.cut()
        host.start()
        host.role._start_alone_s = 30.0
        host.turn()
        assert world.primaries == []
        host.time = 31.0
        host.turn()
        assert host.primary is (host is world.alpha)
        host.kill()


def test_a_demoted_primary_does_not_resume(world: World) -> None:
    """Either node may be promoted then, without force."""
    world.alpha.order("promote", force=False)
    fill(world)
    assert world.alpha.order("demote", force=False) == ""
    world.alpha.turn()
    assert world.primaries == []
    assert world.beta.order("promote", force=False) == ""
    assert world.primaries == ["beta"]


@pytest.mark.parametrize(
    ("faulty", "step"),
    [
        ("alpha", "handover_met"),
        ("alpha", "handover_stored"),
        ("alpha", "token_sent"),
        *(("beta", step) for step in STEPS),
    ],
)
def test_a_hand_over_that_is_cut_off(world: World, faulty: str, step: str) -> None:
    """Killed at each step, and started again: one node serves, without force."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.role._close({HAND_OVER_VARIABLE: "beta"})
    host = world.hosts[faulty]
    host.at[step] = host.kill
    for _ in range(3):
        for one in (world.alpha, world.beta):
            one.turn()
        assert len(world.primaries) <= 1
    if not host.up:
        host.start()
    for _ in range(3):
        world.alpha.turn()
        world.beta.turn()
    if not world.primaries:
        refused = [one.order("promote", force=False) for one in world.hosts.values()]
        assert "" in refused
    assert len(world.primaries) == 1


def test_a_hand_over_is_taken_back(world: World) -> None:
    """The other node does not take the role in time, but consents to that."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.role._close({HAND_OVER_VARIABLE: "beta"})
    world.beta.role.take_token = lambda *_: None  # type: ignore[method-assign]
    world.alpha.turn()
    assert world.primaries == []
    world.alpha.time = HAND_OVER_S + 1
    world.alpha.turn()
    assert world.primaries == ["alpha"]
    assert world.alpha.local.record().handed == ""


def test_a_token_is_good_once(world: World) -> None:
    """One of an earlier promotion, or generation, promotes nobody."""
    world.alpha.order("promote", force=False)
    fill(world)
    world.alpha.order("demote", force=False)
    record = world.alpha.local.record()
    generation, term = record.lineage.generation, world.alpha.local.own_term()
    world.alpha.order("promote", force=False)
    with pytest.raises(RemoteError, match="another generation or promotion"):
        world.alpha.others.token("beta", generation, term)
    world.beta.role.take_token(generation, term)
    world.beta.turn()
    assert world.primaries == ["alpha"]


def test_force_beside_a_primary_is_refused(world: World) -> None:
    """Switch over instead."""
    world.alpha.order("promote", force=False)
    fill(world)
    for force in (False, True):
        with pytest.raises(RoleError, match="another node is primary"):
            world.beta.role.promote(force=force)


def fill(world: World) -> None:
    """Give beta what a first sync leaves there; no data are copied in this test."""
    source = world.alpha.local.record()
    beta = world.beta.local
    for local, other in ((beta, source), (world.alpha.local, beta.record())):
        lineage = replace(
            source.lineage,
            peers=tuple(
                replace(peer, bases=(), shared=True)
                for peer in local.record().lineage.peers
            ),
        )
        ids = {other.node: other.id}
        local.change(
            lambda record, lineage=lineage, ids=ids: replace(  # type: ignore[misc]
                record,
                lineage=lineage,
                zero=False,
                peers=tuple(replace(one, id=ids[one.node]) for one in record.peers),
            )
        )
    beta.engine.node_clear(beta.disk_of("alpha"))
