# SPDX-License-Identifier: BSD-3-Clause
"""
The state directory is removed under a running server.

The server alone still knows which disk has which data, so every command says how to
keep them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable

import pytest
from e2e.lib.disks import small_disk, wait_local
from e2e.lib.harness import MIB, Site, free_port


@pytest.fixture(params=["unix", "tcp"])
def listening(new_site: Callable[..., Site], request: pytest.FixtureRequest) -> Site:
    """Give a site that listens there."""
    return new_site(
        **{"listen": f"tcp:127.0.0.1:{free_port()}"} if request.param == "tcp" else {}
    )


def test_no_command_makes_a_new_state_beside_the_server(listening: Site) -> None:
    """`create` is refused too, with --force as well, until the server has ended."""
    site = listening
    site.bring_up()
    shutil.rmtree(site.state)
    file = str(site.config)
    words = f"process {site.pid} listens", f"kill -TERM {site.pid}", "nbdcopy"
    for code, command in ((4, ["status"]), (4, ["serve"]), (5, ["create"])):
        site.refused(code, *words, commands=[*command, file])
    site.refused(5, *words, commands=["create", file, "--force"])
    assert not site.state.exists()
    os.kill(site.pid, signal.SIGTERM)
    site.ended()
    site.cli("create", file)


def test_state_that_was_replaced_is_not_taken_for_that_of_a_stopped_volume(
    listening: Site,
) -> None:
    """A copy in its place knows nothing of the server: none is said to be stopped."""
    site = listening
    site.bring_up()
    file, kept = str(site.config), site.folder / "kept"
    site.state.rename(kept)
    shutil.copytree(kept, site.state, ignore=shutil.ignore_patterns("control"))
    words = f"process {site.pid} listens", "put back the directory", "--force"
    shown = site.cli("status", file).stdout
    assert "no_answer" in shown
    assert "no server runs" not in shown
    assert all(word in shown for word in words)
    for command in ("stop", "pause"):
        site.refused(10, *words, commands=[command, file])
    shutil.rmtree(site.state)
    for command in ("stop", "pause"):
        site.refused(10, *words, commands=[command, file])
    kept.rename(site.state)
    assert "in_sync" in site.cli("status", file).stdout
    site.stop()
    assert "no server runs" in site.cli("status", file).stdout


@pytest.mark.slow
def test_data_that_only_a_remote_has_are_kept(site: Site) -> None:
    """The local disk had failed: the steps of the hint give a volume with all data."""
    small_disk(site, 2)
    site.bring_up()
    handle = site.client()
    content = os.urandom(4 * MIB)
    handle.pwrite(content, 4 * MIB)
    handle.flush()
    wait_local(site, "failed")
    handle.shutdown()
    shutil.rmtree(site.state)
    said = site.refused(4, commands=["status", str(site.config)])
    found = re.search(r"\((nbdcopy .*) NEW\)", said)
    assert found is not None, said
    new = site.folder / "new.img"
    with new.open("wb") as file:
        file.truncate(site.size)
    site.processes.run(["/bin/bash", "-c", f"{found[1]} {new}"])
    os.kill(site.pid, signal.SIGTERM)
    site.ended()
    site.local, site.keys["local"] = new, str(new)
    site.write_config()
    site.cli("create", str(site.config))
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    assert handle.pread(len(content), 4 * MIB) == content
    handle.shutdown()
    site.stop()
    site.assert_equal()
