# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes as two real servers, over TLS: first sync, failover, return, switchover.

A test ends with both images compared, byte by byte, and with one node that serves.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.node_site import Pair

from nbd_mirror.base.errors import RoleError
from nbd_mirror.volume import core
from nbd_mirror.volume import node_wire as wire

CONTENT = (bytes(range(1, 256)) * 258)[: 64 << 10]  # no half equals the other


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give two nodes, nothing created yet."""
    return Pair(run_dir, processes)


def at(image: Path, offset: int) -> bytes:
    """Give what an image has at an offset, as long as CONTENT."""
    return image.read_bytes()[offset : offset + len(CONTENT)]


def test_the_first_promotion_fills_the_other_node(pair: Pair) -> None:
    """The data of the promoted node's disk count; then writes go to both."""
    with pair.alpha.local.open("r+b") as file:
        file.write(os.urandom(3 * MIB))
    pair.bring_up()
    assert pair.primaries == ["alpha"]
    # What was copied is durable: after a failover it is not copied again.
    assert pair.beta.ask("status")["active_extents"] == 0
    pair.alpha.write(4 * MIB, CONTENT)
    assert pair.alpha.read(4 * MIB, len(CONTENT)) == CONTENT
    pair.assert_equal()
    assert CONTENT in pair.beta.local.read_bytes()


def test_no_client_gets_a_secondary(pair: Pair) -> None:
    """Its door says who is primary, and no promotion happens beside a primary."""
    pair.bring_up()
    assert not pair.beta.serves_clients()
    with pytest.raises(RoleError, match="is primary and connected"):
        pair.beta.ask("promote", force=False)
    with pytest.raises(RoleError, match="is primary and connected"):
        pair.beta.ask("promote", force=True)
    assert pair.primaries == ["alpha"]


def test_a_restarted_primary_resumes(pair: Pair) -> None:
    """After a clean stop nothing is copied; after a kill what was under way."""
    pair.bring_up()
    generation = pair.alpha.status()["generation"]
    pair.alpha.stop()
    pair.alpha.serve()
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    assert pair.alpha.status()["generation"] == generation
    assert "resync" not in pair.alpha.log
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.kill()
    pair.alpha.serve()
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    assert pair.alpha.read(MIB, len(CONTENT)) == CONTENT
    pair.assert_equal()


def test_failover_and_return(pair: Pair) -> None:
    """A forced node serves; the old primary comes back and is made equal."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.kill()
    with pytest.raises(RoleError, match="only by force"):
        pair.beta.ask("promote", force=False)
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    assert pair.beta.read(MIB, len(CONTENT)) == CONTENT
    pair.beta.write(2 * MIB, CONTENT)
    pair.alpha.serve()
    pair.wait_in_sync()
    assert pair.primaries == ["beta"]
    pair.beta.write(3 * MIB, CONTENT)
    pair.assert_equal()


def test_switchover_there_and_back_copies_nothing(pair: Pair) -> None:
    """A switchover also begins no generation."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    generation = pair.alpha.status()["generation"]
    for first, second in ((pair.alpha, pair.beta), (pair.beta, pair.alpha)):
        first.ask("switchover", node=None)
        second.wait_role("primary")
        pair.wait_in_sync()
        assert pair.primaries == [second.name]
        assert second.status()["generation"] == generation
        assert second.read(MIB, len(CONTENT)) == CONTENT
    assert pair.alpha.status()["epoch"] == 3
    assert (pair.alpha.log + pair.beta.log).count("resync_start") == 1  # the first one
    pair.assert_equal()


def test_no_role_is_given_to_a_node_that_hangs(pair: Pair) -> None:
    """Its session is up for seconds yet; without the primary, no node would serve."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    support.freeze(pair.beta.pid)
    with pytest.raises(RoleError, match="beta does not answer"):
        pair.alpha.ask("switchover", node=None)
    assert pair.alpha.read(MIB, len(CONTENT)) == CONTENT
    os.kill(pair.beta.pid, signal.SIGCONT)
    pair.wait_in_sync()
    assert pair.primaries == ["alpha"]


@pytest.mark.parametrize("grant", ["1", "x"])
def test_a_start_takes_no_role_from_the_users_environment(
    pair: Pair, grant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a server that executes itself again has a grant."""
    pair.bring_up()
    pair.alpha.kill()
    pair.beta.kill()
    monkeypatch.setenv("NBD_MIRROR_GRANT", grant)
    monkeypatch.setenv("NBD_MIRROR_HAND_OVER", "beta")
    pair.alpha.serve()
    pair.alpha.wait_state("waiting")
    assert "may have been promoted" in pair.alpha.status()["why"]
    assert pair.primaries == []


