# SPDX-License-Identifier: BSD-3-Clause
"""
A split brain of two real nodes is resolved: what the losing node alone had is saved.

A node is killed at each durable step of it, on either side. Then the nodes are started
again, and `resolve` once more ends it: the kept node's writes are on both disks, and
the losing node's are in a keep file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from e2e.lib.clients import connect, nbd
from e2e.lib.harness import MIB, command
from e2e.lib.node_points import RESOLVE_POINTS
from e2e.lib.node_site import Node, Pair

from nbd_mirror.volume.keep_file import FOLDER, KeepReader, keep_names

LEFT, RIGHT = b"alpha" * 13107 + b"a", b"beta " * 13107 + b"b"  # a region each
BOTH = b"first" * 13107 + b"f"
REGION = 64 << 10


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give two nodes, nothing created yet."""
    return Pair(run_dir, processes)


def split(pair: Pair) -> None:
    """Let both nodes write alone: at 1 MiB both, and each at a place of its own."""
    pair.bring_up()
    pair.alpha.write(MIB, BOTH)
    pair.beta.kill()
    pair.alpha.write(MIB, LEFT)
    pair.alpha.write(2 * MIB, LEFT)
    pair.alpha.kill()
    pair.beta.serve()
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    pair.beta.write(MIB, RIGHT)
    pair.beta.write(3 * MIB, RIGHT)


def serve_split(pair: Pair) -> None:
    """Split the nodes, serve both, and wait until they say so."""
    split(pair)
    pair.alpha.serve()
    wait_split(pair)


def wait_split(pair: Pair) -> None:
    """Wait until both nodes say that they are split."""
    for node in pair.nodes:
        support.wait_until(
            functools.partial(is_split, node),
            f"{node.name} to say that they are split",
            timeout_s=30,
        )


def is_split(node: Node) -> bool:
    """Tell whether a node says that the two are split."""
    status = node.status()
    why = status.get("why", "")
    return "resolve" in status.get("hint", "") or "is primary" in why


def kept_content(node: Node) -> dict[int, bytes]:
    """Give what the keep files of a node hold, the latest last, by offset."""
    found: dict[int, bytes] = {}
    for name in keep_names(node.state):
        with KeepReader(node.state / FOLDER / name) as reader:
            assert not reader.broken()
            for region in reader.regions:
                found[region * REGION] = reader.read(region) or b""
    return found


def assert_resolved(pair: Pair, keep: Node) -> None:
    """Both disks have what *keep* has, and the keep file what the other one had."""
    lose = pair.other(keep)
    mine, theirs = (LEFT, RIGHT) if keep is pair.alpha else (RIGHT, LEFT)
    own, foreign = (2, 3) if keep is pair.alpha else (3, 2)
    pair.wait_in_sync()
    assert pair.primaries == [keep.name]
    assert keep.read(MIB, REGION) == mine
    assert keep.read(own * MIB, REGION) == mine
    assert keep.read(foreign * MIB, REGION) == bytes(REGION)
    saved = kept_content(lose)
    assert saved[MIB] == theirs
    assert saved[foreign * MIB] == theirs
    assert saved[own * MIB] == bytes(REGION)
    assert not keep_names(keep.state)
    keep.write(4 * MIB, LEFT)
    pair.assert_equal()


@pytest.mark.parametrize("asked", ["alpha", "beta"])
def test_the_primary_is_kept(pair: Pair, asked: str) -> None:
    """Asked on either node: the secondary is saved, and then made equal."""
    serve_split(pair)
    node = pair.alpha if asked == "alpha" else pair.beta
    before = pair.alpha.local.read_bytes()
    done = node.cli("resolve", str(pair.config), "--keep", "beta", "--dry-run")
    assert "3 regions (192KiB) of alpha" in done.stdout, done.stdout
    assert "nothing was changed" in done.stdout
    assert not (pair.alpha.state / FOLDER).exists()
    assert pair.alpha.local.read_bytes() == before
    done = node.cli("resolve", str(pair.config), "--keep", "beta")
    (name,) = keep_names(pair.alpha.state)
    assert name in done.stdout
    assert "3 regions (192KiB)" in done.stdout, done.stdout
    path = pair.alpha.state / FOLDER / name
    assert path.stat().st_mode & 0o777 == 0o600
    assert_resolved(pair, pair.beta)
    again = node.cli("resolve", str(pair.config), "--keep", "beta", check=False)
    assert again.returncode in (10, 18)


@pytest.mark.parametrize("asked", ["alpha", "beta"])
def test_the_secondary_is_kept(pair: Pair, asked: str) -> None:
    """The primary is demoted, but not while clients use it; then the other serves."""
    serve_split(pair)
    node = pair.alpha if asked == "alpha" else pair.beta
    words = ("resolve", str(pair.config), "--keep", "alpha")
    client = connect(pair.beta.uri)
    done = node.cli(*words, check=False)
    assert done.returncode != 0
    assert "clients use beta" in done.stderr
    assert "demote" in done.stderr
    assert not keep_names(pair.beta.state)
    client.pwrite(RIGHT, 3 * MIB)
    client.shutdown()
    support.wait_until(lambda: not pair.beta.ask("status")["clients"], "no clients")
    done = node.cli(*words)
    assert "saved on beta: 3 regions (192KiB)" in done.stdout, done.stdout
    pair.alpha.wait_role("primary")
    assert_resolved(pair, pair.alpha)


