# SPDX-License-Identifier: BSD-3-Clause
"""An operator's command to a volume counts, whatever a keeper does at that moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from support import Processes, wait_until
from unit.volumes import DR, SIZE, Remote, make_params

from nbd_mirror.rules.state import RemoteState
from nbd_mirror.server import opening
from nbd_mirror.server.volume import Volume
from nbd_mirror.volume import core
from nbd_mirror.volume.model import Disk

WAIT_S = 20.0


class Overtaken(core.Engine):
    """An engine that invalidates between a keeper's finding and what comes of it."""

    def __init__(self, params: core.Params) -> None:
        super().__init__(params)
        self.asked = threading.Event()
        self.failing = threading.Event()
        self.invalidated = threading.Event()

    def invalidate(self, disk: Disk) -> None:
        """Wait until a difference was found."""
        self.asked.set()
        assert self.failing.wait(WAIT_S)
        super().invalidate(disk)
        self.invalidated.set()

    def fail(self, disk: Disk, reason: str) -> None:
        """Wait until the remote was invalidated."""
        self.failing.set()
        assert self.invalidated.wait(WAIT_S)
        super().fail(disk, reason)


@pytest.fixture
def remote(processes: Processes, run_dir: Path) -> Remote:
    """Give a remote, which has other data than the volume."""
    params = make_params(run_dir, assume=True)
    core.create(params)
    found = Remote(processes, run_dir)
    found.image.write_bytes(os.urandom(SIZE))
    found.start()
    return found


@pytest.fixture
def config(run_dir: Path, remote: Remote) -> Path:
    """Give the volume's configuration."""
    path = run_dir / "v.toml"
    path.write_text(
        f'name = "v"\nsize = {SIZE}\nlocal = "local.img"\nstate = "state"\n'
        f'listen = "unix:{run_dir}/v.sock"\n'
        f'[[remote]]\nname = "dr"\nuri = "{remote.uri}"\n'
    )
    return path


def test_a_difference_found_before_does_not_outdo_an_invalidate(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt that found it began after the command, and before its effect."""
    monkeypatch.setattr(opening, "Engine", Overtaken)
    volume = Volume.open(os.fspath(config), "direct", lambda: None)
    engine, (keeper,) = volume.engine, volume._keepers
    assert isinstance(engine, Overtaken)
    engine.start()
    arguments = ("invalidate", {"remote": "dr"})
    command = threading.Thread(target=volume.handle, args=arguments)
    try:
        command.start()
        assert engine.asked.wait(WAIT_S)
        keeper.start()
        command.join(WAIT_S)
        wait_until(
            lambda: engine.remote_status(DR).state is RemoteState.IN_SYNC, "in_sync"
        )
    finally:
        keeper.end()
        engine.wake()
        assert keeper.join(WAIT_S)
        engine.stop()
        engine.close()
    local = Path(volume.config.local).read_bytes()
    assert (config.parent / "remote.img").read_bytes() == local
