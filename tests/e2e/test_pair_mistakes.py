# SPDX-License-Identifier: BSD-3-Clause
"""
Mistakes with two real nodes: each gets one clear line, and costs no data.

test_pair_setup.py has those that are found before a node is served.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB, command
from e2e.lib.pair import Node, Pair

from nbd_mirror.base.errors import ConfigError, MirrorError, RoleError
from nbd_mirror.rules.claim import SESSIONS_AHEAD
from nbd_mirror.server.node_others import node_uri
from nbd_mirror.volume import core
from nbd_mirror.volume.config import load

# The clock of a host that is a day ahead.
AHEAD = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime (clockid_t clock, struct timespec *now)
{
  int rc = (int)syscall (SYS_clock_gettime, clock, now);
  if (rc == 0 && clock == CLOCK_REALTIME)
    now->tv_sec += 86400;
  return rc;
}
time_t time (time_t *to)
{
  struct timespec now;
  clock_gettime (CLOCK_REALTIME, &now);
  return to ? (*to = now.tv_sec) : now.tv_sec;
}
"""


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give a pair of which nothing is created."""
    return Pair(run_dir, processes)


def fill(node: Node) -> bytes:
    """Put data of its own on a node's disk."""
    content = os.urandom(MIB)
    with node.image.open("r+b") as file:
        file.write(content)
    return content


def starts_with(node: Node, content: bytes) -> bool:
    """Whether the node's disk begins with *content*."""
    with node.image.open("rb") as file:
        return file.read(len(content)) == content


