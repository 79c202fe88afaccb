# SPDX-License-Identifier: BSD-3-Clause
"""A volume opened in the test's own process, and a real server as its remote."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import Processes, wait_listening

from nbd_mirror.volume import core

SIZE = 16 << 20  # bytes
REGION = 64 << 10
HOLD_MS = 1000
DEADLINE_MS = 2000


def make_params(folder: Path, *, assume: bool = False) -> core.Params:
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
        hold_ms=HOLD_MS,
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