def test_a_primary_that_hung_gives_way(pair: Pair) -> None:
    """Beta was forced beside it. It has no write that beta lacks: its door closes."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    support.freeze(pair.alpha.pid)
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    pair.beta.write(2 * MIB, CONTENT)
    os.kill(pair.alpha.pid, signal.SIGCONT)
    pair.alpha.wait_role("secondary")
    pair.wait_in_sync()
    assert pair.primaries == ["beta"]
    assert pair.beta.read(2 * MIB, len(CONTENT)) == CONTENT
    pair.assert_equal()


def test_two_nodes_that_both_wrote_stop(pair: Pair) -> None:
    """A split brain: both say so, and neither overwrites the other."""
    pair.bring_up()
    pair.beta.kill()
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.kill()
    pair.beta.serve()
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    pair.beta.write(2 * MIB, CONTENT)
    pair.alpha.serve()
    support.wait_until(
        lambda: "answered writes" in pair.beta.status()["why"], "beta to say why"
    )
    support.wait_until(
        lambda: "beta is primary" in pair.alpha.status()["why"], "alpha to say why"
    )
    assert "nbd-mirror resolve" in pair.beta.status()["hint"]
    assert pair.primaries == ["beta"]
    assert CONTENT == at(pair.alpha.local, MIB)
    assert CONTENT == at(pair.beta.local, 2 * MIB)
    assert CONTENT != at(pair.beta.local, MIB)
    pair.alpha.stop()  # its own write is given up
    pair.alpha.cli("create", str(pair.config), "--force")
    pair.alpha.serve()
    pair.beta.cli("replace", str(pair.config), "alpha")
    pair.wait_in_sync()
    pair.assert_equal()
    assert CONTENT == at(pair.alpha.local, 2 * MIB)


def test_a_node_that_lost_its_state_is_not_filled(pair: Pair) -> None:
    """It has another id: an operator has to announce it."""
    pair.bring_up()
    pair.beta.stop()
    shutil.rmtree(pair.beta.state)
    pair.beta.cli("create", str(pair.config))
    pair.beta.serve()
    support.wait_until(
        lambda: "is not the node that" in pair.alpha.status()["why"], "alpha to say why"
    )
    assert pair.primaries == ["alpha"]
    assert "nbd-mirror replace" in pair.alpha.status()["hint"]
    pair.alpha.cli("replace", str(pair.config), "beta")
    pair.wait_in_sync()
    done = pair.alpha.cli("replace", str(pair.config), "beta", check=False)
    assert (done.returncode, "is connected" in done.stderr) == (18, True)
    pair.assert_equal()


def test_a_call_from_a_node_of_another_name_is_refused(pair: Pair) -> None:
    """All nodes have one key, so each call names its sender and its receiver."""
    pair.bring_up()
    pair.beta.stop()
    uri = f"nbds://v@{pair.alpha.address}/v.meta?tls-psk-file={pair.folder}/v.psk"
    body = wire.Consent(epoch=9)
    message = wire.Message(
        v=wire.VERSIONS, volume="v", sender="beta", id="0" * 32, to="gamma", body=body
    )
    answer = wire.decode_answer(core.call(uri, wire.encode(message), 5.0))
    assert not answer.ok
    assert "this node is alpha" in answer.why
    message = message.model_copy(update={"to": "alpha"})
    answer = wire.decode_answer(core.call(uri, wire.encode(message), 5.0))
    assert "is not the node" in answer.why
    assert core.call(uri, b"\xff" * 100, 5.0)  # an answer, and the server goes on
    assert pair.alpha.status()["epoch"] == 1


def test_a_write_between_a_meeting_and_its_session(pair: Pair) -> None:
    """The other node was told that it lacks nothing: it is told anew, and then used."""
    pair.bring_up()
    pair.alpha.stop()
    gate = pair.folder / "gate"
    pair.alpha.serve(f"begin_marked:1=wait:{gate}")
    reached = gate.with_name(f"{gate.name}.reached")
    support.wait_until(reached.exists, "alpha to have met beta")
    pair.alpha.write(MIB, CONTENT)
    gate.touch()
    pair.wait_in_sync()
    assert "it has missed a write in the meantime" in pair.alpha.log
    assert pair.alpha.status()["generation"] == pair.beta.status()["generation"]
    pair.assert_equal()


def test_no_connection_is_refused_while_a_role_changes(pair: Pair) -> None:
    """The sockets listen on: who connects meanwhile is the next server's client."""
    pair.bring_up()
    ending = threading.Event()
    refused: list[OSError] = []

    def knock() -> None:
        while not ending.is_set():
            try:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(pair.alpha.socket))
            except OSError as error:
                refused.append(error)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    try:
        pair.alpha.ask("demote", force=True)
        pair.alpha.wait_role("secondary")
        pair.alpha.ask("promote", force=False)
        pair.alpha.wait_role("primary")
    finally:
        ending.set()
        thread.join()
    assert refused == []
    pair.wait_in_sync()
    assert pair.primaries == ["alpha"]


def test_a_resync_of_a_node_in_use_is_known_there(pair: Pair) -> None:
    """Cut off, its image would be of no instant: it could not be promoted."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.stop()
    gate = pair.folder / "gate"
    pair.alpha.serve(f"resync_after_read:1=wait:{gate}")
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    pair.alpha.ask("invalidate", remote="beta")
    reached = gate.with_name(f"{gate.name}.reached")
    support.wait_until(reached.exists, "alpha to copy")
    assert pair.beta.status()["state"] == "inconsistent"
    pair.alpha.kill()
    pair.beta.wait_state("inconsistent")
    with pytest.raises(RoleError, match="may not be promoted"):
        pair.beta.ask("promote", force=True)
    gate.touch()
    pair.alpha.serve()
    pair.wait_in_sync()
    pair.assert_equal()


def test_policy_stop_refuses_no_step_of_the_nodes(pair: Pair) -> None:
    """A node that is missing comes in sync; without it the primary gives way."""
    text = pair.config.read_text()
    pair.config.write_text(text.replace("[tls]", 'policy = "stop"\n[tls]'))
    pair.bring_up()
    pair.alpha.write(0, CONTENT)
    pair.beta.kill()
    support.wait_until(
        lambda: not pair.alpha.status()["peers"][0]["connected"], "the loss of beta"
    )
    pair.alpha.cli("demote", str(pair.config), "--force")
    pair.alpha.wait_role("secondary")
    pair.beta.serve()
    pair.beta.ask("promote", force=False)
    pair.wait_in_sync()
    assert pair.beta.read(0, len(CONTENT)) == CONTENT
    pair.assert_equal()
