# SPDX-License-Identifier: BSD-3-Clause
"""A database on a pair: its primary is killed under load, and no commit is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.pair import Node, Pair
from e2e.lib.postgres import Database, Disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TABLES = ("one", "two")  # each has a client of its own
ENOUGH = 100  # transactions of each


@pytest.fixture
def disk(processes: support.Processes) -> Iterator[Disk]:
    """Give a place to mount at, and clean it up."""
    support.requires(os.geteuid() == 0, "mounting needs root")
    support.requires(Path("/dev/fuse").exists(), "the disk is mounted over FUSE")
    support.requires_program("nbdfuse", "mkfs.ext4", "setpriv", "stdbuf")
    found = Disk(processes)
    yield found
    found.remove()


def committed(told: Path) -> list[str]:
    """Return the transactions whose COMMIT has returned; a cut line is none."""
    lines = told.read_text().split("\n")[:-1] if told.exists() else []
    return [line for line in lines if line.isdigit()]


class Service:
    """The database where the volume is primary, and what its clients were told."""

    def __init__(self, pair: Pair, disk: Disk, base: Database) -> None:
        self._pair, self._disk, self._base = pair, disk, base
        self._told: dict[str, set[str]] = {table: set() for table in TABLES}
        self._runs = 0

    def start(self, node: Node, *, create: bool = False) -> None:
        """Mount and start it there; everything that was committed must be there."""
        self._disk.mount(node.uri, make=create)
        if create:
            self._base.create()
        self._base.start()
        for table in TABLES if create else ():
            self._base.ask(f"CREATE TABLE {table} (n int PRIMARY KEY, x text)")
        for table in TABLES:
            there = set(self._base.ask(f"SELECT n FROM {table}"))
            lost = self._told[table] - there
            assert not lost, f"{len(lost)} committed transactions of {table} are lost"
        self._base.check()

    def load(self, end: signal.Signals, victim: Node | None = None) -> None:
        """Load it until *victim* is killed in the middle, and note what was told."""
        self._runs += 1
        for table in TABLES:
            self._base.ask(f"DELETE FROM {table}")
            self._told[table] = set()
        told = {
            table: self._pair.folder / f"{table}.{self._runs}.told" for table in TABLES
        }
        clients = [self._base.load(table, told[table]) for table in TABLES]
        support.wait_until(
            lambda: min(len(committed(file)) for file in told.values()) >= ENOUGH,
            f"{ENOUGH} transactions of each client",
            timeout_s=60,
        )
        if victim is not None:
            victim.kill()
        self._base.stop(end)
        for client in clients:
            client.wait(30)
        self._told = {table: set(committed(file)) for table, file in told.items()}
        self._disk.unmount()


def test_no_commit_is_lost(
    run_dir: Path, processes: support.Processes, disk: Disk
) -> None:
    """Killed under load, forced on the other node, back, and switched over."""
    pair = Pair(run_dir, processes, size=192 * MIB)
    base = Database(disk, processes)
    service = Service(pair, disk, base)
    alpha, beta = pair.nodes
    try:
        pair.bring_up()
        service.start(alpha, create=True)
        service.load(signal.SIGQUIT, victim=alpha)
        beta.cli("promote", "--force")
        service.start(beta)
        alpha.serve()
        alpha.wait_in_sync()
        service.load(signal.SIGINT)
        beta.cli("switchover")
        service.start(alpha)
        service.load(signal.SIGINT)
        beta.wait_in_sync()
        for node in pair.nodes:
            node.stop()
        pair.assert_equal()
    finally:
        base.stop(signal.SIGQUIT)
