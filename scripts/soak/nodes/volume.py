# SPDX-License-Identifier: BSD-3-Clause
"""
One episode's volume of nodes, its clients, and the operator who commands it.

The operator's commands are the real ones, and each must end in time. After each
promotion the clients go to the promoted node, and all that it holds is judged
(branch.py). Often in between the soak looks at what the nodes say of themselves:
what they promise then counts, and two that serve at once are a violation, unless the
operator has forced a promotion since all nodes were in sync.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import support
from e2e.lib.clients import connect, nbd
from e2e.lib.pair import Node

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.volume import config as config_module
from nbd_mirror.volume import control
from nbd_mirror.volume.offline import stopped_status

from ..judge import complain
from ..load import Load, ViolationError, read_all
from ..register import BLOCK
from .branch import Branch
from .hosts import Hosts, Network, pause, run_on
from .plan import NodesPlan

__all__ = ["BLOCKS", "RefusedError", "Volume"]

SIZE = 8 << 20  # bytes
BLOCKS = SIZE // BLOCK
COMMAND_S = 75.0  # limit of a command
LOOK_S = 0.25
ALONE_S = 20.0  # of a plain remote's server, to listen


class RefusedError(Exception):
    """The product does not take such a volume; it says why."""


class Volume:
    """
    One episode's nodes.

    Args:
        folder: with a short path.
        plan: of the episode.
        counts: of the whole run; added to.
        tick: called often during a wait.
    """

    def __init__(
        self,
        folder: Path,
        plan: NodesPlan,
        counts: Counter[str],
        tick: Callable[[], None],
    ) -> None:
        self.plan, self.counts, self._tick = plan, counts, tick
        logs = folder / "logs"
        logs.mkdir(parents=True)
        self.processes = support.Processes(logs)
        self.network = Network(plan.nodes)
        self.plain = folder / "plain.img" if plan.plain else None
        self._plain_socket = folder / "plain.sock" if plan.plain else None
        self.hosts = Hosts(
            folder,
            self.processes,
            self.network,
            plan.nodes,
            size=SIZE,
            plain=self._plain_socket,
            region_size=plan.region_size,
            policy=plan.policy,
        )
        first = Branch(BLOCKS, plan.run)
        self.nodes = self.hosts.nodes
        self.branches = dict.fromkeys((node.name for node in self.nodes), first)
        self.load = Load(self.nodes[0].uri, BLOCKS, first, plan.name, clients=4)
        self.frozen: set[str] = set()
        self.forced = False  # since all nodes were in sync
        self.doubted = False  # two primaries may have written to the plain remote
        self._looked = 0.0
        self._up: set[str] = set()

    # --- hosts ---

    def bring_up(self) -> None:
        """Start everything; return once all nodes are in sync."""
        if self.plain is not None:
            with self.plain.open("wb") as file:
                file.truncate(SIZE)
            self._serve_plain()
        self.nodes[0].cli("key")
        for node in self.nodes:
            done = node.cli("create", check=False)
            if done.returncode:
                raise RefusedError(done.stderr.strip())
            self.serve(node)
        self.nodes[0].cli("promote")
        support.wait_until(self.settled, "all nodes to be in sync", timeout_s=60)
        self.load.start()

    def _serve_plain(self) -> None:
        socket = self._plain_socket
        assert socket is not None
        self.processes.start(
            ["nbdkit", "-f", "-U", str(socket), "file", str(self.plain)]
        )
        support.wait_until(socket.exists, "the plain remote", timeout_s=ALONE_S)

    def serve(self, node: Node) -> None:
        """Start a node's server, unless it runs."""
        if not node.alive:
            node.serve()
        self._up.add(node.name)

    def kill(self, node: Node) -> None:
        """Kill a node's server."""
        self._up.discard(node.name)
        self.frozen.discard(node.name)
        if node.alive:
            node.kill()
            self.counts["kills of a node"] += 1
        self.ended(node, "was killed")

    def stop(self, node: Node) -> None:
        """Stop a node's server cleanly."""
        self._up.discard(node.name)
        code, said = run_on(node, "stop", limit_s=COMMAND_S)
        if code != "0":
            raise ViolationError(f"stop of {node.name} failed: {said}")
        support.wait_until(lambda: not node.alive, f"{node.name} to end")
        self.counts["clean stops"] += 1
        self.ended(node, "was stopped")

    def ended(self, node: Node, how: str) -> None:
        """Note that a node executes nothing any more."""
        branch = self.branches[node.name]
        # What is under way with the primary goes on when a secondary ends.
        if branch is not self.load.checker or node.uri == self.load.target[0]:
            branch.server_ended(f"{node.name} {how}")
        else:
            branch.note(f"{node.name} {how}")

    def freeze(self, node: Node) -> None:
        """Stop a node's server as a signal does."""
        if node.alive:
            pause(node, frozen=True)
            self.frozen.add(node.name)

    def thaw(self, node: Node) -> None:
        """Let it go on."""
        if node.name in self.frozen and node.alive:
            pause(node, frozen=False)
        self.frozen.discard(node.name)

    # --- what the nodes say ---

    def status(self, node: Node) -> dict[str, Any]:
        """Return what a node says of itself; nothing if it does not answer."""
        if not node.alive or node.name in self.frozen:
            return {}
        with contextlib.suppress(MirrorError):
            found: dict[str, Any] = control.call(node.state, "status", 10.0)["node"]
            return found
        return {}

    def primaries(self) -> list[Node]:
        """Return the nodes that say that they are primary."""
        return [one for one in self.nodes if self.status(one).get("role") == "primary"]

    def watch(self) -> None:
        """Judge what happens meanwhile; called often."""
        self._tick()
        self.load.check()
        for node in self.nodes:
            if node.name in self._up and not node.alive:
                raise ViolationError(
                    f"{node.name} ended by itself:\n{node.log[-3000:]}"
                )
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self.settled()

    def rest(self, seconds: float) -> None:
        """Let time pass, watching."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.watch()
            time.sleep(min(left, 0.05))

    def settled(self) -> bool:
        """Look at all nodes; return whether all say that they are in sync."""
        since = {branch: branch.now() for branch in set(self.branches.values())}
        seen = {node.name: self.status(node) for node in self.nodes}
        leaders = [one for one in self.nodes if seen[one.name].get("role") == "primary"]
        if len(leaders) > 1 and not self.forced:
            self._check_alone(leaders[0], leaders[1])
        if len(leaders) != 1:
            return False
        leader = leaders[0]
        branch, said = self.branches[leader.name], seen[leader.name]
        names = [peer["name"] for peer in said["peers"] if peer["in_sync"]]
        done = len(names) + 1 == len(self.nodes) and all(
            one.get("state") == "in_sync" and one.get("leader") == leader.name
            for one in seen.values()
        )
        # A forced promotion may not have reached the earlier primary yet.
        if done or not self.forced:
            for name in names:
                branch.holds(name, since[branch])
                self.branches[name] = branch
        if done:
            self.forced = False
            if self.load.target != (leader.uri, branch):
                self.load.move(leader.uri, branch)
        return done

    def _check_alone(self, one: Node, other: Node) -> None:
        """Raise ViolationError if two nodes serve at the same time, unforced."""
        try:
            client = connect(one.uri)
            client.pread(BLOCK, 0)
            connect(other.uri).pread(BLOCK, 0)
            client.pread(BLOCK, 0)
        except nbd.Error:
            return
        raise ViolationError(
            f"{one.name} and {other.name} serve clients at once, and no operator "
            f"forced it:\n{self.status(one)}\n{self.status(other)}"
        )

    # --- the operator ---

    def command(self, node: Node, word: str, *words: str) -> bool:
        """Run a command on a node; return whether it succeeded. It must end in time."""
        try:
            code, said = run_on(node, word, *words, limit_s=COMMAND_S)
        except subprocess.TimeoutExpired:
            raise ViolationError(
                f"{word} on {node.name} did not end within {COMMAND_S:g} s"
            ) from None
        self.note(f"  {word} {' '.join(words)} on {node.name}: {code} {said[:160]}")
        if code != "0" and not said.startswith("nbd-mirror: "):
            raise ViolationError(f"{word} on {node.name}: {code}, {said}")
        self.counts[f"{word}, {'done' if code == '0' else 'refused'}"] += 1
        return code == "0"

    def note(self, text: str) -> None:
        """Add an event to the histories."""
        for branch in set(self.branches.values()):
            branch.note(text)

    def promote(self, node: Node, *, force: bool) -> bool:
        """Promote a node, move the clients to it, and judge all that it holds."""
        said = self.status(node)
        if said.get("role") == "primary":
            return False
        # What may be promoted anyhow is no forced promotion.
        force = force and said.get("promotable", {}).get("answer") == "force"
        whole = force and self._nothing_alone(node, said)
        if not self.command(node, "promote", *(["--force"] if force else [])):
            return False
        if force:
            self._forced(node, whole=whole)
        else:
            self.serves(node)
        return True

    def serves(self, node: Node) -> None:
        """Move the clients to a primary; judge all that it holds by its branch."""
        branch = self.branches[node.name]
        verdicts = read_all(node.uri, BLOCKS, branch)
        complain(verdicts or [])
        self.counts["promotions judged"] += verdicts is not None
        self.load.move(node.uri, branch)

    def _nothing_alone(self, node: Node, said: dict[str, Any]) -> bool:
        """Tell whether the last primary is dead, and had answered nothing alone."""
        last = next(one for one in self.nodes if one.uri == self.load.target[0])
        if last is node or last.alive:
            return False
        # Nodes of one generation hold the same answered writes (docs/nodes.md).
        stored = stopped_status(config_module.load(self.hosts.config, last.name)).node
        return stored is not None and stored.generation == said.get("generation")

    def _forced(self, node: Node, *, whole: bool) -> None:
        branch = self.load.checker
        assert isinstance(branch, Branch)
        self.forced = True
        self.doubted |= any(one.alive for one in self.nodes if one is not node)
        content = self._read(node.uri)
        complain(branch.judge_forced(0, content, node.name, whole=whole))
        self.counts["forced promotions judged"] += 1
        self.counts["forced, nothing may be missing"] += whole
        fork = branch.fork(content, f"{node.name}, forced")
        self.branches[node.name] = fork
        self.load.move(node.uri, fork)

    def _read(self, uri: str) -> bytes:
        client = connect(uri)
        step = 1 << 20
        parts = [bytes(client.pread(step, at)) for at in range(0, SIZE, step)]
        client.shutdown()
        return b"".join(parts)

    # --- the end ---

    def compare(self, when: str) -> None:
        """Judge all images; clients are quiet, and all nodes said "in sync"."""
        branch = self.load.checker
        images = {node.name: node.image.read_bytes() for node in self.nodes}
        if self.plain is not None and not self.doubted and self._plain_in_sync():
            images["plain"] = self.plain.read_bytes()
        self.counts["comparisons"] += len(images) - 1
        name, *others = images
        complain(branch.judge(0, images[name], f"the disk of {name}, {when}"))
        for other in others:
            self._equal(images, (name, other), when)

    def _equal(self, images: dict[str, bytes], names: Iterable[str], when: str) -> None:
        name, other = names
        if images[name] == images[other]:
            return
        differ = [
            block
            for block in range(BLOCKS)
            if images[name][block * BLOCK : (block + 1) * BLOCK]
            != images[other][block * BLOCK : (block + 1) * BLOCK]
        ]
        at = slice(differ[0] * BLOCK, (differ[0] + 1) * BLOCK)
        both = (
            self.load.checker.explain(differ[0], images[one][at], one)
            for one in (name, other)
        )
        raise ViolationError(
            f"{other} differs from {name} {when} though it is in sync, in "
            f"{len(differ)} blocks: {differ[:20]}\n" + "\n".join(map(str, both))
        )

    def _plain_in_sync(self) -> bool:
        """Tell whether the primary says so of its plain remote, now or stored."""
        for node in self.primaries():
            with contextlib.suppress(MirrorError):
                for one in control.call(node.state, "status", 10.0)["remotes"]:
                    if one["name"] == "plain":
                        return bool(one["state"] == "in_sync" and one["connected"])
        return False

    def close(self) -> None:
        """End everything and add up."""
        self.load.ending = True
        for node in self.nodes:
            self.thaw(node)
        self.processes.close()
        self.load.stop()
        self.network.close()
        self.load.add_up(self.counts)
