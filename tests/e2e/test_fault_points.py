# SPDX-License-Identifier: BSD-3-Clause
"""
Every fault point, in every kind of request: killed there, and made to fail there.

A kind is a script. It is run once with every point counting (see csrc/base/fault.c),
which tells what it passes from its mark on; then once for each of these with a kill at
it, and where the point can fail once with an error. What a crash left is recovered
twice: as it is, and as after lost power. A point that no kind passes fails the last
test, so that a new one cannot go untested.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.bench import EXTENT, Bench, Failed
from e2e.lib.engine_child import Died, EngineError
from e2e.lib.fault_kinds import KINDS, MAKERS, Case, Kind, make_clean
from e2e.lib.node_points import CONTROL_POINTS, ENGINE_POINTS
from e2e.lib.oracle import ALL, lose_power, page_cache_lived

from nbd_mirror.volume import core

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fault_points")]

MAX_TIMES = 2  # a point passed again and again is stopped at so often
STARTS = [name for name in KINDS if name.startswith("start") or name == "create"]
OPERATORS = ("cool", "invalidate", "fail and reset")  # no client asks for these


@pytest.fixture
def bench(run_dir: Path, processes: support.Processes) -> Bench:
    """Give a bench with a volume on it."""
    bench = Bench(run_dir, processes)
    make_clean(bench)
    return bench


# --- the loop ----------------------------------------------------------------


def passes(bench: Bench, kind: Kind) -> dict[str, list[int]]:
    """Run *kind* undisturbed; return at which times each point was passed."""
    folder = bench.folder / "count"
    folder.mkdir(exist_ok=True)
    for point in core.fault_points():
        (folder / point).touch()
    fault = ",".join(f"{name}=wait:{folder / name}" for name in core.fault_points())
    case = Case(bench, kind.extra + fault, folder)
    bench.serve()
    try:
        kind.script(case)
    except EngineError:
        assert kind.extra
    after = case.counts()
    bench.end()
    found: dict[str, list[int]] = {}
    for point, count in after.items():
        first = case.before.get(point, 0) + 1
        if count >= first:
            # The last is kept: what is done once at the end of many is rare.
            found[point] = [*range(first, count)][: MAX_TIMES - 1]
            found[point].append(count)
    return found


def points_of(bench: Bench, name: str) -> dict[str, list[int]]:
    """Prepare the kind's files, and return what it passes."""
    kind = KINDS[name]
    MAKERS[kind.files](bench)
    bench.serve()
    bench.save("begin")
    return passes(bench, kind)


def recover(case: Case, *, power: bool) -> None:
    """Recover what the case left, by the rules."""
    bench = case.bench
    allowed = case.allowed
    if not (bench.state / "superblock").exists():
        # A create that did not get far left no volume.
        with pytest.raises(EngineError) as caught:
            bench.open()
        assert caught.value.errno == errno.ENOENT
        bench.end()
        child = bench.nursery.child()
        child.call("create", bench.params, force=True)
        child.kill()
    elif power:
        lose_power(bench.state)
        allowed = case.allowed_power
    if case.local_failed:
        bench.recover_local_and_check()
    else:
        bench.recover_and_check(allowed)
    bench.end()


# Which points each kind passed: of the kinds that have been run, for the last test.
PASSED: dict[str, set[str]] = {}


def begin(bench: Bench, kind: Kind, fault: str) -> Case:
    """Put the kind's files back, and give a case with the fault."""
    bench.restore("begin")
    bench.serve()
    return Case(bench, kind.extra + fault, local_failed=kind.local_failed)


def check_kill(
    bench: Bench, kind: Kind, fault: str, *, first: bool, power: bool
) -> None:
    """
    Run the script, which must be killed; recover, with *power* also without it.

    Only the *first* time at a point is sure to come: how often a resync passes one
    depends on how its copies and the answers to them fall together.
    """
    case = begin(bench, kind, fault)
    try:
        kind.script(case)
    except Died:
        pass
    else:
        assert not first, "it was not killed"
        bench.end()
        return
    assert case.marked, "it was killed before the request"
    assert bench.child
    assert bench.child.status() == -9
    bench.serve()
    if kind.extra:  # the page cache is not to be believed after a failed store
        case.allowed = case.allowed_power
    power = power and not case.allowed >= ALL  # it could add nothing
    if power:
        bench.save("death")
    recover(case, power=False)
    if power:
        bench.restore("death")
        recover(case, power=True)