def test_what_is_no_split_brain_is_left_alone(pair: Pair) -> None:
    """One clear line, and nothing changes; and so for a name that is no node."""
    pair.bring_up()
    pair.alpha.write(MIB, LEFT)
    before = pair.alpha.status()["epoch"], pair.alpha.status()["generation"]
    for node in pair.nodes:
        for keep in ("alpha", "beta"):
            words = ("resolve", str(pair.config), "--keep", keep)
            done = node.cli(*words, check=False)
            assert done.returncode in (9, 18), done
            assert "are no split brain" in done.stderr
            assert "nothing was changed" in done.stderr
    done = pair.alpha.cli("resolve", str(pair.config), "--keep", "gamma", check=False)
    assert (done.returncode, "none is called" in done.stderr) == (3, True)
    pair.wait_in_sync()
    status = pair.alpha.status()
    assert (status["epoch"], status["generation"]) == before
    pair.assert_equal()


LOSER = ("resolve_begun", "keep_written", "keep_stored", "choice_answered")
LOSER_STORES = ("given_up_marked", "given_up_stored")
CASES = [
    *(("beta", "alpha", point) for point in (*LOSER, *LOSER_STORES)),
    ("beta", "beta", "chosen_stored"),
    *(("alpha", "beta", point) for point in (*LOSER, *LOSER_STORES)),
    ("alpha", "alpha", "chosen_stored"),
]


@pytest.mark.slow
@pytest.mark.timeout(300)  # several starts and waits, each with a deadline
@pytest.mark.parametrize(("keep", "faulty", "point"), CASES)
def test_killed_at(pair: Pair, keep: str, faulty: str, point: str) -> None:
    """Killed there and started again, `resolve` ends it, and nothing is lost."""
    kept, killed = (getattr(pair, name) for name in (keep, faulty))
    assert isinstance(kept, Node)
    assert isinstance(killed, Node)
    split(pair)
    fault = f"{point}=kill"
    if killed is pair.alpha:
        pair.alpha.serve(fault)
    else:
        pair.beta.stop()
        pair.beta.serve(fault)
        pair.alpha.serve()
    wait_split(pair)
    words = ("resolve", str(pair.config), "--keep", keep)
    pair.other(killed).cli(*words, check=False)
    assert killed.ended() == -signal.SIGKILL, killed.log
    killed.serve()
    end_split(pair, kept)
    assert_resolved(pair, kept)


def test_every_point_has_a_case() -> None:
    """A point of it at which no node is killed is not tested."""
    assert {point for _, _, point in CASES} == RESOLVE_POINTS


def end_split(pair: Pair, kept: Node) -> None:
    """Resolve again if that is still to be done, and promote the kept node."""

    def settled() -> bool:
        if kept.role == "primary" and kept.status()["state"] == "in_sync":
            return True
        words = ("resolve", str(pair.config), "--keep", kept.name)
        kept.cli(*words, check=False)
        if kept.role != "primary":
            kept.cli("promote", str(pair.config), check=False)
        return False

    support.wait_until(settled, "the nodes to settle", timeout_s=60)


def test_a_keep_file_is_listed_opened_and_deleted(pair: Pair) -> None:
    """The losing node's image is read as it was, and a broken record as an error."""
    serve_split(pair)
    before = pair.alpha.local.read_bytes()
    pair.beta.cli("resolve", str(pair.config), "--keep", "beta")
    pair.wait_in_sync()
    config, (name,) = str(pair.config), keep_names(pair.alpha.state)
    listed = json.loads(pair.alpha.cli("keep", config, "--json").stdout)
    assert [one["id"] for one in listed] == [name]
    assert (listed[0]["kept"], listed[0]["regions"]) == ("beta", 3)
    assert name in pair.alpha.cli("keep", config).stdout
    assert "no keep files" in pair.beta.cli("keep", config, "list").stdout
    with opened(pair, name) as (client, said):
        assert client.is_read_only()
        assert bytes(client.pread(pair.size, 0)) == before
        with pytest.raises(nbd.Error):
            client.pwrite(LEFT, 0)
    assert "written to since" in said()
    path = pair.alpha.state / FOLDER / name
    words = bytearray(path.read_bytes())
    words[4096 + 16 + 100] ^= 1
    path.write_bytes(words)
    with opened(pair, name) as (client, said):
        with pytest.raises(nbd.Error, match="Input/output error"):
            client.pread(REGION, MIB)
        assert bytes(client.pread(REGION, 2 * MIB)) == LEFT
    assert "record in the keep file is broken" in said()
    taken = pair.folder / "taken.sock"
    taken.touch()
    again = ("keep", config, "open", name, "--socket", str(taken))
    refused = pair.alpha.cli(*again, check=False)
    assert "exists already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert taken.exists()
    refused = pair.alpha.cli("keep", config, "delete", name, check=False)
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    wrong = pair.alpha.cli(
        "keep", config, "delete", "../superblock", "--yes", check=False
    )
    assert (wrong.returncode, path.exists()) == (4, True)
    pair.alpha.cli("keep", config, "delete", name, "--yes")
    assert not path.exists()
    pair.assert_equal()


@contextlib.contextmanager
def opened(pair: Pair, name: str) -> Iterator[tuple[nbd.NBD, Callable[[], str]]]:
    """Open a keep file of alpha, and give a client and what the command has said."""
    socket, log = pair.folder / "kept.sock", pair.folder / "kept.log"
    words = ["keep", str(pair.config), "open", name, "--socket", str(socket)]
    shell = ["/bin/sh", "-c", 'exec "$@" >"$0" 2>&1', str(log)]
    server = pair.processes.start(
        [*shell, *command(), *words, "--node", "alpha"],
        env={"PYTHONPATH": str(support.ROOT)},
    )
    support.wait_until(socket.exists, "the socket")
    try:
        client = connect(f"nbd+unix:///?socket={socket}")
        yield client, log.read_text
        client.shutdown()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130, log.read_text()
    assert not socket.exists()
    assert "Traceback" not in log.read_text()
