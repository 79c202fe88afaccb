# SPDX-License-Identifier: BSD-3-Clause
"""A volume with nodes: one file for all hosts, and the line each mistake gets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nbd_mirror.base.errors import ConfigError, UnsupportedError
from nbd_mirror.base.listen import parse_address
from nbd_mirror.volume.config import VolumeConfig, check_nodes, load, to_params
from nbd_mirror.volume.config_nodes import NODE_VARIABLE
from nbd_mirror.volume.model import RemoteParams

GOOD = """\
name = "pg"
size = "10GiB"
local = "/srv/pg.img"
state = "/var/lib/nbd-mirror/pg"
listen = "unix:/run/nbd-mirror/pg.sock"

[[node]]
name = "alpha"
address = "10.0.0.1:10810"

[[node]]
name = "beta"
address = "10.0.0.2:10810"
local = "/dev/vg0/pg"
listen = "tcp:127.0.0.1:10809"
max_clients = 5

[tls]
key = "pg.key"
"""
REMOTE = '[[remote]]\nname = "dr"\nuri = "nbd://dr.example.net/pg"\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the path of a good file; this host has no name that is a node's."""
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.delenv(NODE_VARIABLE, raising=False)
    path = tmp_path / "pg.toml"
    path.write_text(GOOD)
    return path


def refusal(file: Path, node: str | None = "alpha") -> str:
    """Give the line that is told of a wrong file."""
    with pytest.raises(ConfigError) as caught:
        load(file, node)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("pg.toml: ")
    return caught.value.message


# --- which node this is ---


def test_keys_of_a_node_count_on_that_node_alone(file: Path) -> None:
    """What a node's table has overrides the top of the file, and nothing else does."""
    alpha, beta = load(file, "alpha"), load(file, "beta")
    assert ("alpha", "/srv/pg.img", 1024) == (
        *(alpha.node, alpha.local),
        alpha.max_clients,
    )
    assert ("beta", "/dev/vg0/pg", 5) == (beta.node, beta.local, beta.max_clients)
    assert beta.listen.uri == "nbd://127.0.0.1:10809"
    assert alpha.state == beta.state == "/var/lib/nbd-mirror/pg"
    assert alpha.size == beta.size == 10 << 30
    assert alpha.remotes == ()
    assert alpha.tls is not None
    assert alpha.tls.key == f"{file.parent}/pg.key"


@pytest.mark.parametrize(
    "host", ["beta", "BETA", "beta.example.net", "Beta.example.net"]
)
def test_host_name_says_which_node_this_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """In any case, and with or without a domain."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert load(file).node == "beta"


def test_whole_host_name_goes_before_its_first_part(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two nodes with one first part each host finds its own."""
    file.write_text(GOOD.replace('"beta"', '"alpha.b"'))
    for host, node in (("alpha.b", "alpha.b"), ("alpha.c", "alpha")):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert load(file).node == node


def test_option_goes_before_variable_before_host_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is given and wrong is refused, even where the host name is right."""
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha")
    assert load(file).node == "alpha"
    monkeypatch.setenv(NODE_VARIABLE, "beta")
    assert load(file).node == "beta"
    assert load(file, "alpha").node == "alpha"
    monkeypatch.setenv(NODE_VARIABLE, "")
    assert load(file).node == "alpha"
    monkeypatch.setenv(NODE_VARIABLE, "gamma")
    assert refusal(file, None) == (
        f'pg.toml: {NODE_VARIABLE}: no node is called "gamma"; there are: alpha, beta'
    )
    assert '--node: no node is called ""' in refusal(file, "")


def test_host_that_is_no_node_is_told_the_names(file: Path) -> None:
    """One line with the host's name and the nodes', and a hint that helps."""
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.message == (
        'pg.toml: this host is called "elsewhere", but no node is; there are: '
        "alpha, beta"
    )
    assert "--node" in caught.value.hint
    assert NODE_VARIABLE in caught.value.hint


def test_node_of_a_volume_without_nodes_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable may stand there for another volume, and is not looked at."""
    head, _, _ = GOOD.partition("\n[[node]]")
    file.write_text(head + REMOTE)
    assert "volume pg has no [[node]] tables" in refusal(file, "alpha")
    monkeypatch.setenv(NODE_VARIABLE, "alpha")
    assert load(file).node == ""


# --- what the engine is told ---


