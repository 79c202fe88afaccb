# SPDX-License-Identifier: BSD-3-Clause
"""The Python face of the engine: buffers, errors, reports, the life of a handle."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from support import Processes
from unit.volumes import DR, REGION, SIZE, Remote, make_params

from nbd_mirror._core import lib
from nbd_mirror.base.errors import (
    BusyError,
    ConfigError,
    ExistsError,
    MissingError,
    NotRunningError,
    RemoteError,
)
from nbd_mirror.commands import listeners
from nbd_mirror.rules.generation import Lineage, Peer
from nbd_mirror.rules.node_side import Role
from nbd_mirror.rules.pace import Plan, quantile
from nbd_mirror.rules.state import RemoteState
from nbd_mirror.volume import config, config_values, core, model
from nbd_mirror.volume.model import HOLE, LOCAL, Verdict, disk_of


@pytest.fixture
def params(run_dir: Path) -> core.Params:
    """Give a volume that was created, its remote all dirty."""
    params = make_params(run_dir)
    core.create(params)
    return params


@pytest.fixture
def engine(params: core.Params) -> Iterator[core.Engine]:
    """Give it open and started."""
    with core.Engine(params) as engine:
        engine.start()
        yield engine
        engine.stop()


@pytest.fixture
def remote(processes: Processes, run_dir: Path) -> Remote:
    """Give its remote, serving."""
    remote = Remote(processes, run_dir)
    remote.start()
    return remote


def test_numbers_that_python_states_again_are_the_engine_s() -> None:
    """Commands need some limits without the compiled code: they equal nbdm.h's."""
    stated = {
        "NBDM_MAX_REMOTES": config_values.MAX_REMOTES,
        "NBDM_STARVED_DEADLINES": config.STARVED_DEADLINES,
        "NBDM_MAX_REQUEST": config_values.MIN_MEMORY,
        "NBDM_MAX_LISTENERS": listeners.MAX_LISTENERS,
        "NBDM_EXTENT_HOLE": model.HOLE,
    }
    assert stated == {name: getattr(lib, name) for name in stated}


def test_the_longest_name_fits_its_field() -> None:
    """The configuration takes names up to the length that is stored, no longer."""
    longest = "n" * (lib.NBDM_NAME_LEN - 1)
    config.RemoteConfig(name=longest, uri="nbd://host")
    with pytest.raises(ValidationError):
        config.RemoteConfig(name=longest + "n", uri="nbd://host")


class TestLife:
    """Create, open, stop, close."""

    def test_create_over_a_volume_without_force_is_refused(
        self, params: core.Params
    ) -> None:
        """A state directory in use is not overwritten by mistake."""
        with pytest.raises(ExistsError):
            core.create(params)
        core.create(params, force=True)

    def test_create_of_a_node_makes_a_secondary_without_data(
        self, run_dir: Path
    ) -> None:
        """A new node has an id of its own, no generation, and no claim on anything."""
        nodes = tuple(
            replace(make_params(run_dir).remotes[0], name=name, is_node=name != "plain")
            for name in ("beta", "plain", "gamma")
        )
        params = replace(make_params(run_dir), node="alpha", remotes=nodes)
        core.create(params)
        node = core.peek(params.state_dir).node
        assert node is not None
        assert (node.node, node.role) == ("alpha", Role.SECONDARY)
        assert node.lineage == Lineage(peers=(Peer("beta"), Peer("gamma")))
        assert (node.epoch, node.leader, node.claim) == (0, "", None)
        assert [peer.id for peer in node.peers] == [None, None]
        core.create(params, force=True)
        again = core.peek(params.state_dir).node
        assert again is not None
        assert again.id != node.id

    def test_create_leaves_the_local_disk_as_it_is(self, run_dir: Path) -> None:
        """An existing image is adopted without touching a byte of it."""
        params = make_params(run_dir)
        content = os.urandom(SIZE)
        Path(params.local).write_bytes(content)
        core.create(params)
        assert content == Path(params.local).read_bytes()

    def test_open_of_an_open_volume_is_refused(
        self, params: core.Params, engine: core.Engine
    ) -> None:
        """Two servers on one volume are impossible."""
        assert engine.status().nr_remotes == 1
        with pytest.raises(BusyError):
            core.Engine(params)

    def test_open_without_state_says_what_is_missing(self, run_dir: Path) -> None:
        """No superblock: the volume was not created."""
        with pytest.raises(MissingError):
            core.Engine(make_params(run_dir))

    def test_call_after_close_is_an_error_and_no_crash(
        self, params: core.Params
    ) -> None:
        """A closed handle is refused before C sees it; closing again is nothing."""
        engine = core.Engine(params)
        engine.close()
        engine.close()
        with pytest.raises(NotRunningError):
            engine.status()

    def test_peek_beside_a_server_tells_what_is_stored(
        self, params: core.Params, engine: core.Engine
    ) -> None:
        """The superblock is read without the lock."""
        peek = core.peek(params.state_dir)
        assert peek.name == "v"
        assert peek.volume.uuid == engine.status().uuid
        assert peek.volume.size == SIZE
        assert [(one.name, one.state) for one in peek.remotes] == [
            ("dr", RemoteState.OUT_OF_SYNC)
        ]

    def test_stop_refuses_requests_and_is_clean(self, params: core.Params) -> None:
        """After a stop requests get ESHUTDOWN; what was written is there again."""
        with core.Engine(params) as engine:
            engine.start()
            engine.pwrite(b"x" * 4096, 0)
            engine.stop()
            engine.stop()
            with pytest.raises(NotRunningError) as caught:
                engine.pwrite(b"y" * 4096, 0)
            assert caught.value.errno == errno.ESHUTDOWN
        assert core.peek(params.state_dir).volume.clean
        with core.Engine(params) as engine:
            buf = bytearray(4096)
            engine.pread(buf, 0)
            assert bytes(buf) == b"x" * 4096


