# SPDX-License-Identifier: BSD-3-Clause
"""
The policy is switched while a load runs, through both doors.

Under degrade every write is answered; under stop none that is not on both disks. What
an operator switched lasts until the server ends.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import support
from e2e.lib.clients import Load, error_of
from e2e.lib.harness import MIB, Site

from nbd_mirror.base.errors import ConfigError
from nbd_mirror.volume import control

Sites = Callable[..., Site]


def switch(site: Site, policy: str | None = None, reads: str | None = None) -> object:
    """Switch as the command would, which takes half a second longer."""
    return control.call(site.state, "policy", 30.0, policy=policy, fenced_reads=reads)


def in_force(policy: str, reads: str = "serve", *, fenced: bool = False) -> object:
    """Return what the server answers with such a policy."""
    return {"policy": policy, "fenced_reads": reads, "fenced": fenced}


def run_a_while(load: Load) -> None:
    """Wait for some more writes, or for the load's end by EIO."""
    goal = load.count + 30
    support.wait_until(
        lambda: load.count > goal or load.ended,
        "the load to run",
        progress=lambda: load.count,
    )


def test_switched_to_stop_under_load_writes_end(site: Site, door: str) -> None:
    """Degrade to stop: while in sync nothing, once the remote is lost EIO."""
    site.bring_up(door)
    load = site.load()
    load.wait_for(50)
    assert switch(site, "stop") == in_force("stop")
    load.wait_for(load.count + 50, "writes under stop")
    site.dr.kill()
    load.join()
    assert errno.EIO in {error.errnum for error in load.errors}
    status = site.status()
    assert (status["policy"], status["state"]) == ("stop", "out_of_sync")
    assert "policy stop: writes get EIO" in status["reason"]
    # Each answered write is on the secondary's disk, which has not been copied to.
    load.check_file(site.dr.image)
    site.dr.start()
    site.wait_in_sync()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_switched_to_stop_while_behind_fences_at_once(site: Site, door: str) -> None:
    """Degrade to stop with the remote away: EIO from the command's answer on."""
    site.bring_up(door)
    site.dr.kill()
    site.wait_state("out_of_sync")
    load = site.load()
    load.wait_for(50, "writes while the remote is away")
    assert load.errors == []
    handle = site.client()
    assert switch(site, "stop") == in_force("stop", fenced=True)
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    assert errno.EIO == error_of(handle.flush)
    load.join()
    assert "an operator changed policy degrade -> stop; writes get EIO" in site.log
    site.dr.start()
    site.wait_in_sync()
    load.check_file(site.dr.image)
    handle.pwrite(b"c" * 4096, 2 * MIB)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_switched_to_degrade_lifts_the_fence(new_site: Sites, door: str) -> None:
    """Stop to degrade: after EIO a client may write at once; the state is honest."""
    site = new_site(policy="stop")
    site.bring_up(door)
    site.dr.kill()
    handle = site.client()
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    assert switch(site, "degrade") == in_force("degrade")
    handle.pwrite(b"c" * 4096, MIB)
    load = site.load()
    load.wait_for(50, "writes while the remote is away")
    status = site.status()
    assert (status["policy"], status["state"]) == ("degrade", "out_of_sync")
    assert "policy stop" not in status["reason"]
    site.assert_covered()
    site.dr.start()
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_switched_back_and_forth_under_load_loses_nothing(
    new_site: Sites, door: str
) -> None:
    """Switched while the remote comes and goes: answered is answered, on both."""
    site = new_site()
    site.deadline = "500ms"
    site.write_config()
    site.bring_up(door)
    for turn in range(6):
        load = site.load(threads=4, flush_every=20)
        run_a_while(load)
        if turn == 2:
            site.dr.freeze()
        if turn == 3:
            site.dr.thaw()
        switch(site, "degrade" if turn % 2 else "stop")
        run_a_while(load)
        load.stop()
        assert {error.errnum for error in load.errors} <= {errno.EIO}
    load = site.load()
    run_a_while(load)
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


@pytest.mark.parametrize("configured", ["degrade", "stop"])
def test_switched_policy_ends_with_the_server(new_site: Sites, configured: str) -> None:
    """A kill and a restart: the configuration's policy is in force again."""
    site = new_site(policy=configured)
    other = "stop" if configured == "degrade" else "degrade"
    site.bring_up()
    load = site.load()
    load.wait_for(30)
    switch(site, other)
    site.dr.kill()
    site.wait_state("out_of_sync")
    fenced = in_force(other, fenced=other == "stop")
    assert switch(site) == fenced
    site.kill()
    load.join()
    site.assert_covered()
    site.serve()
    assert switch(site) == in_force(configured, fenced=configured == "stop")
    handle = site.client()
    if configured == "stop":
        assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    else:
        handle.pwrite(b"b" * 4096, 31 * MIB)
    handle.shutdown()
    site.dr.start()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_fenced_reads_fail_as_configured(new_site: Sites, door: str) -> None:
    """With fenced_reads = "fail" a fence is one for reads too; the switch is live."""
    site = new_site(policy="stop", fenced_reads="fail")
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    assert b"a" * 4096 == handle.pread(4096, 0)
    site.dr.kill()
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    assert "reads and writes get EIO" in site.status()["reason"]
    assert switch(site, reads="serve") == in_force("stop", fenced=True)
    assert b"a" * 4096 == handle.pread(4096, 0)
    assert switch(site, reads="fail") == in_force("stop", "fail", fenced=True)
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    site.dr.start()
    site.wait_in_sync()
    assert b"a" * 4096 == handle.pread(4096, 0)
    handle.shutdown()


def test_policy_command_shows_switches_and_says_what_lasts(new_site: Sites) -> None:
    """The command shows and switches, and says where the configuration differs."""
    site = new_site(size=4 * MIB)
    site.bring_up()
    config = str(site.config)
    assert (
        site.cli("policy", config).stdout == "policy degrade, fenced reads are served\n"
    )
    site.dr.kill()
    site.wait_state("out_of_sync")
    said = site.cli("policy", config, "stop", "--fenced-reads", "fail").stdout
    assert "policy stop, fenced reads get EIO\n" in said
    assert "fenced: a remote is out of sync" in said
    assert 'the configuration has policy = "degrade"\n' in said
    assert 'the configuration has fenced_reads = "serve"\n' in said
    shown = site.cli("status", config).stdout
    assert "policy stop, fenced reads fail" in shown
    site.keys.update(policy="stop", fenced_reads="fail")
    site.write_config()
    assert "the configuration has" not in site.cli("policy", config).stdout
    assert "policy degrade" in site.cli("policy", config, "degrade").stdout
    with pytest.raises(ConfigError, match="degrade, stop"):
        switch(site, "sideways")
    assert site.status()["policy"] == "degrade"
    site.stop()
    site.refused(10, "no server", commands=["policy", config])