def test_other_nodes_come_first_among_the_copies(file: Path) -> None:
    """In the order of the file, as the engine numbers its disks; then the remotes."""
    text = GOOD.replace('"10.0.0.2:10810"', '"10.0.0.2:10810"\ndeadline = "300ms"')
    file.write_text(text + REMOTE)
    for node, other, deadline_ms in (("alpha", "beta", 300), ("beta", "alpha", 5000)):
        params = to_params(load(file, node), ["dr"])
        assert params.node == node
        assert params.remotes == (
            RemoteParams(other, deadline_ms, is_node=True),
            RemoteParams("dr", 5000, assume_in_sync=True),
        )
    volume = load(file, "alpha")
    assert [copy.uri for copy in volume.copies] == [
        "nbds://10.0.0.2:10810",
        "nbd://dr.example.net/pg",
    ]
    assert volume.copy_called("beta").is_node
    with pytest.raises(ConfigError, match='no other node or remote "alpha"; it has: '):
        volume.copy_called("alpha")


def test_no_word_makes_a_node_a_copy(file: Path) -> None:
    """Neither another node, nor this one."""
    with pytest.raises(ConfigError, match='"beta" is a node: the first promotion'):
        to_params(load(file, "alpha"), ["beta"])
    with pytest.raises(ConfigError):
        to_params(load(file, "alpha"), ["alpha"])


def test_two_nodes_are_served_and_three_refused(file: Path) -> None:
    """The file is right, but this version cannot serve it."""
    for nodes in (2, 3):
        volume = volume_of(file, nodes, 2)
        if nodes == 2:
            check_nodes(volume)
            continue
        for check in (check_nodes, to_params):
            with pytest.raises(UnsupportedError, match="this version serves two nodes"):
                check(volume)


def test_start_alone_is_a_time_of_the_volume(file: Path) -> None:
    """It is off by default, and the same on all nodes."""
    assert load(file, "alpha").start_alone == 0
    for text, seconds in (('"off"', 0), ('"30s"', 30), ("1", 1), ('"1h"', 3600)):
        file.write_text(f"start_alone = {text}\n{GOOD}")
        assert load(file, "beta").start_alone == seconds


# --- mistakes ---

