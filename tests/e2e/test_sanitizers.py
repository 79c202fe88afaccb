# SPDX-License-Identifier: BSD-3-Clause
"""
The engine and its direct door under the sanitizers, while fio loads them.

tests/c/server_in_c.c stands in for the Python half, so that every thread in the process
is one the sanitizers understand; libnbd is watched through what it calls (locks,
memory), its own code is not instrumented. Nothing is suppressed. Meanwhile
one remote is killed and started again, another frozen for longer than its deadline,
resyncs run, and now and then all is invalidated or paused. Not a word may come of it,
and in the end all sides are equal.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import time
from pathlib import Path

import pytest
import support
from e2e.lib.servers import Secondary

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("timed")]

SIZE = 96 << 20
LOAD_S = float(os.environ.get("NBD_MIRROR_SANITIZE_S", "20"))
BUILD = support.ROOT / "tests" / "c" / "build"

JOBS = f"""\
[global]
ioengine=nbd
time_based=1
runtime={LOAD_S}
size={SIZE}
randrepeat=0
[mixed]
rw=randrw
bsrange=512-64k
blockalign=512
iodepth=16
fsync=40
[sequential]
rw=write
bs=256k
iodepth=4
[trims]
rw=randtrimwrite
bs=64k
iodepth=16
fdatasync=25
[small]
rw=randwrite
bs=4k
iodepth=16
"""


@pytest.fixture(scope="module")
def servers() -> Path:
    """Build the server under each sanitizer; give the folder of the builds."""
    support.requires_program("fio", "gcc")
    subprocess.run(
        ["make", "-s", "-j2", "-C", BUILD.parent, "servers"], check=True, timeout=240
    )
    return BUILD


def options(folder: Path) -> dict[str, str]:
    """Return the environment of a server under a sanitizer."""
    report = f"log_path={folder}/report:exitcode=66"
    return {
        "ASAN_OPTIONS": f"{report}:detect_leaks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"{report}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{report}:history_size=4:second_deadlock_stack=1",
    }


def reports(folder: Path) -> str:
    """Return what the sanitizers said."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("report.*")))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_engine_under_load_is_clean(
    servers: Path, run_dir: Path, processes: support.Processes, sanitizer: str
) -> None:
    """No race, no misuse of memory, no leak; and all sides are equal in the end."""
    killed, frozen = remotes = [
        Secondary(processes, run_dir, name, "nbdkit") for name in ("a", "b")
    ]
    local, ready, address = (run_dir / name for name in ("local", "ready", "v.sock"))
    (run_dir / "state").mkdir()
    for image in (local, *(one.image for one in remotes)):
        with image.open("wb") as file:
            file.truncate(SIZE)
    words = [local, run_dir / "state", ready, address, *(one.socket for one in remotes)]
    (run_dir / "config").write_text("".join(f"{word}\n" for word in words))
    for one in remotes:
        one.start()

    program = servers / {"asan": ".", "tsan": "tsan"}[sanitizer] / "server_in_c"
    server = processes.start([program, run_dir / "config"], env=options(run_dir))

    def in_sync() -> bool:
        assert server.poll() is None, reports(run_dir)
        for one in remotes:
            one.revive()
        return ready.exists()

    support.wait_until(in_sync, "the first copy", timeout_s=60)
    (run_dir / "load.fio").write_text(
        JOBS.replace("[global]", f"[global]\nuri=nbd+unix:///?socket={address}")
    )
    fio = processes.start(["fio", f"--output={run_dir}/fio.out", run_dir / "load.fio"])
    until = time.monotonic() + LOAD_S
    rounds = 0
    while fio.poll() is None and time.monotonic() < until:
        assert server.poll() is None, reports(run_dir)
        harass(killed, frozen, rounds)
        rounds += 1
    assert fio.wait(120) == 0, (run_dir / "fio.out").read_text()
    assert rounds >= 2
    ready.unlink(missing_ok=True)
    support.wait_until(in_sync, "the last copy", timeout_s=60)
    server.terminate()
    status = server.wait(60)
    assert not reports(run_dir)
    assert status == 0
    for one in remotes:
        one.kill()
        assert filecmp.cmp(local, one.image, shallow=False)


def harass(killed: Secondary, frozen: Secondary, turn: int) -> None:
    """
    Kill one and start it again, soon or late; freeze the other, long or short.

    The times are what is tested: shorter and longer than hold and deadline. Nothing is
    waited for in between: what the load and a resync are at is left to chance.
    """
    time.sleep(0.7)  # both are there: enough for a part of a resync, or for all
    killed.kill()
    time.sleep((0.05, 0.8)[turn % 2])
    killed.start()
    time.sleep(0.3)  # less than a resync: the freeze often meets one
    frozen.revive()
    frozen.freeze()
    time.sleep((0.5, 2.2)[turn % 2])
    frozen.thaw()
