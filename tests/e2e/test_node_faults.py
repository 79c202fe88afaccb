# SPDX-License-Identifier: BSD-3-Clause
"""
A node is killed at each fault point of the control, and both heal.

A scenario changes roles or brings a node in sync. It runs once for each point that one
of its nodes passes, and that node's server is killed there. All the while a thread asks
both doors: no client may get the volume from two nodes. Then the killed server starts
again, and the nodes settle, at most with a `promote` without force: each answered write
is there, and both images are equal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.node_points import CONTROL_POINTS, RESOLVE_POINTS
from e2e.lib.node_site import Node, Pair

from nbd_mirror.base.errors import MirrorError, RoleError

pytestmark = [pytest.mark.slow]

FIRST, SECOND = b"first " * 1024 + bytes(2048), b"second" * 1024 + bytes(2048)
RESUMES_S = 6.0  # in which a last primary resumes, or never


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give two nodes, nothing created yet."""
    return Pair(run_dir, processes)


# --- scenarios: each serves the *faulty* node with the fault ------------------


def first_promotion(pair: Pair, faulty: Node, fault: str) -> None:
    """No node has data; alpha is promoted, and fills beta."""
    pair.alpha.local.write_bytes(FIRST + bytes(pair.size - len(FIRST)))
    pair.create()
    for node in pair.nodes:
        node.serve(fault if node is faulty else "")
    ask(pair.alpha, "promote", force=False)


def failover(pair: Pair, faulty: Node, fault: str) -> None:
    """Alpha is killed, beta is forced."""
    pair.bring_up()
    pair.alpha.write(0, FIRST)
    pair.beta.stop()
    pair.beta.serve(fault)
    assert faulty is pair.beta
    pair.wait_in_sync()
    pair.alpha.kill()
    ask(pair.beta, "promote", force=True)


def comes_back(pair: Pair, faulty: Node, fault: str) -> None:
    """Beta was forced and has written; alpha comes back."""
    pair.bring_up()
    pair.alpha.write(0, FIRST)
    pair.alpha.kill()
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    pair.beta.write(MIB, SECOND)
    if faulty is pair.beta:
        pair.beta.stop()
        pair.beta.serve(fault)
        with contextlib.suppress(MirrorError):
            pair.beta.ask("promote", force=True)
    pair.alpha.serve(fault if faulty is pair.alpha else "")


def switchover(pair: Pair, faulty: Node, fault: str) -> None:
    """Alpha gives its role to beta."""
    pair.bring_up()
    pair.alpha.write(0, FIRST)
    faulty.stop()
    faulty.serve(fault)
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    ask(pair.alpha, "switchover", node="beta")


def demotion(pair: Pair, faulty: Node, fault: str) -> None:
    """Alpha gives its role to nobody."""
    pair.bring_up()
    pair.alpha.write(0, FIRST)
    pair.beta.stop()
    pair.alpha.stop()
    faulty.serve(fault)
    ask(faulty, "promote", force=True)
    with contextlib.suppress(MirrorError):
        support.wait_until(lambda: faulty.role == "primary", "alpha", timeout_s=10)
    ask(faulty, "demote", force=True)
    pair.beta.serve()


def overtaken(pair: Pair, faulty: Node, fault: str) -> None:
    """Beta is killed as it is forced beside a primary that hangs."""
    pair.bring_up()
    pair.alpha.stop()
    pair.alpha.serve(fault)
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    pair.alpha.write(0, FIRST)
    pair.beta.stop()
    pair.beta.serve("promote_stored=kill")
    support.freeze(pair.alpha.pid)
    ask(pair.beta, "promote", force=True)
    assert pair.beta.ended() == -signal.SIGKILL
    os.kill(pair.alpha.pid, signal.SIGCONT)
    assert faulty is pair.alpha
    pair.beta.serve()


def ask(server: Node, request: str, **args: object) -> None:
    """Send a request to a server that may be killed before it answers."""
    with contextlib.suppress(MirrorError):
        server.ask(request, **args)


# --- the cases ----------------------------------------------------------------

Scenario = Callable[[Pair, Node, str], None]

