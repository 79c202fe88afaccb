# SPDX-License-Identifier: BSD-3-Clause
"""
What the activity log costs: shared syncs, lazy deactivation, and nothing when steady.

The set of active extents is made durable before data is; what keeps that cheap is shown
here through the doors, by the engine's own counts and by the kernel's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB, Site

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("timed")]

Sites = Callable[..., Site]

EXTENT = 4 * MIB
MAX_EXTENTS = 1024
STEADY_S = 10  # longer than the flusher's 5 s, and than several turns of maintenance
# Whatever could write to a file, or make one durable.
WRITING = (
    "write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,msync,sync_file_range,"
    "ftruncate,fallocate,rename,renameat,renameat2,unlink,unlinkat"
)


def in_background(call: Callable[..., object], *args: object) -> threading.Thread:
    """Start a call that will not return before the test lets it."""
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    return thread


def _is_traced(pid: int) -> bool:
    """Tell whether every thread of a process is traced."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        words = [(task / "status").read_text() for task in tasks.iterdir()]
    except FileNotFoundError:  # one has just ended
        return False
    return all("TracerPid:\t0\n" not in text for text in words)


class Trace:
    """The server's system calls that write, from now on."""

    def __init__(self, site: Site, output: Path) -> None:
        self._output = output
        words = ["strace", "-f", "-y", "-p", str(site.pid), "-e", f"trace={WRITING}"]
        self._tracer = site.processes.start([*words, "-o", str(output)])
        support.wait_until(lambda: _is_traced(site.pid), "strace to attach")

    def lines(self) -> list[str]:
        """Return the calls so far."""
        return self._output.read_text().splitlines() if self._output.exists() else []

    def end(self) -> None:
        """Let the server go; all of its calls are in `lines` then."""
        self._tracer.terminate()
        self._tracer.wait(20)


def metadata_of(lines: list[str], state: Path) -> list[str]:
    """Return those that touch the state directory; an msync names no file."""
    return [line for line in lines if f"<{state}" in line or "msync(" in line]


def test_steady_load_writes_no_metadata(site: Site, door: str, run_dir: Path) -> None:
    """Inside the hot set: no log is written, flushed or synced, by any thread."""
    support.requires_program("strace")
    site.bring_up(door)
    handle = site.client()
    for offset in range(0, site.size, EXTENT):
        handle.pwrite(b"a" * 4096, offset)
    handle.shutdown()
    before = site.status()["persists"]
    trace = Trace(site, run_dir / "strace.out")
    load = site.load(flush_every=50)
    load.wait_for(0)
    count = load.count
    # That nothing happens for so long is what is tested.
    time.sleep(STEADY_S)
    assert site.status()["persists"] == before
    assert load.count > count + 100
    trace.end()
    lines = trace.lines()
    assert any("pwrite64(" in line and str(site.local) in line for line in lines)
    assert any("fdatasync(" in line and str(site.local) in line for line in lines)
    assert metadata_of(lines, site.state) == []
    load.stop()
    # That the check would see one: a remote that is lost is a change of state.
    trace = Trace(site, run_dir / "strace.lost")
    site.dr.kill()
    site.wait_state("out_of_sync")
    trace.end()
    seen = metadata_of(trace.lines(), site.state)
    assert any("msync(" in line for line in seen), seen
    assert any("superblock" in line for line in seen), seen
    assert site.status()["persists"] != before


def test_activations_at_once_share_one_sync(new_site: Sites, door: str) -> None:
    """Writers into new extents that come while one is made durable share the next."""
    writers = 8
    site = new_site(size=(writers + 1) * EXTENT)
    gate = site.folder / "gate"
    site.bring_up(door, fault=f"activity_sync:1=wait:{gate}")
    assert site.status()["persists"]["activity"] == 0
    handles = [site.client() for _ in range(writers + 1)]
    threads = [in_background(handles[0].pwrite, b"a" * 4096, 0)]
    reached = gate.with_name("gate.reached")
    support.wait_until(reached.exists, "the first activation's sync")
    threads += [
        in_background(handles[i].pwrite, b"a" * 4096, i * EXTENT)
        for i in range(1, writers + 1)
    ]
    support.wait_until(
        lambda: site.status()["inflight"] == writers + 1, "all writers to wait"
    )
    # Rule 1: not a byte of any is on disk before its extent is.
    assert b"a" not in site.local.read_bytes()
    gate.touch()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert site.status()["persists"]["activity"] == 2
    assert site.status()["active_extents"] == writers + 1
    for handle in handles:
        handle.shutdown()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("slow", ["local", "remote"])
def test_extent_goes_cold_only_once_both_sides_flushed(
    new_site: Sites, slow: str
) -> None:
    """With the set full a newcomer takes a place only after both sides have flushed."""
    site = new_site(size=(MAX_EXTENTS + 1) * EXTENT)
    site.deadline = "30s"
    site.write_config()
    gate = site.folder / "gate"
    reached = gate.with_name("gate.reached")
    site.dr.start()
    site.create("dr")
    # The first flush of local is the start's.
    site.serve(fault=f"local_flush:2=wait:{gate}" if slow == "local" else "")
    site.wait_in_sync()
    handle = site.client()
    for i in range(4):
        handle.trim(MAX_EXTENTS // 4 * EXTENT, i * MAX_EXTENTS // 4 * EXTENT)
    assert site.status()["active_extents"] == MAX_EXTENTS
    log = site.state / "activity"
    before = log.read_bytes()
    if slow == "remote":
        site.dr.freeze()
    newcomer = in_background(handle.pwrite, b"n" * 4096, MAX_EXTENTS * EXTENT)
    support.wait_until(lambda: site.status()["inflight"] == 1, "the newcomer")
    if slow == "local":
        support.wait_until(reached.exists, "the flush of local")
    # No state shows that it waits: give a wrong one time to end.
    newcomer.join(0.5)
    assert newcomer.is_alive()
    assert before == log.read_bytes(), "a place was taken without a flush"
    assert site.status()["active_extents"] == MAX_EXTENTS
    gate.touch()
    site.dr.thaw()
    newcomer.join(30)
    assert not newcomer.is_alive()
    assert before != log.read_bytes()
    assert site.status()["active_extents"] < MAX_EXTENTS
    # Lazily: those that went cold for one come back without a write.
    persists = site.status()["persists"]["activity"]
    handle.pwrite(b"b" * 4096, (MAX_EXTENTS // 4 - 1) * EXTENT)
    assert site.status()["persists"]["activity"] == persists
    handle.shutdown()
    site.stop()
