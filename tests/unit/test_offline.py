# SPDX-License-Identifier: BSD-3-Clause
"""What the logs say without a server is no better than what a start makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from unit.volumes import SIZE, make_params

from nbd_mirror.base.errors import FormatError
from nbd_mirror.volume import core
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.offline import open_disk_map, read_superblock, stopped_status


def make_volume(folder: Path, *, assume: bool) -> VolumeConfig:
    """Create a volume, its remote all dirty or a copy on the operator's word."""
    folder.mkdir()
    core.create(make_params(folder, assume=assume))
    path = folder / "v.toml"
    path.write_text(
        f'name = "v"\nsize = {SIZE}\nlocal = "local.img"\nstate = "state"\n'
        'listen = "tcp:localhost:10809"\n'
        '[[remote]]\nname = "dr"\nuri = "nbd://localhost:10810"\n'
    )
    return load(path)


@pytest.mark.parametrize("disk", ["dr", "local"])
def test_map_of_another_volume_or_disk_means_all_dirty(
    tmp_path: Path, disk: str
) -> None:
    """Put there by mistake, it tells of few dirty regions, and the start of all."""
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
    with core.Engine(make_params(tmp_path / "one")) as engine:
        assert engine.remote_status(0).dirty_regions * 65536 == SIZE
        engine.start()
        engine.stop()