@pytest.mark.parametrize("name", KINDS)
def test_killed_at_every_point_recovers(bench: Bench, name: str) -> None:
    """Killed there: nothing answered is lost, what may differ is dirty, no more."""
    found = points_of(bench, name)
    PASSED[name] = set(found)
    for point, times in found.items():
        for time in times:
            fault = f"{point}:{time}=kill"
            try:
                first = time == times[0]
                check_kill(bench, KINDS[name], fault, first=first, power=first)
            except BaseException as error:
                error.add_note(f"in kind {name!r} with {KINDS[name].extra}{fault}")
                raise


# --- errors ------------------------------------------------------------------


def error_number(call: Callable[[], object]) -> int:
    """Return the errno a call raises, 0 if it does not."""
    try:
        call()
    except EngineError as error:
        return error.errno
    return 0


def check_failed_for_good(bench: Bench) -> None:
    """Fail unless the volume has failed, refuses writes, reads, and stays so."""
    child = bench.child
    assert child
    at = 2 * EXTENT
    for _ in range(2):
        status = child.call("status")
        assert status.failed
        assert status.reason
        assert error_number(lambda: child.call("pwrite", bytes(512), at)) == errno.EIO
        assert error_number(lambda: child.call("trim", 512, at)) == errno.EIO
        assert error_number(lambda: child.call("flush")) == errno.EIO
        assert child.call("read", at, 512) == bench.old[at : at + 512]
    assert error_number(lambda: child.call("stop")) == errno.EIO


def check_error(bench: Bench, name: str, fault: str) -> None:
    """Run the script, with the error in it; judge what came of it; recover."""
    case = begin(bench, KINDS[name], fault)
    number = 0
    try:
        KINDS[name].script(case)
    except EngineError as error:
        number = error.errno
    except Failed:
        pass
    assert case.marked, "it failed before the request"
    if name in STARTS:
        assert number in (errno.EIO, errno.ENOSPC)
    elif name == "stop":
        assert number == errno.EIO
    else:
        # No client learns that the logs' disk is full: the client's disk is not.
        more = {errno.ENOSPC} if name in OPERATORS else set()
        assert number in {0, errno.EIO} | more
        check_failed_for_good(bench)
        assert not page_cache_lived(bench.state), "what was not stored is believed"
    bench.end()
    case.allowed = case.allowed_power  # the page cache is not to be believed either
    bench.serve()
    recover(case, power=False)


ERROR_KINDS = [name for name, kind in KINDS.items() if not kind.extra]


@pytest.mark.parametrize("name", ERROR_KINDS)
def test_metadata_error_at_every_point_is_final(bench: Bench, name: str) -> None:
    """A log that cannot be written fails the volume until the next start: EIO."""
    fails = core.fault_points()
    for point, times in points_of(bench, name).items():
        if not fails[point] or point.startswith("local_"):
            continue  # the local disk's failures have tests of their own
        for time in times:
            fault = f"{point}:{time}=error:ENOSPC"
            try:
                check_error(bench, name, fault)
            except BaseException as error:
                error.add_note(f"in kind {name!r} with {fault}")
                raise


def test_every_point_is_passed_by_some_kind(
    run_dir: Path, processes: support.Processes
) -> None:
    """A point that no request of the matrix passes is not tested: add a kind."""
    for number, name in enumerate(KINDS):
        if name not in PASSED:  # this test was chosen alone
            folder = run_dir / str(number)
            folder.mkdir()
            bench = Bench(folder, processes)
            make_clean(bench)
            PASSED[name] = set(points_of(bench, name))
    passed = set().union(*PASSED.values())
    # Two servers pass those of the control of nodes: test_node_faults.py.
    assert passed <= set(core.fault_points())
    assert set(core.fault_points()) - CONTROL_POINTS - ENGINE_POINTS <= passed
