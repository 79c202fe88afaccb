# SPDX-License-Identifier: BSD-3-Clause
"""
Bad input: one clear message with cause and next step, its exit code, nothing lost.

`Site.refused` checks the form of every message: nothing but our own lines, no
traceback, no words of nbdkit's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.clients import dirty_set
from e2e.lib.harness import MIB, Site, free_port
from e2e.lib.servers import Secondary

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]

LOGS = ("activity", "inflight", "dirty.dr")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("region_size", "5KiB", ["region_size", "5KiB", "power of two"]),
        ("policy", "hope", ["policy", "hope", "degrade", "stop"]),
        ("hold", "2 fortnights", ["hold", "2 fortnights"]),
        ("listen", "ftp:21", ["listen", "ftp:21", "unix:"]),
        ("size", "0", ["size", "0"]),
        ("reigon_size", "64KiB", ["reigon_size", "unknown key", "region_size"]),
    ],
)
def test_config_wrong_value_is_named(
    site: Site, key: str, value: str, words: list[str]
) -> None:
    """A wrong value is named with its key and with what is allowed."""
    site.keys[key] = value
    site.write_config()
    site.refused(3, *words, commands=["create", str(site.config)])
    assert not site.state.exists()


def test_config_not_toml_is_said(site: Site) -> None:
    """A file that is no TOML gets the line where it breaks."""
    site.config.write_text('name = "v\n')
    site.refused(3, "v.toml", "line 1", commands=["serve", str(site.config)])


def test_config_missing_is_said(site: Site) -> None:
    """A configuration that is not there is said to be missing."""
    site.config.unlink()
    site.refused(4, "v.toml", commands=["status", str(site.config)])


def test_config_wrong_remote_is_named(site: Site) -> None:
    """A remote's wrong uri is named with the remote."""
    site.dr.uri = "http://example.net/disk"
    site.write_config()
    site.refused(3, 'remote "dr"', "uri", commands=["create", str(site.config)])


def test_config_by_name_is_found(site: Site) -> None:
    """A volume is found by its name under NBD_MIRROR_CONFIG_DIR."""
    site.create()
    done = site.processes.run(
        [*site.command(), "status", "v"],
        env={**site.environment(), "NBD_MIRROR_CONFIG_DIR": str(site.folder)},
    )
    assert "serve v" in done.stdout
    site.refused(4, "nobody", commands=["status", "nobody"])


@pytest.mark.parametrize("what", ["create", "serve"])
def test_local_missing_is_said(site: Site, what: str) -> None:
    """A local image that is not there is said; no state is left half made."""
    if what == "serve":
        site.create()
    site.local.unlink()
    commands = [what, str(site.config)]
    site.refused(4, str(site.local), commands=commands)
    assert site.state.exists() == (what == "serve")


def test_local_is_folder_is_said(site: Site) -> None:
    """A folder is no local disk."""
    site.local.unlink()
    site.local.mkdir()
    site.refused(3, str(site.local), "folder", commands=["create", str(site.config)])


def test_serve_not_created_is_said(site: Site, door: str) -> None:
    """Serving what was never created says which command creates it."""
    commands = ["serve", str(site.config), "--door", door]
    said = site.refused(4, "not created", commands=commands)
    assert f"try: nbd-mirror create {site.config}" in said


def test_configuration_in_a_folder_that_is_no_utf_8(site: Site, door: str) -> None:
    """It is served, but by nbdkit's Python plugin, which takes text alone."""
    folder = site.folder / "\udcff\udce4"
    folder.mkdir()
    config = str(site.config.rename(folder / "v.toml"))
    site.cli("create", config)
    commands = ["serve", config, "--door", door]
    if door == "python":
        said = site.refused(14, "is not UTF-8", commands=commands)
        assert "try: nbd-mirror serve " in said
        assert "--door direct" in said
        return
    site.cli(*commands)
    site.cli("stop", config)


def test_state_of_another_volume_is_refused(site: Site, door: str) -> None:
    """The state of a volume of another name is not used."""
    site.create()
    site.keys["name"] = "other"
    site.write_config()
    commands = ["serve", str(site.config), "--door", door]
    site.refused(7, "volume v", "not of other", commands=commands)


@pytest.mark.parametrize(
    ("key", "value"), [("size", "16MiB"), ("region_size", "128KiB")]
)
def test_changed_geometry_is_refused(site: Site, key: str, value: str) -> None:
    """A size or region size other than the volume's is refused, with both."""
    site.create()
    site.keys[key] = value
    site.write_config()
    site.refused(3, key, commands=["serve", str(site.config)])


