# SPDX-License-Identifier: BSD-3-Clause
"""
PostgreSQL on a volume: mounted over FUSE and a loop device, and loaded by clients.

The server and its clients are Debian's. They run as the user postgres, because the
server refuses root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import support

__all__ = ["Database", "Disk"]

USER = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
# Small write-ahead logs: the volume is small, and a checkpoint comes often.
OPTIONS = (
    *("-c", "listen_addresses=", "-c", "max_wal_size=16MB", "-c", "min_wal_size=2MB"),
    *("-c", "shared_buffers=8MB", "-c", "checkpoint_timeout=30s"),
)


def programs() -> Path:
    """Return the folder of the server's programs, of the latest version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    support.requires(bool(found), "postgresql is not installed (see scripts/setup)")
    return found[-1].parent


class Disk:
    """
    A folder that any user reaches, on which a volume is mounted.

    Args:
        processes: start and run the programs.
    """

    def __init__(self, processes: support.Processes) -> None:
        self._processes = processes
        self.folder = Path(tempfile.mkdtemp(prefix="nbdm-pg-"))
        self.folder.chmod(0o755)
        self.point = self.folder / "mnt"
        self._fuse = self.folder / "fuse"
        self.point.mkdir()
        self._fuse.mkdir()
        self._nbdfuse: subprocess.Popen[bytes] | None = None

    def mount(self, uri: str, *, make: bool = False) -> None:
        """Mount the volume; *make* a file system first."""
        self._nbdfuse = self._processes.start(["nbdfuse", self._fuse, uri])
        file = self._fuse / "nbd"
        support.wait_until(file.exists, "nbdfuse")
        if make:
            self._processes.run(["mkfs.ext4", "-q", "-F", file])
        self._processes.run(["mount", "-o", "loop", file, self.point])

    def unmount(self) -> None:
        """Unmount it, also if its server is gone; then nothing more is written."""
        for point in (self.point, self._fuse):
            if os.path.ismount(point):
                self._processes.run(["umount", point], check=False)
            # A disk that is lost cannot be asked whether it is mounted.
            self._processes.run(["umount", "--lazy", point], check=False)
        if self._nbdfuse is not None:
            if self._nbdfuse.poll() is None:
                self._nbdfuse.send_signal(signal.SIGTERM)
            self._nbdfuse.wait(20)
            self._nbdfuse = None

    def remove(self) -> None:
        """Leave nothing behind."""
        self.unmount()
        shutil.rmtree(self.folder)


class Database:
    """A server of PostgreSQL, whose data are on a mounted disk."""

    def __init__(self, disk: Disk, processes: support.Processes) -> None:
        self._disk = disk
        self._processes = processes
        self._programs = programs()
        self._server: subprocess.Popen[bytes] | None = None
        self._data = disk.point / "data"
        self._sockets = disk.folder / "sockets"
        self._sockets.mkdir()
        shutil.chown(self._sockets, "postgres")

    def create(self) -> None:
        """Make the database on a new file system."""
        self._data.mkdir(mode=0o700)
        shutil.chown(self._data, "postgres")
        words = ["-D", str(self._data), "--wal-segsize=1", "--no-sync", "-A", "trust"]
        self._processes.run([*USER, self._programs / "initdb", *words], timeout_s=120)
        self._processes.run(["sync", "-f", self._data])

    def start(self) -> None:
        """Start the server, which recovers first, and wait until it answers."""
        words = ["-D", str(self._data), "-k", str(self._sockets), *OPTIONS]
        self._server = self._processes.start(
            [*USER, self._programs / "postgres", *words], cwd=Path("/")
        )
        server = self._server
        support.wait_until(
            lambda: server.poll() is not None or self._answers(),
            "PostgreSQL to answer",
            timeout_s=60,
        )
        assert server.poll() is None

    def _answers(self) -> bool:
        words = [*self._client("psql"), "-c", "select 1"]
        return self._processes.run(words, check=False).returncode == 0

    def _client(self, program: str) -> list[str]:
        where = ["-h", str(self._sockets), "-U", "postgres"]
        return [*USER, str(self._programs / program), *where]

    def ask(self, query: str) -> list[str]:
        """Return the lines of a query's answer."""
        words = [*self._client("psql"), "-XAt", "-v", "ON_ERROR_STOP=1", "-c", query]
        return self._processes.run(words).stdout.split()

    def check(self) -> None:
        """Check each page and index of it."""
        words = [*self._client("pg_amcheck"), "--all", "--install-missing"]
        self._processes.run([*words, "--heapallindexed"], timeout_s=120)

    def load(self, table: str, told: Path) -> subprocess.Popen[bytes]:
        """
        Start a client that commits one transaction after the other.

        Args:
            told: gets the number of each transaction, once its COMMIT has returned.
        """
        script = self._disk.folder / f"{table}.sql"
        with script.open("w") as file:
            for i in range(100_000):
                file.write(
                    f"BEGIN; INSERT INTO {table} VALUES ({i}, repeat('x', 500));\n"
                    f"COMMIT;\n\\echo {i}\n"
                )
        script.chmod(0o644)
        shell = ["/bin/sh", "-c", 'exec stdbuf -oL "$@" >"$0" 2>/dev/null', str(told)]
        words = ["-Xqt", "-v", "ON_ERROR_STOP=1", "-f", str(script)]
        return self._processes.start([*shell, *self._client("psql"), *words])

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT is a fast and clean stop, SIGQUIT a crash."""
        if self._server is None:
            return
        if self._server.poll() is None:
            self._server.send_signal(how)
        self._server.wait(60)
        self._server = None
