# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes are set up, each mistake is made: one clear line, and nothing is lost.

What a secondary does with clients is here too: it turns them away, and says why.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.clients import nbd
from e2e.lib.pair import Pair

from nbd_mirror.base.errors import (
    AccessError,
    BusyError,
    ConfigError,
    FormatError,
    MissingError,
    UnsupportedError,
)


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give a pair of which nothing is created."""
    return Pair(run_dir, processes)


def assert_refused(uri: str, name: str) -> None:
    """Fail if a client gets the export *name*."""
    handle = nbd.NBD()
    handle.set_export_name(name)
    with pytest.raises(nbd.Error):
        handle.connect_uri(uri)


def edit(pair: Pair, old: str, new: str) -> None:
    """Change the file of both nodes."""
    text = pair.config.read_text()
    assert old in text
    pair.config.write_text(text.replace(old, new))


def test_secondaries_turn_clients_away(pair: Pair) -> None:
    """At `listen` and at the nodes' address; no byte of the disk is served."""
    pair.tls = False
    pair.write_config()
    pair.set_up()
    for node in pair.nodes:
        # libnbd keeps the text of a refusal to itself.
        asks = ["qemu-img", "info", f"nbd+unix:///?socket={node.socket}"]
        said = pair.processes.run(asks, check=False).stderr
        assert f"{node.name} is secondary" in said
        assert "nbd-mirror promote" in said
        for name in ("", "pg", "pg@1.alpha", "other.meta"):
            assert_refused(f"nbd://{node.address}", name)
    pair.alpha.stop()
    pair.beta.stop()
    assert pair.alpha.status()["node"]["role"] == "secondary"


def test_nodes_address_needs_the_key(pair: Pair) -> None:
    """A client without TLS gets nothing there, whatever it asks for."""
    pair.set_up()
    for name in ("", "pg", "pg.meta", "pg.dirty"):
        assert_refused(f"nbd://{pair.alpha.address}", name)


def test_two_nodes_with_one_name(pair: Pair) -> None:
    """Told before anything is made."""
    edit(pair, 'name = "beta"', 'name = "alpha"')
    said = pair.alpha.refused(ConfigError.exit_code, "create")
    assert 'two nodes are called "alpha"' in said
    assert not pair.alpha.state.exists()


def test_second_node_has_a_smaller_disk(pair: Pair) -> None:
    """Its create says so; the first node is not changed."""
    pair.alpha.cli("create")
    with pair.beta.image.open("r+b") as file:
        file.truncate(pair.size - 512)
    said = pair.beta.refused(ConfigError.exit_code, "create")
    assert f"the volume needs {pair.size}" in said
    assert not (pair.beta.state / "superblock").exists()


def test_file_of_another_volume_or_size_on_the_second_node(pair: Pair) -> None:
    """The state is of one volume, node and size; it refuses any other file."""
    for node in pair.nodes:
        node.cli("create")
    pair.alpha.cli("key")
    text = pair.config.read_text()
    edit(pair, 'name = "pg"', 'name = "qg"')
    said = pair.beta.refused(FormatError.exit_code, "status")
    assert "is the state of volume pg, not of qg" in said
    pair.config.write_text(text)
    edit(pair, f"size = {pair.size}", f"size = {pair.size // 2}")
    said = pair.beta.refused(ConfigError.exit_code, "serve")
    assert "size" in said
    pair.config.write_text(text)
    pair.beta.serve()


def test_wrong_node_name_serves_no_other_nodes_state(pair: Pair) -> None:
    """A --node of the other host, with paths that both hosts have."""
    edit(pair, str(pair.beta.state), str(pair.alpha.state))
    pair.alpha.cli("key")
    pair.alpha.cli("create")
    for words in (["create"], ["create", "--force"], ["serve"], ["status"]):
        said = pair.beta.refused(FormatError.exit_code, *words)
        assert "is the state of node alpha, not of beta" in said


def test_address_is_another_hosts(pair: Pair) -> None:
    """The server cannot listen there: one line, with what to correct."""
    edit(pair, pair.beta.address, "192.0.2.1:10810")
    pair.alpha.cli("key")
    pair.beta.cli("create")
    said = pair.beta.refused(ConfigError.exit_code, "serve")
    assert 'cannot listen on the address of node "beta", 192.0.2.1:10810' in said
    assert "correct `address` of node beta" in said


def test_address_is_in_use(pair: Pair) -> None:
    """By another program; the client's socket is left to the next start."""
    pair.alpha.cli("key")
    pair.beta.cli("create")
    host, port = pair.beta.address.split(":")
    with socket.create_server((host, int(port))):
        said = pair.beta.refused(BusyError.exit_code, "serve")
        assert f'listens on the address of node "beta", {pair.beta.address}' in said
    pair.beta.serve()


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda key: key.chmod(0o640), AccessError.exit_code, "other users may read"),
        (lambda key: key.unlink(), MissingError.exit_code, "the file is not there"),
        (
            lambda key: key.write_text("qg:" + "5f" * 32 + "\n"),
            ConfigError.exit_code,
            'is a key of "qg", not of "pg"',
        ),
    ],
    ids=["read by others", "missing", "of another volume"],
)
def test_key_is_checked_before_a_node_is_served(
    pair: Pair, spoil: Callable[[Path], object], code: int, words: str
) -> None:
    """A node with a key that is none would let nobody in, or anybody."""
    pair.alpha.cli("key")
    pair.alpha.cli("create")
    spoil(pair.key)
    assert words in pair.alpha.refused(code, "serve")


def test_doors_of_nbdkit_refuse_a_node(pair: Pair) -> None:
    """Other nodes connect to the direct door alone."""
    pair.alpha.cli("key")
    pair.alpha.cli("create")
    said = pair.alpha.refused(UnsupportedError.exit_code, "serve", "--door", "python")
    assert "the python door cannot serve a node" in said
