# SPDX-License-Identifier: BSD-3-Clause
"""Without a server the logs never look better than a start would find them."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import pytest
from support import Processes, wait_until
from unit.volumes import DR, REGION, SIZE, Mirror, Remote, make_params

from nbd_mirror.base import unix
from nbd_mirror.base.errors import FormatError, MirrorError, MissingError
from nbd_mirror.volume import core
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.offline import open_disk_map, read_superblock, stopped_status


def make_volume(folder: Path, *, assume: bool) -> VolumeConfig:
    """Create a volume, its remote all dirty or a copy on the operator's word."""
    folder.mkdir()
    core.create(make_params(folder, assume=assume))
    return configure(folder)


def configure(folder: Path, listen: str = "tcp:localhost:10809") -> VolumeConfig:
    """Write a volume's configuration, and read it."""
    path = folder / "v.toml"
    path.write_text(
        f'name = "v"\nsize = {SIZE}\nlocal = "local.img"\nstate = "state"\n'
        f'listen = "{listen}"\n'
        '[[remote]]\nname = "dr"\nuri = "nbd://localhost:10810"\n'
    )
    return load(path)


def started_dirty(folder: Path) -> int:
    """Start the volume and stop it; return what the start took as dirty, in bytes."""
    with core.Engine(make_params(folder)) as engine:
        dirty = engine.remote_status(DR).dirty_regions * REGION
        engine.start()
        engine.stop()
    return dirty


def put_back(config: VolumeConfig, kept: bytes) -> None:
    """Put a map in the place of the remote's."""
    (config.state_dir / "dirty.dr").write_bytes(kept)


def flip(config: VolumeConfig, at: int) -> None:
    """Change a bit of the remote's map."""
    content = bytearray((config.state_dir / "dirty.dr").read_bytes())
    content[at] ^= 1
    put_back(config, bytes(content))


def test_state_that_was_removed_under_a_server_is_not_just_missing(
    tmp_path: Path,
) -> None:
    """Where the volume listens, its server still does; the kernel tells which."""
    path, pid = tmp_path / "v.sock", os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        config = configure(tmp_path, f"tcp:127.0.0.1:{tcp.getsockname()[1]}")
        with pytest.raises(MissingError, match=f"process {pid} listens on tcp:"):
            stopped_status(config)
    for gone in (config, configure(tmp_path, f"unix:{path}")):
        with pytest.raises(MissingError, match="not created yet"):
            stopped_status(gone)
    with (
        unix.bind(path, 1),
        pytest.raises(MissingError, match=f"process {pid} listens on unix:") as raised,
    ):
        stopped_status(configure(tmp_path, f"unix:{path}"))
    assert f"kill -TERM {pid}, then nbd-mirror create CONFIG" in raised.value.hint


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("old", "an old copy of it was put back"),
        ("superblock", "an old copy of the superblock was put back"),
        ("in use", "was in use when the volume was not"),
        ("header", "is garbled"),
        ("bits", "is garbled"),
        ("lost", "there is no dirty map"),
    ],
)
def test_map_that_a_start_does_not_believe_means_all_dirty(
    tmp_path: Path, harm: str, words: str
) -> None:
    """A stopped status, and `inspect`, show no more than the next start believes."""
    config = make_volume(tmp_path / "v", assume=True)
    path, superblock = config.state_dir / "dirty.dr", config.state_dir / "superblock"
    first, first_superblock = path.read_bytes(), superblock.read_bytes()
    started_dirty(tmp_path / "v")
    with core.Engine(make_params(tmp_path / "v")) as engine:
        in_use = path.read_bytes()
        engine.start()
        engine.stop()
    assert stopped_status(config).remotes[0].dirty_bytes == 0
    match harm:
        case "old":
            put_back(config, first)
        case "superblock":
            superblock.write_bytes(first_superblock)
        case "in use":
            put_back(config, in_use)
        case "header":
            flip(config, 2000)
        case "bits":
            flip(config, 4096 + 9000)
        case "lost":
            path.unlink()
    (remote,) = stopped_status(config).remotes
    assert (remote.dirty_bytes, remote.state) == (SIZE, "out_of_sync")
    assert words in remote.reason
    found = read_superblock(config).volume
    with (
        pytest.raises(MirrorError, match=words) as raised,
        open_disk_map(config, "dr", found),
    ):
        pass
    assert "serve" in raised.value.hint
    assert started_dirty(tmp_path / "v") == SIZE