def test_local_shrunk_is_refused(site: Site) -> None:
    """A local image that has become too small is refused, with both sizes."""
    site.create()
    with site.local.open("r+b") as file:
        file.truncate(site.size // 2)
    done = site.cli("serve", str(site.config), check=False)
    assert done.returncode not in (0, 1)
    assert str(site.size) in done.stderr
    assert str(site.size // 2) in done.stderr


def test_second_serve_is_refused(site: Site, door: str) -> None:
    """A second server on one volume is impossible, and the first goes on."""
    site.bring_up(door)
    site.refused(
        5, str(site.pid), "stop", commands=["serve", str(site.config), "--door", door]
    )
    assert site.remote()["state"] == "in_sync"


def test_second_serve_control_gone_is_refused_by_lock(site: Site) -> None:
    """Without the control socket it is the lock that keeps the second server out."""
    site.bring_up()
    (site.state / "control").unlink()
    with socket.socket(socket.AF_UNIX) as dead:  # or the server makes its own anew
        dead.bind(str(site.state / "control"))
    site.keys["listen"] = f"unix:{site.folder}/second.sock"
    site.write_config()
    site.refused(5, "in use", str(site.pid), commands=["serve", str(site.config)])
    handle = site.client()
    handle.pwrite(b"x" * 512, 0)
    handle.shutdown()


def test_second_volume_on_one_local_is_refused(site: Site, door: str) -> None:
    """A second volume over the same local image is refused."""
    site.bring_up(door)
    site.keys |= {
        "name": "w",
        "state": str(site.folder / "state2"),
        "listen": f"unix:{site.folder}/w.sock",
    }
    site.config = site.folder / "w.toml"
    site.write_config()
    site.cli("create", str(site.config), check=False)
    done = site.cli("serve", str(site.config), "--door", door, check=False)
    assert done.returncode in (4, 5)
    assert site.answers()


def test_local_held_by_qemu_is_refused(
    site: Site, processes: support.Processes
) -> None:
    """An image that qemu-nbd has open is busy."""
    site.create()
    other = Secondary(processes, site.folder, "local", "qemu-nbd")
    assert other.image == site.local
    other.start()
    # qemu takes its lock when a client opens the image at the latest.
    site.refused(5, str(site.local), "in use", commands=["serve", str(site.config)])
    other.kill()
    site.serve()


# --- logs that cannot be believed -------------------------------------------


def truncate_log(path: Path) -> None:
    """Cut the file in half."""
    os.truncate(path, path.stat().st_size // 2)


def garble_header(path: Path) -> None:
    """Turn bits of the header over."""
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"garbled")


def empty_log(path: Path) -> None:
    """Leave a file without a byte."""
    os.truncate(path, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate_log,
    "garbled": garble_header,
    "empty": empty_log,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("log", LOGS)
def test_log_damaged_means_all_dirty(new_site: Sites, log: str, damage: str) -> None:
    """A log that is lost or garbled means all dirty: said, kept aside, copied."""
    site = new_site(size=8 * MIB)
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    site.dr.kill()
    path = site.state / log
    DAMAGES[damage](path)
    damaged = path.read_bytes() if path.exists() else None
    check_all_dirty(site, log, damaged)


@pytest.mark.parametrize("log", LOGS)
def test_log_old_copy_put_back_means_all_dirty(new_site: Sites, log: str) -> None:
    """An old copy of a log is believed no more than a garbled one."""
    site = new_site(size=8 * MIB)
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    path = site.state / log
    old = path.with_name("backup")
    shutil.copy2(path, old)
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    handle.pwrite(b"n" * MIB, 0)
    handle.shutdown()
    site.stop()
    site.dr.kill()
    old.replace(path)
    check_all_dirty(site, log, path.read_bytes())


def test_log_of_running_server_put_back_means_all_dirty(new_site: Sites) -> None:
    """A map copied from under a running server is not taken for the clean one."""
    site = new_site(size=8 * MIB)
    site.fill(site.local, site.size)
    site.bring_up()
    copy = shutil.copy2(site.map_path(), site.state / "copy")
    site.stop()
    site.dr.kill()
    Path(copy).replace(site.map_path())
    check_all_dirty(site, "dirty.dr", None)


def check_all_dirty(site: Site, log: str, damaged: bytes | None) -> None:
    """Serve: it starts, says why all is dirty, keeps the file, and copies it all."""
    site.serve()
    status = site.status()
    said = f"{status['reason']} {status['remotes'][0]['reason']} {site.log}"
    assert log in said
    assert "everything is copied again" in said
    assert dirty_set(site.map_path()) == set(range(site.size // site.region_size))
    assert site.remote()["dirty_bytes"] == site.size
    if damaged is not None:
        assert damaged == (site.state / f"{log}~bad").read_bytes()
    site.dr.start()
    site.wait_in_sync()
    assert site.copied(1) == [site.size]
    site.stop()
    site.assert_equal()
    # Once is enough: the next start believes its logs again.
    site.serve()
    site.wait_in_sync()
    assert "resync_start" not in site.log


# --- sockets, space ----------------------------------------------------------


def test_listen_unix_in_use_is_refused(site: Site, door: str) -> None:
    """A socket on which another server answers is left alone."""
    site.create()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(site.socket))
        other.listen()
        site.refused(
            5,
            "in use",
            str(site.socket),
            commands=["serve", str(site.config), "--door", door],
        )
        assert site.socket.is_socket()


def test_listen_unix_stale_is_replaced(site: Site) -> None:
    """The socket file a killed server left is no obstacle."""
    site.bring_up()
    site.kill()
    assert site.socket.is_socket()
    site.serve()
    site.client().shutdown()


def test_listen_unix_file_is_refused(site: Site) -> None:
    """A file in the socket's place is not removed."""
    site.create()
    site.socket.write_text("precious")
    site.refused(5, str(site.socket), commands=["serve", str(site.config)])
    assert site.socket.read_text() == "precious"


def test_listen_tcp_in_use_is_refused(new_site: Sites, door: str) -> None:
    """A TCP port in use is said."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}")
    site.create()
    with socket.create_server(("127.0.0.1", port)):
        site.refused(
            5,
            "in use",
            str(port),
            commands=["serve", str(site.config), "--door", door],
        )


def test_create_disk_full_leaves_nothing_half_made(
    new_site: Sites, processes: support.Processes
) -> None:
    """Without room for the logs create says so, and leaves no volume behind."""
    support.requires(os.geteuid() == 0, "only root may mount a tmpfs")
    site = new_site(size=16 << 30, region_size="4KiB")
    small = site.folder / "small"
    small.mkdir()
    processes.run(["mount", "-t", "tmpfs", "-o", "size=256k", "nbdm-test", small])
    processes.on_exit(lambda: processes.run(["umount", "-l", small]))
    site.keys["state"] = str(small / "state")
    site.state = small / "state"
    site.write_config()
    said = site.refused(8, "no room", commands=["create", str(site.config)])
    assert "dirty.local" in said
    assert "try: make room" in said
    assert not (site.state / "superblock").exists()
    # With room it works, with no --force.
    processes.run(["mount", "-o", "remount,size=16m", small])
    site.cli("create", str(site.config))
    site.serve()
    site.stop()
    # A create that replaces a volume has given it up by then, and says so.
    used = sum(file.stat().st_blocks for file in site.state.iterdir()) * 512
    processes.run(["mount", "-o", f"remount,size={used + 16384}", small])
    commands = ["create", str(site.config), "--force"]
    said = site.refused(8, "no room", "given up already", commands=commands)
    assert "the local disk was not touched" in said
    site.refused(4, "no state", commands=["status", str(site.config)])
    processes.run(["mount", "-o", "remount,size=16m", small])
    site.cli("create", str(site.config))


def test_serve_disk_full_is_said(site: Site, processes: support.Processes) -> None:
    """A start that finds no room to make a log anew says so; nothing is lost."""
    support.requires(os.geteuid() == 0, "only root may mount a tmpfs")
    small = site.folder / "small"
    small.mkdir()
    processes.run(["mount", "-t", "tmpfs", "-o", "size=1m", "nbdm-test", small])
    processes.on_exit(lambda: processes.run(["umount", "-l", small]))
    site.keys["state"] = str(small / "state")
    site.state = small / "state"
    site.write_config()
    site.create()
    before = (site.state / "superblock").read_bytes()
    (site.state / "inflight").unlink()
    with (small / "filler").open("wb") as file:
        free = os.statvfs(small)
        file.write(bytes(free.f_bavail * free.f_bsize))
    site.refused(8, "space", "make room", commands=["serve", str(site.config)])
    assert before == (site.state / "superblock").read_bytes()
    (small / "filler").unlink()
    site.dr.start()
    site.serve()
    site.wait_in_sync()


def test_state_on_a_file_system_that_allocates_nothing(
    site: Site, processes: support.Processes
) -> None:
    """A volume is made and served where fallocate is not known, as on some NFS."""
    support.requires(os.geteuid() == 0, "only root may mount a ramfs")
    folder = site.folder / "ramfs"
    folder.mkdir()
    processes.run(["mount", "-t", "ramfs", "nbdm-test", folder])
    processes.on_exit(lambda: processes.run(["umount", "-l", folder]))
    site.keys["state"] = str(folder / "state")
    site.state = folder / "state"
    site.write_config()
    site.create()
    for _ in range(2):
        site.cli("serve", str(site.config))
        site.cli("stop", str(site.config))
    said = (site.state / "serve.log").read_text()
    assert said.count("stopped cleanly") == 2


def test_state_not_writable_is_said(site: Site) -> None:
    """A state directory in a place that is no folder is said."""
    site.keys["state"] = str(site.local / "state")
    site.write_config()
    done = site.cli("create", str(site.config), check=False)
    assert done.returncode not in (0, 1)
    assert str(site.local) in done.stderr


def test_lock_is_of_the_process_and_not_a_file(site: Site) -> None:
    """A lock file left by a killed server does not keep the next one out."""
    site.bring_up()
    site.kill()
    assert (site.state / "lock").exists()
    with (site.state / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    site.serve()
    site.wait_in_sync()
