# SPDX-License-Identifier: BSD-3-Clause
"""
What other users of the host can plant, hold or put in the way.

A folder that root stands in, a state directory that is another user's, a folder that
any user can read and lock.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import typer.main
from e2e.lib.harness import Site, free_port
from e2e.lib.oracle import crc32c

from nbd_mirror.base import strangers, unix
from nbd_mirror.base.programs import clean_environment, find_program
from nbd_mirror.commands import serve
from nbd_mirror.commands.cli import app
from nbd_mirror.device import attached

NOBODY = 65534
MODULES = ("json", "sitecustomize", "usercustomize", "encodings", "bitarray", "typing")
PROGRAMS = ("nbdkit", "nbd-client", "modprobe", "python3")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0, reason=f"{support.CANNOT_RUN}only root can be another user"
    ),
]


def trap(folder: Path) -> Path:
    """Fill a folder with modules and programs that leave a mark where they run."""
    mark = folder / "was-executed"
    # `encodings` is imported before there is an `open`.
    code = (
        "import posix\n"
        f"fd = posix.open({str(mark)!r}, posix.O_WRONLY | posix.O_CREAT, 0o600)\n"
        "posix.write(fd, b'a module was imported from here')\n"
        "posix.close(fd)\n"
    )
    package = folder / "nbd_mirror"
    for where in (package, package / "server", package / "commands"):
        where.mkdir(parents=True)
        (where / "__init__.py").write_text(code)
    for name in ("__main__", "server/direct", "commands/cli"):
        (package / f"{name}.py").write_text(code)
    for name in MODULES:
        (folder / f"{name}.py").write_text(code)
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho $0 >>{mark}\n")
        (folder / name).chmod(0o755)
    return mark


def run_in(
    folder: Path, site: Site, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """
    Run a command in *folder*, with the current folder on PATH in three spellings.

    So it is on PYTHONPATH, which the command's own Python is told to pass over: that
    one is its caller's, and what it starts is ours.
    """
    path = f":{os.environ['PATH']}:.:"
    python = [sys.executable, "-I"]
    command = [word for word in site.command() if word != sys.executable]
    hostile = {"PATH": path, "PYTHONPATH": f":{support.ROOT}:.", "COLUMNS": "100"}
    return subprocess.run(
        [*python, *command, *words],
        cwd=folder,
        env={**os.environ, **hostile, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_current_folder_is_never_imported_from(site: Site) -> None:
    """A command that root runs in another user's folder executes nothing of it."""
    folder = site.folder / "hostile"
    mark = trap(folder)
    site.dr.start()
    file = str(site.config)
    options = {"wait": ["--for", "in_sync"], "watch": ["--until", "in_sync"]}
    options |= {"invalidate": ["dr"]}
    group: Any = typer.main.get_command(app)
    names = list(group.commands)
    assert {"create", "serve", "attach", "stop"} <= set(names)
    names.remove("stop")
    for name in [*names, "stop"]:
        run_in(folder, site, name, file, *options.get(name, []))
        assert not mark.exists(), (name, mark.read_text())
    done = run_in(folder, site, "serve", file, "--door", "python")
    assert done.returncode == 0, done.stderr
    pid = site.status()["pid"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert run_in(folder, site, "stop", file).returncode == 0
    assert not mark.exists(), mark.read_text()


PLAIN = (sys.executable, "-m")
NONE = ("status", "/nonexistent.toml")


@pytest.mark.parametrize(
    ("command", "path", "clean", "sprung"),
    [
        ((*PLAIN, "nbd_mirror", *NONE), "/", False, True),
        ((*serve.PYTHON, "nbd_mirror", *NONE), "/", False, False),
        ((*PLAIN, "nbd_mirror", *NONE), "/", True, False),
        ((*serve.PYTHON, "nbd_mirror", *NONE), ".", False, True),
        ((*serve.PYTHON, "nbd_mirror", *NONE), ".::", True, False),
        (("nbdkit", "python", "--dump-plugin"), ".", False, True),
        (("nbdkit", "python", "--dump-plugin"), ".::", True, False),
    ],
    ids=["bare", "-P", "safe path", "path", "path cleaned", "nbdkit", "nbdkit cleaned"],
)
def test_each_guard_keeps_modules_out_by_itself(
    run_dir: Path, command: tuple[str, ...], path: str, clean: bool, sprung: bool
) -> None:
    """A trap that no guard is before springs; one guard of the several is enough."""
    mark = trap(run_dir / "hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        environment = clean_environment() if clean else dict(os.environ)
    subprocess.run(
        command,
        cwd=mark.parent,
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert sprung == mark.exists()


def test_foreground_server_leaves_the_current_folder(site: Site) -> None:
    """The server imports nothing from where it was started, and does not stay there."""
    folder = site.folder / "hostile"
    mark = trap(folder)
    site.create()
    server = subprocess.Popen(
        [*site.command(), "serve", str(site.config), "--foreground"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    site.processes.on_exit(lambda: support.end(server))
    support.wait_until(site.answers, "the server to answer")
    assert Path(f"/proc/{server.pid}/cwd").readlink() == Path("/")
    assert not mark.exists(), mark.read_text()


def test_environment_of_the_server_names_no_current_folder(site: Site) -> None:
    """Empty and relative parts of the search paths are the current folder: dropped."""
    site.create()
    done = run_in(
        Path("/"),
        site,
        "serve",
        str(site.config),
        LD_LIBRARY_PATH="/nonexistent::",
        PYTHONPATH=f"{support.ROOT}::lib",
    )
    assert done.returncode == 0, done.stderr
    pid = site.status()["pid"]
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = dict(one.split(b"=", 1) for one in environ if b"=" in one)
    for name in (b"PATH", b"LD_LIBRARY_PATH", b"PYTHONPATH"):
        assert all(part.startswith(b"/") for part in found[name].split(b":")), name
    assert run_in(Path("/"), site, "stop", str(site.config)).returncode == 0


def test_programs_are_not_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an empty PATH nor one with relative parts leads to it."""
    trap(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "::", f".:{os.environ['PATH']}"):
        monkeypatch.setenv("PATH", path)
        assert find_program("nbdkit", "nbdkit").startswith("/")
        assert not find_program("nbdkit", "nbdkit").startswith(str(tmp_path))
        assert "." not in clean_environment().get("PATH", "").split(":")
    monkeypatch.delenv("PATH")
    assert find_program("nbdkit", "nbdkit").startswith("/")


# --- a state directory of another user ---


@pytest.fixture
def foreign(site: Site) -> tuple[Site, Path]:
    """Give a volume whose directory is another user's, with links to a file of root."""
    victim = site.folder / "victim"
    victim.write_text("precious")
    site.create()
    os.chown(site.state, NOBODY, NOBODY)
    for name in ("lock", "attached", "serve.log", "activity~bad", "failed"):
        (site.state / name).unlink(missing_ok=True)
        (site.state / name).symlink_to(victim)
    return site, victim


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["serve", "--door python", "--foreground", "--force"],
        ["create"],
        ["create", "--assume-in-sync dr", "--force"],
    ],
)
def test_state_of_another_user_is_refused(
    foreign: tuple[Site, Path], words: list[str]
) -> None:
    """Root neither serves nor makes a volume there; no link is written through."""
    site, victim = foreign
    name, *options = words
    commands = [name, str(site.config), *" ".join(options).split()]
    said = site.refused(15, "belongs to user", "nobody", commands=commands)
    assert f"sudo -u nobody nbd-mirror {' '.join(commands)}\n" in said
    assert victim.read_text() == "precious"


def test_state_of_another_user_is_looked_at(foreign: tuple[Site, Path]) -> None:
    """Root's `status` of another user's volume works, and waits for no FIFO."""
    site, _ = foreign
    assert "stopped" in site.cli("status", str(site.config)).stdout
    for name in ("superblock", "dirty.dr"):
        (site.state / name).unlink()
        os.mkfifo(site.state / name)
        for command in ("status", "inspect"):
            done = site.cli(command, str(site.config), check=False, timeout_s=10)
            assert done.returncode in (0, 4, 7, 13, 15), done.stderr


REMOTE = 512  # where the first remote's entry begins in the superblock
LIES = {
    "no size": (104, struct.pack("<Q", 0)),
    "any size": (104, struct.pack("<Q", (1 << 64) - 1)),
    "no region size": (112, struct.pack("<I", 0)),
    "local state": (248, struct.pack("<I", 99)),
    "no local state": (248, struct.pack("<I", 0)),
    "remotes": (252, struct.pack("<I", 99)),
    "remote's name": (REMOTE, b"a/../../outside\0"),
    "remote's state": (REMOTE + 64, struct.pack("<I", 99)),
    "remote's time": (REMOTE + 80, struct.pack("<q", 1 << 62)),
    "remote's reason": (REMOTE + 88, b"\xff\x1b]0;title\x07"),
}


@pytest.mark.parametrize("lie", LIES)
def test_superblock_of_another_user_may_lie(site: Site, lie: str) -> None:
    """What no engine writes is no bug of a command, and leads to no other file."""
    site.create()
    outside = site.folder / "outside"
    outside.write_bytes(site.map_path().read_bytes())
    (site.state / "dirty.a").mkdir()
    at, value = LIES[lie]
    path = site.state / "superblock"
    slots = bytearray(path.read_bytes())
    for slot in (0, 4096):
        page = slots[slot : slot + 4096]
        page[at : at + len(value)] = value
        page[12:16] = bytes(4)
        page[12:16] = struct.pack("<I", crc32c(bytes(page)))
        slots[slot : slot + 4096] = page
    path.write_bytes(slots)
    os.chown(site.state, NOBODY, NOBODY)
    for words in (["status"], ["status", "--json"], ["inspect"]):
        done = site.cli(words[0], str(site.config), *words[1:], check=False)
        assert done.returncode in (0, 7), done.stderr
        assert "\x1b]" not in done.stdout + done.stderr
    if lie == "remote's name":
        assert "garbled" in site.refused(7, commands=["status", str(site.config)])


def test_state_that_others_may_write_is_refused(site: Site) -> None:
    """A directory open to others is no place for logs, and it says what to do."""
    site.create()
    site.state.chmod(0o777)
    said = site.refused(15, "other users", commands=["serve", str(site.config)])
    assert f"chmod go-w {site.state}" in said
    site.state.chmod(0o755)
    site.serve()


def test_state_links_are_not_followed(site: Site) -> None:
    """In a directory of our own, which once was another's, links stay what they are."""
    victim = site.folder / "victim"
    victim.write_text("precious")
    site.create()
    (site.state / "serve.log").symlink_to(victim)
    site.cli("serve", str(site.config))
    assert not (site.state / "serve.log").is_symlink()
    site.cli("stop", str(site.config))
    (site.state / "lock").unlink()
    (site.state / "lock").symlink_to(victim)
    done = site.cli("serve", str(site.config), check=False)
    assert done.returncode not in (0, 1)
    (site.state / "lock").unlink()
    os.link(victim, site.state / "lock")
    site.refused(15, "lock", commands=["serve", str(site.config)])
    assert victim.read_text() == "precious"


def test_attached_is_a_new_file_and_roots_word(foreign: tuple[Site, Path]) -> None:
    """`attach` writes through no link; `detach` takes no device from another user."""
    site, victim = foreign
    what = attached.Attached(4096, device="nbd0")
    assert attached.load(site.state) == attached.Attached()
    attached.save(site.state, what)
    assert victim.read_text() == "precious"
    noted = site.state / "attached"
    assert stat.S_ISREG(noted.lstat().st_mode)
    assert attached.load(site.state) == what
    os.chown(noted, NOBODY, NOBODY)
    assert attached.load(site.state) == attached.Attached()
    noted.unlink()
    os.mkfifo(noted)
    assert attached.load(site.state) == attached.Attached()


# --- what this user may not look at ---


def as_nobody(
    site: Site, folder: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without rights, who stands in *folder*."""
    return subprocess.run(
        [*site.command(), *words],
        cwd=folder,
        env=os.environ | site.environment(),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def hidden(site: Site) -> tuple[Site, Path]:
    """Give a volume of which another user may read the configuration alone."""
    for folder in (site.folder, *site.folder.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    site.create()
    folder = site.folder / "hidden"
    folder.mkdir(mode=0o700)
    (folder / "v.toml").write_bytes(site.config.read_bytes())
    site.state.rename(folder / "state")
    site.keys["state"] = str(folder / "state")
    site.write_config()
    site.config.chmod(0o644)
    return site, folder


@pytest.mark.parametrize("hides", ["state", "state of a lost disk", "local"])
def test_what_a_user_may_not_look_at_is_said(
    hidden: tuple[Site, Path], hides: str
) -> None:
    """Each command says so in one line, whether or not the local disk is there."""
    site, folder = hidden
    if hides == "local":
        site.keys["state"] = str(site.folder / "none")
        site.keys["local"] = str(folder / "local.img")
        site.write_config()
        site.config.chmod(0o644)
    elif hides == "state of a lost disk":
        site.local.unlink()
    wait = ["--for", "in_sync", "--timeout", "1s"]
    commands = {"wait": wait, "invalidate": ["dr"], "attach": []}
    for name in ("create", "serve", "status", "stop", "inspect", "detach", *commands):
        words = [name, str(site.config), *commands.get(name, [])]
        done = as_nobody(site, Path("/"), *words)
        assert done.returncode not in (0, 1), (name, done.stderr)
        assert done.stderr.startswith("nbd-mirror: "), done.stderr
        assert "internal error" not in done.stderr


def test_detach_by_the_owner_who_is_not_root_says_so(
    hidden: tuple[Site, Path],
) -> None:
    """What root noted is hidden from the owner, to whom nothing seems attached."""
    site, folder = hidden
    attached.save(folder / "state", attached.Attached(4096, device="nbd0"))
    for path in (folder, folder / "state"):
        os.chown(path, NOBODY, NOBODY)
    for asked in (str(site.config), "/dev/nbd0"):
        done = as_nobody(site, Path("/"), "detach", asked)
        assert done.returncode == 15, done.stderr
        assert "only root may detach" in done.stderr
        assert f"try: sudo nbd-mirror detach {asked}\n" in done.stderr


def test_name_in_a_folder_that_a_user_may_not_look_at(
    hidden: tuple[Site, Path],
) -> None:
    """The hint would name a file there, if it could see one."""
    site, folder = hidden
    done = as_nobody(site, folder, "status", "v")
    assert done.returncode == 4, done.stderr
    assert "there is no configuration" in done.stderr


# --- open files that a client sends ---


def test_files_of_a_client_are_refused_by_each_door(site: Site, door: str) -> None:
    """Where the kernel can, from the connect on: nbdkit closes files itself."""
    probe = unix.unix_socket()
    can = False
    with probe, contextlib.suppress(OSError):
        can = probe.getsockopt(socket.SOL_SOCKET, strangers.SO_PASSRIGHTS) == 0
    support.requires(can, "the kernel has no SO_PASSRIGHTS")
    site.bring_up(door)
    rights = array.array("i", [0])
    for path in (site.socket, site.state / "control"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            with pytest.raises(PermissionError):
                client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    handle = site.client()
    handle.pwrite(bytes(512), 0)
    handle.shutdown()


# --- locks that any user can take ---


def test_folder_locked_by_another_user_does_not_keep_us(
    site: Site, processes: support.Processes
) -> None:
    """A user that may only read the socket's folder keeps neither start nor stop."""
    for folder in (site.folder, *site.folder.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    site.create()
    script = (
        "import fcntl, os, sys, time\n"
        f"fd = os.open({str(site.folder)!r}, os.O_RDONLY)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\nprint('locked', flush=True)\ntime.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-I", "-c", script],
        stdout=subprocess.PIPE,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert holder.stdout is not None
    processes.on_exit(lambda: support.end(holder))
    assert holder.stdout.readline() == b"locked\n"
    site.cli("serve", str(site.config), timeout_s=15)
    site.cli("stop", str(site.config), timeout_s=15)
    assert holder.poll() is None


LISTENER = """
import ctypes, pathlib, socket, sys, tempfile
ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: now root owns its folder in /proc
lock = (pathlib.Path(tempfile.mkdtemp(prefix="nbdm-")) / "lock").open("w")
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
pathlib.Path(lock.name).unlink()
pathlib.Path(lock.name).parent.rmdir()
print("listens", flush=True)
sys.stdin.read()
"""


def test_listener_of_another_user_is_not_taken_for_the_server(
    new_site: Callable[..., Site],
) -> None:
    """While no server runs, any user can have the port, and a file `lock` open."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}")
    site.create()
    words = [sys.executable, "-c", LISTENER, str(port)]
    with subprocess.Popen(
        words, user=NOBODY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
    ) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == b"listens\n"
        shown = site.cli("status", str(site.config)).stdout
        listener.communicate()
    assert "no server runs for this volume" in shown
    assert str(listener.pid) not in shown
