# SPDX-License-Identifier: BSD-3-Clause
"""The Python face of a door for nodes: calls, maps, claims, fences and closed ones."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import requires_program, wait_until
from unit.volumes import make_params

from nbd_mirror._core import lib
from nbd_mirror.base.errors import ConfigError, NotRunningError, RemoteError
from nbd_mirror.rules.claim import Claim, format_claim, parse_claim
from nbd_mirror.volume import core
from nbd_mirror.volume.core import Call, CallKind, ListenerKind

TIMEOUT_S = 20.0
CLAIM = Claim(1, "alpha", 1, "0" * 32)


@dataclass
class Node:
    """A served volume whose listener is for nodes, and its control thread."""

    server: core.Server
    socket: Path
    name: str
    map: bytes = bytes(100)
    refusal: str = ""
    held: threading.Event | None = None  # it answers once this is set
    ended: list[Call] = field(default_factory=list)
    seen: list[Call] = field(default_factory=list)
    end_seen: threading.Event = field(default_factory=threading.Event)

    def uri(self, export: str) -> str:
        """Return the URI of an export."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    def control(self) -> None:
        """Answer calls until the server has ended."""
        while True:
            try:
                call = self.server.next_call(TIMEOUT_S)
            except NotRunningError:
                return
            if call is not None:
                self.judge(call)

    def judge(self, call: Call) -> None:
        """Answer one call."""
        self.seen.append(call)
        if self.held is not None:
            self.held.wait(TIMEOUT_S)
        if call.kind is CallKind.SESSION_ENDED:
            self.ended.append(call)
            self.end_seen.set()
        elif self.refusal:
            self.server.refuse(call, self.refusal)
        elif call.kind is CallKind.META:
            self.server.answer(call, call.words[::-1])
        elif call.kind is CallKind.DIRTY:
            self.server.answer(call, self.map)
        else:
            self.server.answer(call)


@contextmanager
def serving(server: core.Server, control: threading.Thread) -> Iterator[None]:
    """Run the server and its control thread."""
    runs = threading.Thread(target=server.run)
    runs.start()
    control.start()
    yield
    server.end()
    for thread in (runs, control):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.fixture