PROMOTED = ("promote_asked", "promote_consented", "promote_stored", "promote_fenced")
SOURCE = (
    *("meeting_agreed", "claim_numbered", "begin_marked", "offer_stored"),
    *("adopt_answered", "settle_stored"),
)
TARGET = (
    *("claim_judged", "claim_stored", "claim_fenced", "claim_flushed"),
    *("begin_agreed", "begin_stored", "adopt_flushed", "adopt_stored"),
    "adopt_cleared",
)
CASES: dict[tuple[Scenario, str], tuple[str, ...]] = {
    (first_promotion, "alpha"): (*PROMOTED, "promotion_left", *SOURCE),
    (first_promotion, "beta"): ("consent_asked", "consent_stored", *TARGET),
    (failover, "beta"): ("session_ended", *PROMOTED, "promotion_left"),
    (comes_back, "alpha"): TARGET,
    (comes_back, "beta"): SOURCE,
    (switchover, "alpha"): (
        *("demote_drained", "demote_stored", "demotion_left"),
        *("handover_met", "handover_stored", "token_sent"),
        *("consent_asked", "consent_stored"),
    ),
    (switchover, "beta"): ("session_ended", *PROMOTED, "promotion_left"),
    (demotion, "alpha"): ("demote_drained", "demote_stored", "demotion_left"),
    (overtaken, "alpha"): ("meeting_epoch",),
}
PARAMETERS = [
    pytest.param(scenario, name, point, id=f"{scenario.__name__}-{name}-{point}")
    for (scenario, name), points in CASES.items()
    for point in points
]


@pytest.mark.parametrize(("scenario", "name", "point"), PARAMETERS)
def test_killed_at(pair: Pair, scenario: Scenario, name: str, point: str) -> None:
    """Killed there, both nodes settle, and no answered write is lost."""
    faulty = pair.alpha if name == "alpha" else pair.beta
    with watched(pair):
        scenario(pair, faulty, f"{point}=kill")
        support.wait_until(
            lambda: not faulty.alive, f"{name} to be killed at {point}", timeout_s=40
        )
        assert faulty.ended() == -signal.SIGKILL, faulty.log
        settle(pair)
    assert len(pair.primaries) == 1
    primary = next(node for node in pair.nodes if node.role == "primary")
    assert primary.read(0, len(FIRST)) == FIRST
    if scenario is comes_back:
        assert primary.read(MIB, len(SECOND)) == SECOND
    primary.write(2 * MIB, SECOND)
    pair.assert_equal()


def settle(pair: Pair) -> None:
    """Start what is down; promote a node without force, if none resumes."""
    for node in pair.nodes:
        if not node.alive:
            node.serve()
    with contextlib.suppress(pytest.fail.Exception):
        support.wait_until(lambda: has_primary(pair), "a", timeout_s=RESUMES_S)
    if not has_primary(pair):
        refusals = [why for why in map(promoted, pair.nodes) if why]
        assert len(refusals) < 2, refusals
    pair.wait_in_sync()


def promoted(node: Node) -> str:
    """Promote a node without force; return why not, or ""."""
    if node.role == "primary" or any(
        one["role"] == "primary" for one in node.status().get("peers", [])
    ):
        return ""
    try:
        node.ask("promote", force=False)
    except RoleError as error:
        return error.message
    support.wait_until(lambda: node.role == "primary", f"{node.name} to be primary")
    return ""


def has_primary(pair: Pair) -> bool:
    """Tell whether a node is primary."""
    return any(node.role == "primary" for node in pair.nodes)


@contextlib.contextmanager
def watched(pair: Pair) -> Iterator[None]:
    """Ask both doors again and again; no two may give a client the volume."""
    ending = threading.Event()
    both: list[str] = []

    def watch() -> None:
        one, other = pair.nodes
        while not ending.wait(0.02):
            # One before and after the other: it has served both all the time.
            if all(node.serves_clients() for node in (one, other, one)):
                both.append("both nodes serve")
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    assert not both


def test_every_point_has_a_case() -> None:
    """A point of the control at which no node is killed is not tested."""
    points = {point for case in CASES.values() for point in case}
    assert points == CONTROL_POINTS - RESOLVE_POINTS