class TestRequests:
    """Reads and writes through borrowed buffers."""

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_write_from_any_buffer_is_read_back(
        self, engine: core.Engine, kind: type
    ) -> None:
        """Read-only is enough to write from."""
        content = os.urandom(3 * 4096)
        engine.pwrite(kind(content), 8192, core.FUA)
        buf = bytearray(len(content))
        engine.pread(memoryview(buf), 8192)
        assert content == bytes(buf)

    @pytest.mark.parametrize("buf", [b"1234" * 128, memoryview(b"1234" * 128)])
    def test_read_into_a_read_only_buffer_is_refused(
        self, engine: core.Engine, buf: core.Buffer
    ) -> None:
        """C would write through it: a bytes object would change under Python."""
        with pytest.raises((BufferError, TypeError)):
            engine.pread(buf, 0)
        assert bytes(buf) == b"1234" * 128

    @pytest.mark.parametrize(
        ("length", "offset"), [(4096, SIZE), (4096, SIZE - 512), (2, SIZE - 1)]
    )
    def test_request_outside_is_einval(
        self, engine: core.Engine, length: int, offset: int
    ) -> None:
        """A bad range and a bad disk give different errors."""
        with pytest.raises(ConfigError) as caught:
            engine.pwrite(bytes(length), offset)
        assert caught.value.errno == errno.EINVAL
        assert str(caught.value)

    def test_trim_and_zero_read_as_zeroes(self, engine: core.Engine) -> None:
        """Both leave zeroes; the rest stays."""
        engine.pwrite(b"x" * (4 * REGION), 0)
        engine.trim(REGION, 0)
        engine.zero(REGION, 2 * REGION, core.FUA | core.MAY_TRIM)
        engine.flush()
        engine.cache(REGION, 0)
        buf = bytearray(4 * REGION)
        engine.pread(buf, 0)
        zeroes, data = bytes(REGION), b"x" * REGION
        assert zeroes + data + zeroes + data == bytes(buf)

    def test_extents_tell_data_from_holes_and_keep_the_limit(
        self, engine: core.Engine
    ) -> None:
        """Runs cover the range from its start, in order."""
        engine.pwrite(b"x" * REGION, 4 * REGION)
        engine.flush()
        runs = engine.extents(SIZE, 0)
        assert runs[0].offset == 0
        ends = [run.offset + run.length for run in runs[:-1]]
        assert ends == [run.offset for run in runs[1:]]
        assert [run.type for run in runs if run.offset == 4 * REGION] == [0]
        assert runs[0].type == HOLE
        assert len(engine.extents(SIZE, 0, 1)) == 1

    def test_requests_in_threads_do_not_hold_the_gil(self, engine: core.Engine) -> None:
        """Python goes on while a thread is inside the engine."""
        serial = engine.remote_status(DR).serial
        done = threading.Event()

        def wait() -> None:
            engine.wait(DR, serial, 30.0)
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        engine.pwrite(bytes(4096), 0)
        assert not done.is_set()
        engine.wake()
        thread.join(10.0)
        assert done.is_set()


