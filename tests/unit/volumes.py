# SPDX-License-Identifier: BSD-3-Clause
"""A volume opened in the test's own process, and a real server as its remote."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from support import Processes, wait_listening, wait_until

from nbd_mirror.rules.reasons import describe
from nbd_mirror.rules.state import RemoteState
from nbd_mirror.server.keeper import Keeper, RemotePolicy
from nbd_mirror.volume import core
from nbd_mirror.volume.model import disk_of

DR = disk_of(0)  # the only remote
SIZE = 16 << 20  # bytes
REGION = 64 << 10
HOLD_MS = 1000
DEADLINE_MS = 2000


def make_params(
    folder: Path, *, assume: bool = False, hold_ms: int = HOLD_MS
) -> core.Params:
    """Describe a volume with one remote, all of it below *folder*; make its files."""
    (folder / "state").mkdir(exist_ok=True)
    for name in ("local.img", "remote.img"):
        with (folder / name).open("ab") as file:
            file.truncate(SIZE)
    return core.Params(
        name="v",
        local=str(folder / "local.img"),
        state_dir=str(folder / "state"),
        size=SIZE,
        region_size=REGION,
        policy="degrade",
        hold_ms=hold_ms,
        remotes=(core.RemoteParams("dr", DEADLINE_MS, assume_in_sync=assume),),
    )


class Remote:
    """An nbdkit that serves *image*; to be started, killed and started again."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        self._socket = folder / "remote.sock"
        self.image = folder / "remote.img"
        self.uri = f"nbd+unix:///?socket={self._socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, image: Path | None = None) -> None:
        """Serve, through the filters that *options* ask for."""
        self._socket.unlink(missing_ok=True)
        filters = [word for word in options if word.startswith("--")]
        parameters = [word for word in options if not word.startswith("--")]
        plugin = ["file", str(image or self.image), *parameters]
        self.process = self._processes.start(
            ["nbdkit", "-f", "-U", self._socket, *filters, *plugin]
        )
        wait_listening(self._socket, "the remote")

    def kill(self) -> None:
        """End it as a crash would."""
        assert self.process is not None
        self._processes.kill(self.process)


def make_file(tmp_path: Path) -> Path:
    """Write a volume's file, and return its path; its state directory exists."""
    (tmp_path / "st").mkdir()
    path = tmp_path / "v.toml"
    path.write_text(
        'name="v"\nsize="1MiB"\nlocal="d.img"\nstate="st"\n'
        f'listen="unix:{tmp_path}/v.sock"\n'
        '[[remote]]\nname="dr"\nuri="nbd://h/x"\n'
    )
    return path


class Mirror:
    """An open volume with a keeper, and what the keeper logged."""

    def __init__(
        self, params: core.Params, uri: str, engine: type[core.Engine] = core.Engine
    ) -> None:
        self.params = params
        self.uri = uri
        self.log: list[str] = []
        self.engine = engine(params)
        self.engine.start()
        self.keeper: Keeper | None = None

    def keep(
        self,
        *,
        late_window_s: float = 0.0,
        hold_s: float = HOLD_MS / 1000,
        random: Callable[[], float] = lambda: 0.5,
    ) -> Keeper:
        """Start a keeper; its random numbers are all *random*'s."""
        policy = RemotePolicy(
            name="dr",
            uri=self.uri,
            deadline_s=2.0,
            hold_s=hold_s,
            late_window_s=late_window_s,
        )
        self.keeper = Keeper(self.engine, DR, policy, self._note, random=random)
        self.keeper.start()
        return self.keeper

    def _note(self, level: str, text: str) -> None:
        self.log.append(text)
        print(level, text)  # shown if the test fails

    def state(self) -> RemoteState:
        """Ask the engine."""
        return self.engine.remote_status(DR).state

    def wait_for(self, state: RemoteState) -> None:
        """Wait until the remote is in *state*."""
        wait_until(lambda: self.state() is state, state.value)

    def reason(self) -> str:
        """Say what status would."""
        assert self.keeper is not None
        return describe(self.keeper.view().facts)[0]

    def close(self) -> None:
        """End the keeper and the volume."""
        if self.keeper is not None:
            self.keeper.end()
            self.engine.wake()
            assert self.keeper.join(15.0)
        self.engine.stop()
        self.engine.close()


@contextlib.contextmanager
def mirrored(
    params: core.Params, uri: str, engine: type[core.Engine] = core.Engine
) -> Iterator[Mirror]:
    """Create the volume and open it; close it at the end."""
    core.create(params)
    mirror = Mirror(params, uri, engine)
    try:
        yield mirror
    finally:
        mirror.close()


def same_images(mirror: Mirror, remote: Remote) -> bool:
    """Compare both disks byte for byte."""
    return Path(mirror.params.local).read_bytes() == remote.image.read_bytes()