@pytest.mark.parametrize("log", ["activity", "inflight"])
@pytest.mark.parametrize("harm", ["old", "in use", "header", "lost"])
def test_log_that_a_start_does_not_believe_means_all_dirty(
    tmp_path: Path, log: str, harm: str
) -> None:
    """The maps do not have the regions that a lost log covered."""
    config = make_volume(tmp_path / "v", assume=True)
    path = config.state_dir / log
    old = path.read_bytes()
    started_dirty(tmp_path / "v")
    with core.Engine(make_params(tmp_path / "v")) as engine:
        in_use = path.read_bytes()
        engine.start()
        engine.stop()
    (remote,) = stopped_status(config).remotes
    assert (remote.dirty_bytes, remote.state) == (0, "in_sync")
    content = path.read_bytes()
    garbled = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    path.write_bytes({"old": old, "in use": in_use, "header": garbled}.get(harm, b""))
    if harm == "lost":
        path.unlink()
    (remote,) = stopped_status(config).remotes
    assert (remote.dirty_bytes, remote.state) == (SIZE, "out_of_sync")
    assert log in remote.reason
    found = read_superblock(config).volume
    with (
        pytest.raises(FormatError, match=log) as raised,
        open_disk_map(config, "dr", found),  # as `inspect` does
    ):
        pass
    assert "serve" in raised.value.hint
    assert started_dirty(tmp_path / "v") == SIZE


def test_log_that_is_lost_means_that_a_failed_local_disk_misses_all(
    processes: Processes, run_dir: Path
) -> None:
    """As the next start does, status takes a region's only source to be a remote."""
    params = make_params(run_dir, assume=True)
    core.create(params)
    remote = Remote(processes, run_dir)
    remote.start()
    mirror = Mirror(params, remote.uri)
    try:
        mirror.keep()
        wait_until(lambda: mirror.engine.remote_status(DR).admitted, "the connection")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
        try:
            mirror.engine.pwrite(bytes(REGION), SIZE - REGION)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        mirror.close()
    config = configure(run_dir)
    local = stopped_status(config).local
    assert local.state == "failed"
    assert 0 < local.dirty_bytes < SIZE
    (config.state_dir / "activity").unlink()
    local = stopped_status(config).local
    assert (local.state, local.dirty_bytes) == ("failed", SIZE)
    assert "activity" in local.reason
    with core.Engine(params) as engine:
        assert engine.status().local.dirty_regions * REGION == SIZE
        engine.start()
        engine.stop()


@pytest.mark.parametrize("disk", ["dr", "local"])
def test_map_of_another_volume_or_disk_means_all_dirty(
    tmp_path: Path, disk: str
) -> None:
    """
    A map that was put there by mistake has few dirty regions; the start takes all as
    dirty.
    """
    config = make_volume(tmp_path / "one", assume=False)
    other = make_volume(tmp_path / "other", assume=True)
    donor = other if disk == "dr" else config
    assert stopped_status(donor).remotes[0].dirty_bytes == (0 if disk == "dr" else SIZE)
    shutil.copy(donor.state_dir / f"dirty.{disk}", config.state_dir / "dirty.dr")
    (remote,) = stopped_status(config).remotes
    assert remote.dirty_bytes == SIZE
    assert "another volume or disk" in remote.reason
    found = read_superblock(config).volume
    with (
        pytest.raises(FormatError, match="another volume or disk"),
        open_disk_map(config, "dr", found),  # as `inspect` does
    ):
        pass
    assert started_dirty(tmp_path / "one") == SIZE