class TestRemotes:
    """What the keeper calls."""

    def test_connect_to_nothing_raises_the_far_sides_words(
        self, engine: core.Engine, run_dir: Path
    ) -> None:
        """A refused or missing socket is a RemoteError or MissingError with words."""
        with pytest.raises((RemoteError, MissingError)) as caught:
            engine.connect(DR, f"nbd+unix:///?socket={run_dir}/none", 1.0)
        assert str(caught.value)

    @pytest.mark.parametrize("disk", [LOCAL, disk_of(1)])
    def test_disk_that_is_no_remote_is_refused(
        self, engine: core.Engine, remote: Remote, disk: model.Disk
    ) -> None:
        """The local disk has the number 0, and the only remote the number 1."""
        for call in (
            lambda: engine.connect(disk, remote.uri, 2.0),
            lambda: engine.compare(disk, 3),
            lambda: engine.explain(disk, "no remote"),
            lambda: engine.fail(disk, "no remote"),
            lambda: engine.reset(disk),
            lambda: engine.pause(disk, paused=True),
            lambda: engine.invalidate(disk),
            lambda: engine.release_late(disk),
        ):
            with pytest.raises(ConfigError, match=f"disk {disk} is no remote"):
                call()
        assert engine.comparable(disk, 0) is None
        with pytest.raises((ConfigError, ValueError)):
            engine.remote_status(disk)
        assert engine.remote_status(DR).state is RemoteState.OUT_OF_SYNC

    def test_connect_admit_resync_makes_in_sync(
        self, engine: core.Engine, remote: Remote, params: core.Params
    ) -> None:
        """The mechanism without a keeper: connect, admit, copy, equal."""
        engine.pwrite(os.urandom(REGION), 3 * REGION)
        engine.connect(DR, remote.uri, 2.0)
        assert engine.compare(DR, 3) == Verdict.DIRTY
        engine.admit(DR)
        assert engine.remote_status(DR).state is RemoteState.RESYNCING
        batch = engine.resync(DR, 0, 64 << 20, 0.0, Plan(8, 0))
        assert batch.error is None
        assert batch.copied_bytes == SIZE
        status = engine.remote_status(DR)
        assert status.state is RemoteState.IN_SYNC
        assert status.copied_bytes == SIZE
        assert engine.compare(DR, 3) == Verdict.SAME
        assert Path(params.local).read_bytes() == remote.image.read_bytes()

    def test_chain_of_a_remote_is_passed_on_without_other_words(
        self, engine: core.Engine, remote: Remote
    ) -> None:
        """Our clients get it as the description of our own export."""
        ours = engine.chain()
        remote.kill()
        described = "fixed:nbd_mirror volumes: 01ab cd\x1b[2J 02ef"
        remote.start("--filter=exportname", f"exportdesc={described}")
        engine.connect(DR, remote.uri, 2.0)
        assert engine.chain() == f"{ours} 01ab cd"

    def test_resync_of_a_remote_not_connected_reports_its_error(
        self, engine: core.Engine
    ) -> None:
        """Nothing copied, and why."""
        batch = engine.resync(DR, 0, REGION, 0.0, Plan(1, 0))
        assert isinstance(batch.error, RemoteError)
        assert batch.copied_bytes == 0

    def test_reason_too_long_is_cut_between_characters(
        self, engine: core.Engine
    ) -> None:
        """159 bytes are kept, and no half of an umlaut."""
        engine.explain(DR, "a" + "ü" * 200)
        assert engine.remote_status(DR).reason == "a" + "ü" * 79

    def test_reason_with_a_name_that_is_no_text_is_taken(
        self, engine: core.Engine
    ) -> None:
        """A path may have any bytes: what cannot be said becomes a '?'."""
        engine.explain(DR, "no \udcff.sock")
        assert engine.remote_status(DR).reason == "no ?.sock"

    def test_event_after_a_change_is_not_missed(self, engine: core.Engine) -> None:
        """A change between looking and waiting ends the wait at once."""
        seen = engine.remote_status(DR).serial
        engine.pause(DR, paused=True)
        assert engine.wait(DR, seen, None) > seen
        assert engine.remote_status(DR).state is RemoteState.PAUSED

    def test_event_that_does_not_come_ends_with_the_time(
        self, engine: core.Engine
    ) -> None:
        """A timed wait returns the serial it was given."""
        seen = engine.remote_status(DR).serial
        assert engine.wait(DR, seen, 0.01) == seen

    def test_latency_counts_each_request_in_the_bucket_of_its_time(
        self, engine: core.Engine
    ) -> None:
        """Reads, and writes that no remote was sent; quiet without a resync."""
        started = time.monotonic()
        for _ in range(5):
            engine.pread(bytearray(4096), 0)
        engine.pwrite(bytes(4096), 0)
        longest_s = time.monotonic() - started
        latency = engine.latency()
        assert [5, 1, 0] == [sum(one) for one in latency.quiet]
        assert [0, 0, 0] == [sum(one) for one in latency.disturbed]
        # A bucket reaches a quarter further than what it counts.
        assert 0 < quantile(latency.quiet[0], 1.0) <= max(1.25 * longest_s, 2e-6)

    def test_active_extents_tell_the_latest_used_first(
        self, engine: core.Engine
    ) -> None:
        """The sample looks where clients wrote last."""
        extent = engine.status().extent_size
        engine.pwrite(bytes(4096), 0)
        engine.pwrite(bytes(4096), 2 * extent)
        assert engine.active_extents() == [2, 0]

    def test_recent_regions_tell_the_latest_written_first(
        self, engine: core.Engine
    ) -> None:
        """Each once, the latest write first: where an old backup would differ."""
        region = engine.status().region_size
        for index in (5, 3, 5, 0):
            engine.pwrite(bytes(4096), index * region)
        assert engine.recent_regions(8) == [0, 5, 3]
        assert engine.recent_regions(2) == [0, 5]