def node(run_dir: Path) -> Iterator[Node]:
    """Give a node that serves."""
    params = make_params(run_dir)
    core.create(params)
    path = run_dir / "door"
    with (
        core.Engine(params) as engine,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        engine.start()
        listener.bind(str(path))
        listener.listen()
        server = core.Server(engine, [listener.fileno()])
        server.set_listener(0, ListenerKind.NODES)
        server.start()
        node = Node(server, path, params.name)
        with serving(server, threading.Thread(target=node.control)):
            yield node
        with pytest.raises(NotRunningError):
            server.next_call(0.0)
        server.close()
        engine.stop()


def nbdinfo(node: Node, export: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run libnbd's own client."""
    return subprocess.run(
        ["nbdinfo", *options, node.uri(export)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_constants_of_the_protocol_are_those_of_the_header() -> None:
    """PROTOCOL.md has the sizes that the code uses."""
    text = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text()
    for name in ("NBDM_CALL_LEN", "NBDM_TEXT_LEN"):
        assert f"| `{name}` | {getattr(lib, name)} |" in text


def test_call_of_any_bytes_is_answered(node: Node) -> None:
    """A request arrives as it was sent, and the reply comes back."""
    for words in (b"{}", b"\xff\x00\xfe", b"x" * core.CALL_LEN):
        assert words[::-1] == core.call(node.uri(f"{node.name}.meta"), words, TIMEOUT_S)
    assert [call.kind for call in node.seen] == [CallKind.META] * 3


def test_call_too_long_is_refused_here(node: Node) -> None:
    """A request of more bytes than a call has never leaves."""
    with pytest.raises(ConfigError):
        core.call(node.uri(f"{node.name}.meta"), bytes(core.CALL_LEN + 1), TIMEOUT_S)
    assert not node.seen


def test_refusal_text_reaches_the_caller(node: Node) -> None:
    """A text comes back whole, and is cut between characters if it is too long."""
    node.refusal = "beta wurde in Epoche 2 befördert"
    with pytest.raises(RemoteError, match="in Epoche 2 befördert"):
        core.call(node.uri(f"{node.name}.meta"), b"{}", TIMEOUT_S)
    with pytest.raises(RemoteError, match="in Epoche 2"):
        core.fetch(node.uri(f"{node.name}.dirty"), 100, TIMEOUT_S)
    node.refusal = "é" * 1000
    with pytest.raises(RemoteError) as refused:
        core.call(node.uri(f"{node.name}.meta"), b"{}", TIMEOUT_S)
    assert "é" * (core.TEXT_LEN // 2) == str(refused.value)


def test_map_is_fetched_whole_or_not(node: Node) -> None:
    """The bytes are those that were served; another size is an error."""
    node.map = bytes(range(256)) * 9000
    uri = node.uri(f"{node.name}.dirty")
    assert node.map == core.fetch(uri, len(node.map), TIMEOUT_S)
    with pytest.raises(RemoteError, match="bytes, not 7"):
        core.fetch(uri, 7, TIMEOUT_S)


@contextmanager
def claiming(node: Node, export: str, script: str) -> Iterator[None]:
    """Hold a connection of libnbd's after it has run a script."""
    requires_program("nbdsh")
    words = ["-c", script, "-c", "print(1, flush=True)", "-c", "input(); h.shutdown()"]
    with subprocess.Popen(
        ["nbdsh", "-u", node.uri(export), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"},  # its Python
    ) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == b"1\n"
            yield
            client.communicate(b"\n", TIMEOUT_S)
        finally:
            client.kill()


def test_claim_is_read_by_the_rules(node: Node) -> None:
    """The export's name is the claim; a plain client of that name may write."""
    export = format_claim(node.name, CLAIM)
    with claiming(node, export, "h.pwrite(b'x' * 512, 0)"):
        assert node.seen[0].kind is CallKind.CLAIM
        assert (node.name, CLAIM) == parse_claim(node.seen[0].text)
        assert not node.ended
    assert node.end_seen.wait(TIMEOUT_S)
    assert [(export, True)] == [(call.text, call.clean) for call in node.ended]


def test_fence_ends_a_session_and_tells(node: Node) -> None:
    """What a fence cut is there to take before the next claim is answered."""
    export = format_claim(node.name, CLAIM)
    with claiming(node, export, "h.pread(512, 0)"):
        assert node.server.fence(TIMEOUT_S) == 1
        ended = node.server.take_ended()
        if not ended:  # the control thread was faster
            assert node.end_seen.wait(TIMEOUT_S)
            ended = node.ended
        assert [(export, False)] == [(call.text, call.clean) for call in ended]
        assert node.server.fence(TIMEOUT_S) == 0


def qemu_says(node: Node, export: str) -> str:
    """Return how qemu's client says that it gets no disk: with the server's text."""
    requires_program("qemu-img", "nbdinfo")
    done = subprocess.run(
        ["qemu-img", "info", node.uri(export)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("export", ["", "x", "meta"])
def test_plain_client_of_a_node_is_told_why(node: Node, export: str) -> None:
    """A client without a claim gets the text of a refusal, and is no call."""
    words = f"this address is for the nodes of volume {node.name}"
    assert words in qemu_says(node, export)
    assert nbdinfo(node, export).returncode != 0
    assert not node.seen


def test_client_of_a_closed_listener_is_told_why(node: Node) -> None:
    """A client learns who is primary, and is served once the listener is open."""
    why = "alpha is primary: connect there, or nbd-mirror promote pg.toml"
    node.server.set_listener(0, ListenerKind.CLOSED, why)
    assert why in qemu_says(node, "")
    for options in ((), ("--list",), ("--size",)):
        assert nbdinfo(node, "", *options).returncode != 0
    node.server.set_listener(0, ListenerKind.CLIENTS)
    assert nbdinfo(node, "", "--size").returncode == 0


def test_node_that_has_left_proves_nothing(node: Node) -> None:
    """Its certificate is gone, so a call in any node's name must not be carried out."""
    node.held = threading.Event()
    while not node.seen:
        with pytest.raises(RemoteError):
            core.call(node.uri(f"{node.name}.meta"), b"consent", 0.5)
    wait_until(
        lambda: node.server.why_not_of(node.seen[0], ["beta"]) != "",
        "the door to find out that the node has left",
        timeout_s=TIMEOUT_S,
    )
    assert "has left" in node.server.why_not_of(node.seen[0], ["beta"])
    node.held.set()


def test_late_answer_finds_no_one(node: Node) -> None:
    """An answer to a call that was answered is not an error."""
    core.call(node.uri(f"{node.name}.meta"), b"{}", TIMEOUT_S)
    assert node.server.answer(node.seen[0], b"again") is False
    assert node.server.refuse(node.seen[0], "no") is False