def fill_up(path: Path) -> None:
    """Leave no room in the file system of *path*."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    assert os.statvfs(path).f_bfree == 0


def test_data_on_both_disks_of_a_new_pair(pair: Pair) -> None:
    """Neither disk is changed until an operator promotes one; then that one counts."""
    mine, other = fill(pair.alpha), fill(pair.beta)
    pair.set_up()
    for node in pair.nodes:
        node.wait_node(
            lambda found: found["peers"][0]["connected"], f"{node.name} to meet"
        )
        assert node.node()["state"] == "no_data"
        assert "on the node whose disk has the data" in node.node()["hint"]
    assert starts_with(pair.alpha, mine)
    assert starts_with(pair.beta, other)
    pair.alpha.cli("promote")
    pair.beta.wait_in_sync()
    assert starts_with(pair.beta, mine)


def test_node_without_data_says_what_its_promotion_would_lose(pair: Pair) -> None:
    """`create --force` on one node: its status does not offer it as if it had data."""
    content = fill(pair.alpha)
    pair.bring_up()
    pair.beta.stop()
    pair.beta.cli("create", "--force")
    pair.alpha.kill()
    pair.beta.serve()
    found = pair.beta.node()["promotable"]
    assert found["answer"] == "force"
    assert "it holds no data of the volume" in found["reason"]
    assert "all that another node holds" in found["lost"]
    said = pair.beta.refused(RoleError.exit_code, "promote")
    assert "it holds no data of the volume, and another node may" in said
    pair.alpha.serve()
    assert starts_with(pair.alpha, content)


def test_switchover_to_a_node_that_is_lost(pair: Pair) -> None:
    """Waiting does not help: it says that the node is away, and stays primary."""
    pair.bring_up()
    pair.beta.kill()
    support.wait_until(
        lambda: not pair.alpha.node()["peers"][0]["in_sync"], "alpha to notice"
    )
    said = pair.alpha.refused(RoleError.exit_code, "switchover")
    assert "beta is not connected, so this node stays primary" in said
    assert "nbd-mirror status" in said
    assert "wait" not in said.partition("try:")[2]
    assert pair.alpha.node()["role"] == "primary"


def test_another_size_in_the_file(pair: Pair) -> None:
    """The line has both sizes and what to write; nothing is changed."""
    pair.alpha.cli("key")
    pair.beta.cli("create")
    text = pair.config.read_text()
    pair.config.write_text(text.replace(str(pair.size), str(pair.size // 2)))
    said = pair.beta.refused(ConfigError.exit_code, "serve")
    assert f"size is {pair.size // 2}, but the volume was made with {pair.size}" in said
    assert f"try: size = {pair.size} in the configuration" in said


def test_another_key(pair: Pair) -> None:
    """Both sides say that it is the key, and what helps."""
    pair.alpha.cli("key")
    pair.alpha.cli("create")
    pair.alpha.serve()
    pair.alpha.cli("key", "--force")
    pair.beta.cli("create")
    pair.beta.serve()
    # The servers read the file for each call: so alpha has to keep the old one.
    text = pair.key.read_text()
    assert text
    other = pair.folder / "other.key"
    other.write_text(f"pg:{'5f' * 32}\n")
    other.chmod(0o600)
    config = load(pair.config, "alpha")
    uri = node_uri(config, "beta", "pg.meta").replace(str(pair.key), str(other))
    with pytest.raises(MirrorError, match="has another key, or none: copy the key's"):
        core.call(uri, b"{}", 10.0)
    words = "turned away: TLS: the other side has another key, or none: copy the key's"
    support.wait_until(lambda: words in pair.beta.log, "beta to say so")


def test_clock_that_is_a_day_off(pair: Pair) -> None:
    """No rule depends on a clock: copied, lost, forced, and back."""
    source, shim = pair.folder / "ahead.c", pair.folder / "ahead.so"
    source.write_text(AHEAD)
    words = ["-shared", "-fPIC", "-o", str(shim), str(source)]
    pair.processes.run(["gcc", *words])
    pair.alpha.cli("key")
    for node in pair.nodes:
        node.cli("create")
    pair.beta.environment["LD_PRELOAD"] = str(shim)
    for node in pair.nodes:
        node.serve()
    pair.alpha.cli("promote")
    pair.beta.wait_in_sync()
    client = pair.alpha.client()
    client.pwrite(b"x" * 4096, 0)
    client.flush()
    client.shutdown()
    pair.alpha.kill()
    since = pair.beta.node()["peers"][0]["since"]
    ahead_s = datetime.fromisoformat(since).timestamp() - time.time()
    assert 80000 < ahead_s < 90000, "beta's clock is right"
    pair.beta.cli("promote", "--force")
    assert starts_with(pair.beta, b"x" * 4096)
    pair.alpha.serve()
    pair.alpha.wait_in_sync()
    assert pair.alpha.node()["role"] == "secondary"


def test_promotions_of_both_nodes_at_once(pair: Pair) -> None:
    """One of them wins, or none, and the other is told why: one door is open."""
    pair.set_up()
    for node in pair.nodes:
        node.wait_node(
            lambda found: found["peers"][0]["connected"], f"{node.name} to meet"
        )
    files = [pair.folder / f"{node.name}.said" for node in pair.nodes]
    shell = ["/bin/sh", "-c", 'exec "$@" 2>"$0"']
    started = [
        pair.processes.start(
            [
                *(*shell, str(file), *command()),
                *("promote", pair.config, "--node", node.name),
            ],
            env={"PYTHONPATH": str(support.ROOT)},
        )
        for node, file in zip(pair.nodes, files, strict=True)
    ]
    codes = [one.wait(60) for one in started]
    said = [file.read_text() for file in files]
    assert codes.count(0) <= 1, said
    for code, error in zip(codes, said, strict=True):
        assert "Traceback" not in error
        assert code == 0 or error.startswith("nbd-mirror: "), error
    if 0 not in codes:
        pair.alpha.cli("promote")
    for node in pair.nodes:
        node.wait_in_sync()
    roles = sorted(node.node()["role"] for node in pair.nodes)
    assert roles == ["primary", "secondary"]


def test_state_without_room_at_a_promotion(pair: Pair) -> None:
    """A full file system under the state: one line, and nothing is lost."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    beta = pair.beta
    beta.state.mkdir()
    words = ["-t", "tmpfs", "-o", "size=8m,mode=700", "none", str(beta.state)]
    pair.processes.run(["mount", *words])
    try:
        pair.bring_up()
        pair.alpha.kill()
        fill_up(beta.state / "filler")
        done = beta.cli("promote", "--force", check=False)
        assert (done.returncode == 0) == (not done.stderr), done.stderr
        (beta.state / "filler").unlink()
        if done.returncode:
            assert done.stderr.startswith("nbd-mirror: "), done.stderr
            beta.cli("promote", "--force")
        pair.alpha.serve()
        pair.alpha.wait_in_sync()
        for node in (beta, pair.alpha):
            node.stop()
        pair.assert_equal()
    finally:
        if beta.alive:
            beta.kill()
        pair.processes.run(["umount", "--lazy", str(beta.state)])


def test_claim_of_the_last_session(pair: Pair) -> None:
    """Another one with the key locks no primary out: that goes on behind it."""
    pair.bring_up()
    config = load(pair.config, "alpha")
    epoch = pair.alpha.node()["epoch"]

    def claim(session: int) -> str:
        export = f"pg@{epoch}.alpha.{session}.{'a' * 32}"
        with pytest.raises(MirrorError) as caught:
            core.fetch(node_uri(config, "beta", export), 32, 10.0)
        return str(caught.value)

    assert "is too far after epoch" in claim((1 << 64) - 1)
    assert pair.alpha.node()["peers"][0]["in_sync"]
    claim(SESSIONS_AHEAD)  # this one is granted, and cuts alpha's
    client = pair.alpha.client()
    client.pwrite(b"y" * 4096, 0)
    client.flush()
    client.shutdown()
    pair.alpha.wait_in_sync()
    pair.alpha.wait_node(lambda found: found["peers"][0]["in_sync"], "alpha in sync")
    assert f"session {SESSIONS_AHEAD + 1} may write" in pair.beta.log