BETA = GOOD[GOOD.index('[[node]]\nname = "beta"') : GOOD.index("[tls]")]
TLS = GOOD[GOOD.index("[tls]") :]
MISTAKES = {
    "same name": ('"beta"', '"alpha"', 'node: two nodes are called "alpha"'),
    "start_alone at once": (
        'name = "pg"',
        'name = "pg"\nstart_alone = "0s"',
        'start_alone = "0s": must be "off", or a time from 1s to 1h',
    ),
    "start_alone of a node": (
        'local = "/dev/vg0/pg"',
        'start_alone = "1s"',
        "start_alone: must be the same on all nodes",
    ),
    "deadline of the volume": (
        'name = "pg"',
        'name = "pg"\ndeadline = "1s"',
        "deadline: unknown key here; it stands in a [[remote]] or [[node]] table",
    ),
    "deadline that is too short": (
        'local = "/dev/vg0/pg"',
        'deadline = "1ms"',
        'node "beta": deadline = "1ms": must be a time from 100ms to 10min',
    ),
    "same name in another case": ('"beta"', '"Alpha"', "that differ only in case"),
    "same address": ("10.0.0.2", "10.0.0.1", "have one address, 10.0.0.1:10810"),
    "same address in another spelling": (
        "10.0.0.2",
        "[::ffff:10.0.0.1]",
        '"alpha" and "beta" have one address',
    ),
    "local as a name": ('"beta"', '"local"', "is the local disk's name"),
    "odd name": ('"beta"', '"be ta"', 'node "be ta": name = "be ta": must be 1 to 63'),
    "name with a slash": ('"beta"', '"../x"', "must be 1 to 63 letters, digits"),
    "name with a line end": ('"beta"', '"be\\nta"', "must be 1 to 63 letters, digits"),
    "empty name": ('"beta"', '""', 'node 2: name = "": must be 1 to 63 letters'),
    "no name": ('name = "beta"\n', "", "node 2: name: is missing; it must be 1 to 63"),
    "no address": (
        'address = "10.0.0.2:10810"\n',
        "",
        'node "beta": address: is missing; it must be "HOST:PORT"',
    ),
    "address without a port": ("10.0.0.2:10810", "10.0.0.2", 'must be "HOST:PORT"'),
    "address that is a number": ('"10.0.0.2:10810"', "5", 'address = 5: must be "HOST'),
    "address with a high port": ("2:10810", "2:99999", 'must be "HOST:PORT"'),
    "address without a host": ("10.0.0.2:", ":", 'must be "HOST:PORT"'),
    "address of all": ("10.0.0.2", "0.0.0.0", "stands for every address of a host"),
    "address of all, IPv6": ("10.0.0.2", "[::]", "stands for every address"),
    "address of all, mixed": ("10.0.0.2", "[::ffff:0.0.0.0]", "stands for every addr"),
    "address without brackets": ("10.0.0.2", "fd00::2", 'must be "HOST:PORT"'),
    "address of the clients' door": (
        "tcp:127.0.0.1:10809",
        "tcp:10.0.0.2:10810",
        'node "beta": address and listen are the same, 10.0.0.2:10810',
    ),
    "address of the clients' door, which is every address": (
        "tcp:127.0.0.1:10809",
        "tcp::10810",
        'node "beta": address and listen are the same',
    ),
    "one node": (BETA, "", "node: must be 2 to 9 [[node]] tables, not 1"),
    "no list of nodes": (
        GOOD[GOOD.index("[[node]]") : GOOD.index("[tls]")],
        "[node]\n",
        "node: must be 2 to 9 [[node]] tables",
    ),
    "nodes that are no tables": (
        GOOD[GOOD.index("\n[[node]]") :],
        'node = ["alpha"]\ntls = "off"\n',
        "node 1: must be a [[node]] table",
    ),
    "size on one node": (
        "max_clients = 5",
        'size = "1GiB"',
        'node "beta": size: must be the same on all nodes; it stands before the first',
    ),
    "region size on one node": (
        "max_clients = 5",
        'region_size = "4KiB"',
        'node "beta": region_size: must be the same on all nodes',
    ),
    "policy on one node": (
        "max_clients = 5",
        'policy = "stop"',
        'node "beta": policy: must be the same on all nodes',
    ),
    "unknown key of a node": (
        "max_clients",
        "max_client",
        'node "beta": max_client: unknown key; did you mean max_clients?',
    ),
    "wrong value of a node": (
        "max_clients = 5",
        "max_clients = 0",
        'node "beta": max_clients = 0: must be a whole number from 1 to 65536',
    ),
    "node's key at the top": (
        'name = "pg"',
        'name = "pg"\naddress = "h:1"',
        "address: unknown key here; it stands in a [[node]] table",
    ),
    "size of each disk": ('"10GiB"', '"adopt"', 'size = "adopt": must be a size where'),
    "local nowhere for one node": (
        'local = "/srv/pg.img"\n',
        "",
        "local: is missing; it must be the path of a file or a block device, here or "
        "in each [[node]] table",
    ),
    "paths of another node": (
        "/dev/vg0/pg",
        "/var/lib/nbd-mirror/pg",
        'node "beta": local and state are the same path',
    ),
    "remote with a node's name": (
        "[tls]",
        REMOTE.replace("dr", "beta", 1) + "[tls]",
        'a node and a remote are called "beta"; names must differ',
    ),
    "remote with a file of a node": (
        "[tls]",
        REMOTE.replace("dr", "beta.new", 1) + "[tls]",
        'no remote or node can be called "beta.new" beside "beta"',
    ),
    "remote at a node's address": (
        "[tls]",
        REMOTE.replace("dr.example.net", "10.0.0.1:10810") + "[tls]",
        'remote "dr": nbd://10.0.0.1:10810/pg is the address of node "alpha"',
    ),
    "no tls": (TLS, "", "tls: is missing; nodes need a [tls] table with the key"),
    "tls of another kind": (
        'name = "pg"',
        'name = "pg"\ntls = "no"',
        'tls = "no": must be "off", or a [tls] table',
    ),
    "tls without files": ('key = "pg.key"', "", "tls: must have either key, or certif"),
    "tls of two kinds": (
        'key = "pg.key"',
        'key = "pg.key"\nca = "ca.pem"',
        "tls: must have either key, or certificate, private_key and ca",
    ),
    "tls with half of the files": (
        'key = "pg.key"',
        'certificate = "a"\nca = "ca.pem"',
        "tls: must have either key, or certificate, private_key and ca",
    ),
    "tls with an unknown key": (
        'key = "pg.key"',
        'kee = "pg.key"',
        "tls: kee: unknown key; did you mean key?",
    ),
    "tls with an empty path": ('"pg.key"', '""', 'tls: key = "": must be the path of'),
    "tls of a number": ('"pg.key"', "5", "tls: key = 5: must be the path of"),
    "tls after a node": (
        f"max_clients = 5\n\n{TLS}",
        'tls = "off"\n',
        'node "beta": tls: must be the same on all nodes; it stands before the first',
    ),
    "key at the top": (
        'name = "pg"',
        'name = "pg"\nkey = "k"',
        "key: unknown key here; it stands in the [tls] table",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("node", ["alpha", "beta"])
def test_mistake_gets_one_line_on_each_node(
    file: Path, mistake: str, node: str
) -> None:
    """A host is told of a mistake in another node's table, too."""
    old, new, line = MISTAKES[mistake]
    assert old in GOOD
    text = GOOD.replace(old, new)
    if mistake == "tls of another kind":
        text = text.replace(TLS, "")
    file.write_text(text)
    assert line in refusal(file, node)


def test_required_keys_may_stand_in_each_node(file: Path) -> None:
    """Then the top of the file need not have them, and a mistake is told once."""
    text = GOOD.replace('local = "/srv/pg.img"\n', "")
    text = text.replace('"10.0.0.1:10810"', '"10.0.0.1:10810"\nlocal = "/dev/sdb"')
    file.write_text(text)
    assert load(file, "alpha").local == "/dev/sdb"
    assert load(file, "beta").local == "/dev/vg0/pg"
    file.write_text(text.replace('"/dev/sdb"', '""'))
    assert refusal(file) == (
        'pg.toml: node "alpha": local = "": must be the path of a file or a block '
        "device"
    )


def volume_of(file: Path, nodes: int, remotes: int) -> VolumeConfig:
    """Read a file with so many copies."""
    head, _, _ = GOOD.partition("\n[[node]]")
    text = f'{head}tls = "off"\n'
    for index in range(nodes):
        text += f'[[node]]\nname = "n{index}"\naddress = "10.0.0.{index}:1"\n'
    for index in range(remotes):
        text += f'[[remote]]\nname = "r{index}"\nuri = "nbd://h{index}"\n'
    file.write_text(text)
    return load(file, "n0")


def test_copies_up_to_eight_beside_the_own_one(file: Path) -> None:
    """Other nodes and plain remotes in any mixture; the ninth is refused."""
    for nodes, remotes in ((9, 0), (2, 7), (5, 4)):
        volume = volume_of(file, nodes, remotes)
        assert (nodes, remotes) == (len(volume.nodes), len(volume.remotes))
    for nodes, remotes, words in (
        (10, 0, "node: must be 2 to 9 [[node]] tables, not 10"),
        (9, 1, "9 copies beside a node's own (other nodes: 8, remotes: 1)"),
        (2, 8, "9 copies beside a node's own (other nodes: 1, remotes: 8)"),
        (2, 9, "remote: must be 1 to 8 [[remote]] tables, not 9"),
    ):
        with pytest.raises(ConfigError) as caught:
            volume_of(file, nodes, remotes)
        assert words in caught.value.message
        assert "\n" not in caught.value.message


def test_tls_may_be_off(file: Path) -> None:
    """Before the first table; a volume without nodes has no such key."""
    text = GOOD.replace(TLS, "").replace('"10GiB"', '"10GiB"\ntls = "off"')
    file.write_text(text)
    volume = load(file, "alpha")
    assert volume.tls is not None
    assert not volume.tls.on
    head, _, _ = text.partition("\n[[node]]")
    file.write_text(head + REMOTE)
    assert "tls: is of use only with [[node]] tables" in refusal(file, None)
    file.write_text(head.replace('tls = "off"', "start_alone = 5") + REMOTE)
    assert "start_alone: is of use only with [[node]]" in refusal(file, None)


def test_tls_by_certificates(file: Path) -> None:
    """Three files, relative to the configuration's folder."""
    three = 'certificate = "a.pem"\nprivate_key = "/k/a.key"\nca = "../ca.pem"'
    file.write_text(GOOD.replace('key = "pg.key"', three))
    tls = load(file, "alpha").tls
    assert tls is not None
    assert tls.on
    assert (f"{file.parent}/a.pem", "/k/a.key") == (tls.certificate, tls.private_key)
    assert tls.ca == os.path.normpath(f"{file.parent}/../ca.pem")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("10.0.0.1:10810", "10.0.0.1:10810"),
        ("[FD00::1]:1", "[fd00::1]:1"),
        ("[fe80::1%eth0]:1", "[fe80::1%eth0]:1"),
        ("db.example.net:65535", "db.example.net:65535"),
    ],
)
def test_address_is_read_and_written(text: str, shown: str) -> None:
    """An address as a user writes it, and as it is shown."""
    assert str(parse_address(text)) == shown


def test_address_spelled_in_two_ways_is_one() -> None:
    """Neither case nor a dot at the end makes another host."""
    for one, other in (("A.b.:1", "a.B:1"), ("[fd00:0::1]:1", "[fd00::1]:1")):
        assert parse_address(one).place == parse_address(other).place
    assert parse_address("a:1").place != parse_address("a:2").place
