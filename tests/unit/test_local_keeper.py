# SPDX-License-Identifier: BSD-3-Clause
"""
The local keeper against a real engine and a real remote, in the test's own process.

The local disk fails by the process's own limit on a file's size: a write beyond it gets
EFBIG from the kernel, and with the limit lifted the same disk works again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Processes, wait_until
from unit.volumes import DR, REGION, SIZE, Mirror, Remote, make_params, same_images

from nbd_mirror.base.errors import (
    BusyError,
    MirrorError,
    MirrorIOError,
    MissingError,
    RemoteError,
    WrongDiskError,
)
from nbd_mirror.rules.pace import Plan
from nbd_mirror.rules.state import LocalState, RemoteState
from nbd_mirror.server import local_keeper
from nbd_mirror.server.local_keeper import RETRY_S, LocalKeeper
from nbd_mirror.volume import core
from nbd_mirror.volume.model import LOCAL, Batch, Disk

LIMIT = SIZE // 2  # bytes: more than any log has


@contextlib.contextmanager
def size_limit() -> Iterator[None]:
    """Have writes beyond LIMIT fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Watched(core.Engine):
    """The engine; how often it was asked to copy back is counted."""

    batches = 0
    hangs: threading.Event | None = None  # local_attach waits for it
    unusable = False  # admit fails, as it does when the attached disk has an error

    def local_attach(self, path: str, *, replaced: bool) -> None:
        """Hang, as an open of a disk may."""
        hangs = Watched.hangs
        assert hangs is None or hangs.wait(60)
        super().local_attach(path, replaced=replaced)

    def admit(self, disk: Disk) -> None:
        """Fail, as where the disk cannot be described."""
        if Watched.unusable and disk == LOCAL:
            raise MirrorIOError("the local disk: Input/output error")
        super().admit(disk)

    def resync(
        self, disk: Disk, first: int, max_bytes: int, max_s: float, plan: Plan
    ) -> Batch:
        """Count the call."""
        Watched.batches += disk == LOCAL
        return super().resync(disk, first, max_bytes, max_s, plan)


class LocalMirror(Mirror):
    """A volume in sync with keepers for its remote and its local disk."""

    def __init__(self, params: core.Params, remote: Remote) -> None:
        super().__init__(params, remote.uri, Watched)
        self.keep()
        wait_until(lambda: self.engine.remote_status(DR).admitted, "the connection")
        self.local = LocalKeeper(self.engine, params.local, 1, self._note)

    def local_state(self) -> LocalState:
        """Ask the engine."""
        return self.engine.status().local.state

    def wait_for_local(self, state: LocalState) -> None:
        """Wait until the local disk is in *state*."""
        wait_until(lambda: self.local_state() is state, state.value)

    def fail_local(self) -> None:
        """Have the local disk fail; region 200 is what it certainly misses."""
        with size_limit():
            self.engine.pwrite(os.urandom(REGION), 200 * REGION)
        assert self.local_state() is LocalState.FAILED

    def close(self) -> None:
        """End the keepers and the volume."""
        self.local.end()
        super().close()
        assert self.local.join(15.0)


@pytest.fixture
def remote(processes: Processes, run_dir: Path) -> Remote:
    """Give the remote, not started."""
    return Remote(processes, run_dir)


@pytest.fixture
def mirror(run_dir: Path, remote: Remote) -> Iterator[LocalMirror]:
    """Give a volume with random data, in sync; its local keeper is not started."""
    params = make_params(run_dir, assume=True)
    content = os.urandom(SIZE)
    Path(params.local).write_bytes(content)
    remote.image.write_bytes(content)
    core.create(params)
    remote.start()
    mirror = LocalMirror(params, remote)
    yield mirror
    mirror.close()


