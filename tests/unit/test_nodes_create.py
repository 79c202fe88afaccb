# SPDX-License-Identifier: BSD-3-Clause
"""`create` on each node: what it stores of a node, and when a disk is proven zero."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbd_mirror.base.errors import ConfigError, ExistsError, FormatError, MissingError
from nbd_mirror.commands.create import create_volume
from nbd_mirror.commands.serve import check_startable
from nbd_mirror.rules.node_side import Role
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.node_record import NodeRecord
from nbd_mirror.volume.offline import mapped_disks, read_superblock

SIZE = 4 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder with the file of two nodes, and a disk for each."""
    (tmp_path / "pg.toml").write_text(
        f'name = "pg"\nsize = {SIZE}\nlocal = "a.img"\nstate = "a"\n'
        f'listen = "unix:{tmp_path}/s"\ntls = "off"\n'
        '[[node]]\nname = "alpha"\naddress = "127.0.0.1:10810"\n'
        '[[node]]\nname = "beta"\naddress = "127.0.0.2:10810"\n'
        'local = "b.img"\nstate = "b"\n'
        '[[remote]]\nname = "dr"\nuri = "nbd://127.0.0.3/x"\n'
    )
    for name in ("a.img", "b.img"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(SIZE)
    return tmp_path


def volume(folder: Path, node: str = "alpha") -> VolumeConfig:
    """Read the file, as on *node*."""
    return load(folder / "pg.toml", node)


def created(folder: Path, node: str = "alpha") -> NodeRecord:
    """Create the volume on *node*; return what is stored of the node."""
    config = volume(folder, node)
    create_volume(config, [], force=True)
    record = read_superblock(config).node
    assert record is not None
    return record


def test_each_node_begins_as_a_secondary_without_data(folder: Path) -> None:
    """It knows the other's name, and no more; both have ids of their own."""
    alpha, beta = created(folder, "alpha"), created(folder, "beta")
    assert (alpha.node, beta.node) == ("alpha", "beta")
    assert alpha.id != beta.id
    for record, other in ((alpha, "beta"), (beta, "alpha")):
        assert record.role is Role.SECONDARY
        assert record.lineage.generation == 0
        assert record.epoch == 0
        assert [peer.node for peer in record.peers] == [other]
        assert record.peers[0].id is None
    # The other node first, as in the engine's numbers.
    assert mapped_disks(volume(folder)) == ["local", "beta", "dr"]


@pytest.mark.parametrize(
    ("content", "zero"),
    [
        ({}, True),
        ({0: b"\1"}, False),
        ({SIZE - 1: b"\1"}, False),
        ({SIZE // 2 - 1: b"\1"}, False),
        ({0: bytes(4096), SIZE - 512: bytes(512)}, True),
        ({0: bytes(SIZE)}, True),
        ({0: bytes(2 << 20), (2 << 20) + 5: b"\1"}, False),
        ({SIZE: b"\1"}, True),
    ],
    ids=[
        *("holes", "first byte", "last byte", "inside", "zeroes in holes", "zeroes"),
        *("behind zeroes", "behind the volume"),
    ],
)
def test_disk_is_zero_only_if_each_byte_is(
    folder: Path, content: dict[int, bytes], zero: bool
) -> None:
    """What lies behind the volume's end does not count."""
    with (folder / "a.img").open("r+b") as file:
        for offset, data in content.items():
            file.seek(offset)
            file.write(data)
    assert created(folder).zero is zero


def test_disk_that_takes_too_long_to_read_is_not_proven(folder: Path) -> None:
    """A node with so much data may be filled, which is never wrong."""
    size = (256 << 20) + 4096
    text = (folder / "pg.toml").read_text()
    (folder / "pg.toml").write_text(text.replace(f"size = {SIZE}", f"size = {size}"))
    with (folder / "a.img").open("r+b") as file:
        file.truncate(size)
        os.posix_fallocate(file.fileno(), 0, size)
        # Unwritten extents are holes to the kernel; these bytes are data.
        for at in range(0, size, 1 << 20):
            os.pwrite(file.fileno(), bytes(min(1 << 20, size - at)), at)
    assert not created(folder).zero
    (folder / "a.img").unlink()
    with (folder / "a.img").open("wb") as file:
        file.truncate(size)
    assert created(folder).zero


def test_disk_of_another_size_is_refused(folder: Path) -> None:
    """On the node whose disk it is, with the command that helps."""
    with (folder / "b.img").open("r+b") as file:
        file.truncate(SIZE - 512)
    created(folder, "alpha")
    with pytest.raises(ConfigError, match=r"b\.img has 4193792 bytes, the"):
        create_volume(volume(folder, "beta"), [], force=False)


def test_state_of_another_volume_is_refused(folder: Path) -> None:
    """Its node's file names another volume: even by force nothing is overwritten."""
    created(folder)
    text = (folder / "pg.toml").read_text()
    (folder / "pg.toml").write_text(text.replace('name = "pg"', 'name = "qg"'))
    with pytest.raises(FormatError, match="is the state of volume pg, not of qg"):
        create_volume(volume(folder), [], force=True)


def test_state_of_another_node_is_refused(folder: Path) -> None:
    """A wrong --node, or two nodes with one path: neither is overwritten nor served."""
    created(folder)
    text = (folder / "pg.toml").read_text()
    (folder / "pg.toml").write_text(text.replace('state = "b"', 'state = "a"'))
    beta = volume(folder, "beta")
    with pytest.raises(FormatError, match="is the state of node alpha, not of beta"):
        create_volume(beta, [], force=True)
    for check in (read_superblock, check_startable):
        with pytest.raises(FormatError, match="is the state of node alpha"):
            check(beta)
    head, _, rest = text.partition("[[node]]")
    head = head.replace('tls = "off"\n', "")
    (folder / "pg.toml").write_text(head + rest[rest.index("[[remote]]") :])
    plain = load(folder / "pg.toml")
    with pytest.raises(FormatError, match="and the configuration has no"):
        create_volume(plain, [], force=True)
    (folder / "a" / "superblock").unlink()
    create_volume(plain, [], force=False)
    (folder / "pg.toml").write_text(text)
    with pytest.raises(FormatError, match="is the state of a volume without nodes"):
        create_volume(volume(folder), [], force=True)


def test_hints_say_what_it_costs_a_node(folder: Path) -> None:
    """Not what it costs a volume of remotes."""
    created(folder)
    with pytest.raises(ExistsError) as caught:
        create_volume(volume(folder), [], force=False)
    assert "it has no data then" in caught.value.hint
    (folder / "a.img").unlink()
    with pytest.raises(MissingError) as missing:
        create_volume(volume(folder), [], force=True)
    assert "bring the disk back" in missing.value.hint