class TestCopyingBack:
    """A failed disk becomes ok."""

    def test_resumed_disk_is_copied_back_and_it_is_said(
        self, mirror: LocalMirror, remote: Remote
    ) -> None:
        """One loud line at the takeover; start, end and rate of the copy."""
        mirror.local.start()
        mirror.fail_local()
        wait_until(lambda: any("local_failed" in one for one in mirror.log), "the line")
        with size_limit():
            mirror.engine.pwrite(os.urandom(REGION), 201 * REGION)
        missed = mirror.engine.status().local.dirty_regions
        mirror.local.resume(mirror.params.local)
        mirror.wait_for_local(LocalState.OK)
        wait_until(lambda: any("resync_done" in one for one in mirror.log), "the end")
        status = mirror.engine.status().local
        assert status.copied_bytes == missed * REGION
        assert status.repaired == 0
        mirror.engine.flush()
        assert same_images(mirror, remote)
        said = [one for one in mirror.log if one.startswith("local")]
        assert [one.split(": ")[0] for one in said] == [
            "local_failed",
            "local",
            "local",
        ]
        assert "resync_start" in said[1]
        assert "bytes/s" in said[2]

    def test_without_a_remote_it_waits_and_does_not_spin(
        self, mirror: LocalMirror, remote: Remote
    ) -> None:
        """A copy that cannot go on is tried once a second, and goes on by itself."""
        mirror.fail_local()
        remote.kill()
        wait_until(lambda: mirror.state() is RemoteState.OUT_OF_SYNC, "the loss")
        mirror.engine.local_attach(mirror.params.local, replaced=False)
        mirror.engine.admit(LOCAL)
        Watched.batches, events = 0, mirror.engine.remote_status(DR).serial
        started = time.monotonic()
        mirror.local.start()
        wait_until(lambda: Watched.batches >= 4, "four attempts")
        seconds = time.monotonic() - started
        events = mirror.engine.remote_status(DR).serial - events
        # Each second, and at each of the remote's events, which it waits for.
        assert Watched.batches <= seconds / RETRY_S + events + 1
        facts = mirror.local.view().facts
        assert facts.sources == 0
        assert "no remote" in facts.last_error
        assert mirror.local_state() is LocalState.RESYNCING
        remote.start()
        mirror.wait_for_local(LocalState.OK)
        assert same_images(mirror, remote)
        assert mirror.local.view().facts.last_error == ""

    def test_turn_that_fails_is_waited_out_in_every_state(
        self, mirror: LocalMirror, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lasting failure does not fill the log, of a disk that is ok either."""
        turns: list[float] = []

        def fail(_: object) -> None:
            turns.append(time.monotonic())
            raise ValueError("the engine reports the unknown local state 9")

        monkeypatch.setattr(mirror.local, "_observe", fail)
        mirror.local.start()
        wait_until(lambda: len(turns) >= 4, "four turns")
        assert turns[3] - turns[0] >= 2 * RETRY_S
        assert any("unknown local state 9" in one for one in mirror.log)
        monkeypatch.undo()
        mirror.fail_local()
        mirror.local.resume(mirror.params.local)
        mirror.wait_for_local(LocalState.OK)

    def test_replaced_disk_gets_everything(
        self, mirror: LocalMirror, remote: Remote, run_dir: Path
    ) -> None:
        """An empty disk at another path: all of it, and the path is known then."""
        mirror.local.start()
        mirror.fail_local()
        fresh = run_dir / "fresh.img"
        with fresh.open("wb") as file:
            file.truncate(SIZE)
        mirror.local.replace(str(fresh))
        mirror.wait_for_local(LocalState.OK)
        assert mirror.engine.status().local.copied_bytes == SIZE
        assert mirror.local.view().path == str(fresh)
        mirror.engine.flush()
        assert fresh.read_bytes() == remote.image.read_bytes()

    def test_end_while_waiting_is_immediate(self, mirror: LocalMirror) -> None:
        """A keeper with nothing to do ends when asked to."""
        mirror.local.start()
        mirror.local.end()
        mirror.engine.wake()
        assert mirror.local.join(5.0)


class TestResume:
    """A disk that is not the same as before is not used."""

    def refused(
        self, mirror: LocalMirror, path: str, error: type[Exception], words: str
    ) -> None:
        """Fail unless the disk is refused, and stays out of use."""
        with pytest.raises(error, match=words):
            mirror.local.resume(path)
        status = mirror.engine.status().local
        assert status.state is LocalState.FAILED
        assert not status.attached

    def test_disk_that_has_not_failed_is_busy(self, mirror: LocalMirror) -> None:
        """There is nothing to resume, nor to replace."""
        for command in (mirror.local.resume, mirror.local.replace):
            with pytest.raises(BusyError, match="has not failed"):
                command(mirror.params.local)
        assert mirror.local_state() is LocalState.OK

    @pytest.mark.parametrize("name", ["other.img", "\udcff\udce4.img"], ids=ascii)
    def test_another_disk_is_refused_and_not_written_to(
        self, mirror: LocalMirror, run_dir: Path, name: str
    ) -> None:
        """The sample finds it; the reason stays in the status, under any name."""
        other = run_dir / name
        content = os.urandom(SIZE)
        other.write_bytes(content)
        mirror.fail_local()
        self.refused(mirror, str(other), WrongDiskError, "not the same disk as before")
        assert "not the same disk as before" in mirror.engine.status().local.reason
        mirror.engine.pwrite(os.urandom(REGION), 0)
        mirror.engine.flush()
        assert content == other.read_bytes()

    def test_without_a_remote_nothing_can_be_compared(
        self, mirror: LocalMirror, remote: Remote
    ) -> None:
        """Without proof it is not used, until a remote is back."""
        mirror.fail_local()
        remote.kill()
        wait_until(lambda: not mirror.engine.remote_status(DR).admitted, "the loss")
        path = mirror.params.local
        self.refused(mirror, path, RemoteError, "no remote is connected")
        remote.start()
        mirror.wait_for(RemoteState.IN_SYNC)
        mirror.local.resume(path)
        assert mirror.local_state() is not LocalState.FAILED

    def test_disk_that_is_missing_or_too_small_is_refused(
        self, mirror: LocalMirror, run_dir: Path
    ) -> None:
        """Each cause is its own error, and the right disk works afterwards."""
        mirror.fail_local()
        small = run_dir / "small.img"
        small.write_bytes(bytes(REGION))
        self.refused(mirror, str(run_dir / "none"), MissingError, "does not exist")
        self.refused(mirror, str(small), WrongDiskError, f"has {REGION} bytes")
        mirror.local.resume(mirror.params.local)

    @pytest.mark.parametrize("command", ["resume", "replace"])
    def test_disk_that_fails_as_it_is_taken_leaves_no_trace(
        self,
        mirror: LocalMirror,
        run_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: str,
    ) -> None:
        """Neither its path nor the disk is kept: the next command takes another one."""
        mirror.fail_local()
        link = run_dir / "link.img"
        link.symlink_to(mirror.params.local)
        take = getattr(mirror.local, command)
        with monkeypatch.context() as patch:
            patch.setattr(Watched, "unusable", True)
            with pytest.raises(MirrorIOError, match="Input/output error"):
                take(str(link))
        status = mirror.engine.status().local
        assert status.state is LocalState.FAILED
        assert not status.attached
        assert mirror.local.view().path == mirror.params.local
        assert not mirror.local._admitted
        take(str(link))
        assert mirror.local.view().path == str(link)
        mirror.local.start()
        mirror.wait_for_local(LocalState.OK)

    def test_error_of_an_earlier_state_is_not_told(self, mirror: LocalMirror) -> None:
        """An error from before the disk failed is not reported as its reason now."""
        mirror.local._note("no remote is connected")
        mirror.local.start()
        mirror.fail_local()
        wait_until(
            lambda: not mirror.local.view().facts.last_error, "the error to be old"
        )

    def test_disk_that_hangs_keeps_one_command(
        self, mirror: LocalMirror, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Further commands get an error soon: each would hold a control thread."""
        monkeypatch.setattr(local_keeper, "COMMAND_S", 0.2)
        mirror.fail_local()
        hangs = Watched.hangs = threading.Event()
        path = mirror.params.local
        first = threading.Thread(target=mirror.local.resume, args=(path,))
        first.start()
        refused: list[BusyError] = []

        def ask(command: Callable[[str], None]) -> None:
            try:
                command(path)
            except BusyError as error:
                refused.append(error)

        wait_until(mirror.local._command.locked, "the first command")
        others = [
            threading.Thread(target=ask, args=(command,), daemon=True)
            for command in (mirror.local.resume, mirror.local.replace)
        ]
        try:
            for other in others:
                other.start()
            wait_until(lambda: len(refused) == 2, "both to be refused")
        finally:
            Watched.hangs = None
            hangs.set()
            for thread in (first, *others):
                thread.join(30)
        mirror.local.start()
        mirror.wait_for_local(LocalState.OK)

    def test_disk_in_use_is_refused(self, mirror: LocalMirror) -> None:
        """A disk that another program has locked by now is not taken."""
        mirror.fail_local()
        with Path(mirror.params.local).open("r+b") as other:
            # The failed disk's own lock is given back with the first attempt.
            self.refused(mirror, "/dev/null/none", MirrorError, "/dev/null/none")
            lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)
            self.refused(mirror, mirror.params.local, BusyError, "another program")
        mirror.local.resume(mirror.params.local)
