# SPDX-License-Identifier: BSD-3-Clause
"""
The server's process when the host gives it nothing, and when no command can reach it.

Limits are set on the running server, so that what runs out is what the kernel gives.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import support
from e2e.conftest import DOORS
from e2e.lib.harness import Site

from nbd_mirror.base.errors import MetadataFailedError
from nbd_mirror.commands import serve_log, stop
from nbd_mirror.volume import control
from nbd_mirror.volume.client import ask
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.offline import stopped_status


@contextmanager
def limited(pid: int, what: int, limit: int) -> Iterator[None]:
    """Give the process no more than *limit* of a resource, for a while."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (limit, before[1]))
    try:
        yield
    finally:
        if support.is_running(pid):
            resource.prlimit(pid, what, before)


def mapped(pid: int) -> int:
    """Return the bytes that the process has mapped."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096


def test_without_descriptors_commands_are_answered(site: Site, door: str) -> None:
    """With no descriptor left it answers, does not spin, and stops cleanly."""
    site.bring_up(door)
    used = {int(path.name) for path in Path(f"/proc/{site.pid}/fd").iterdir()}
    free = min(set(range(len(used) + 1)) - used)
    with limited(site.pid, resource.RLIMIT_NOFILE, free):
        for _ in range(3):
            assert site.status()["state"] == "in_sync"
        # The time is what is tested: a server that spins uses all of a second.
        before, begin = support.cpu_s(site.pid), time.monotonic()
        while time.monotonic() - begin < 1:
            site.status()
            time.sleep(0.1)  # as `watch` does: the questions use little of the second
        assert support.cpu_s(site.pid) - before < 0.5
        site.stop()
    site.assert_equal()


def test_without_threads_commands_are_answered_and_it_stops(site: Site) -> None:
    """With no memory for a thread's stack `status` is answered, and `stop` stops."""
    site.bring_up()
    with limited(site.pid, resource.RLIMIT_AS, mapped(site.pid)):
        for _ in range(3):
            assert site.status()["state"] == "in_sync"
        site.stop()
    site.assert_equal()


def test_without_threads_a_signal_ends_it(site: Site) -> None:
    """SIGTERM ends it too, and once memory is back everything works again before."""
    site.bring_up()
    with limited(site.pid, resource.RLIMIT_AS, mapped(site.pid)):
        site.dr.kill()
        site.wait_state("out_of_sync")
        site.dr.start()
    site.tell("resume")
    site.wait_in_sync()
    with limited(site.pid, resource.RLIMIT_AS, mapped(site.pid)):
        os.kill(site.pid, signal.SIGTERM)
        assert site.ended() == 0
    site.assert_equal()


def test_stop_that_does_not_finish_ends_all_the_same() -> None:
    """The process says what it waited for, and ends with the code of a failed stop."""
    script = (
        "import time\nfrom nbd_mirror.server.process import End\n"
        "end = End('v', 0.2, 5.0)\nend.start()\nend.doing = 'it dreams'\n"
        "end.begin()\ntime.sleep(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTHONPATH": str(support.ROOT)},
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 12
    assert "not stopped within 0.2s, while it dreams" in done.stderr


def test_server_that_gives_no_status_is_stopped(
    site: Site, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a disk in a command's middle; the stop is sent all the same."""
    go_on = run_dir / "go"
    site.bring_up(fault=f"invalidate_marked=wait:{go_on}")
    waiting = threading.Thread(target=site.tell, args=("invalidate",))
    waiting.start()

    def ask_and_go_on(config: VolumeConfig, command: str, timeout_s: float) -> object:
        go_on.touch()
        return ask(config, command, timeout_s)

    monkeypatch.setattr(stop, "ask", ask_and_go_on)
    try:
        support.wait_until(Path(f"{go_on}.reached").exists, "the command's middle")
        stop.stop(load(site.config))
    finally:
        go_on.touch()
        waiting.join(20)
    assert site.ended() == 0
    assert stopped_status(load(site.config)).clean_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_that_a_signal_ends_before_the_stop_comes(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Its silence does not show whether it ended cleanly: the superblock does."""
    site.bring_up()

    def ask_too_late(config: VolumeConfig, command: str, timeout_s: float) -> object:
        os.kill(site.pid, number)
        site.ended()
        return ask(config, command, timeout_s)

    monkeypatch.setattr(stop, "ask", ask_too_late)
    if number == signal.SIGTERM:
        stop.stop(load(site.config))
    else:
        with pytest.raises(MetadataFailedError, match="without a clean stop"):
            stop.stop(load(site.config))


def test_control_socket_that_was_removed_comes_back(site: Site) -> None:
    """A clean-up of old files takes the socket's name; the server binds it anew."""
    site.bring_up()
    (site.state / "control").unlink()
    support.wait_until(site.answers, "the control socket to be back")
    site.stop()


def test_server_that_cannot_be_reached_is_said(site: Site) -> None:
    """`status` does not say that no server runs, and the command it names stops it."""
    site.bring_up()
    (site.state / "control").unlink()
    # Something else has the name, so the server does not take it back.
    (site.state / "control").write_text("")
    for command in (["status"], ["pause"], ["stop"]):
        done = site.cli(command[0], str(site.config), check=False)
        said = done.stdout + done.stderr
        assert done.returncode == (0 if command == ["status"] else 10)
        assert f"process {site.pid} holds the volume" in said
        assert "no server runs" not in said
        found = re.search(r"kill -TERM (\d+)", said)
        assert found is not None
        named = int(found[1])
    os.kill(named, signal.SIGTERM)
    assert site.ended() == 0
    assert "no server runs" in site.cli("status", str(site.config)).stdout


def test_remote_that_is_the_volume_itself_is_refused(site: Site) -> None:
    """At create, at serve and at a new uri after `resume`: nothing mirrors itself."""
    file, right = str(site.config), site.config.read_text()
    link = site.folder / "link.sock"
    link.symlink_to(site.socket)
    own = right.replace(str(site.dr.socket), str(link))
    site.config.write_text(own)
    site.refused(3, "own address", commands=["create", file])
    assert not site.state.exists()
    site.config.write_text(right)
    site.bring_up()
    site.config.write_text(own)
    site.dr.kill()
    site.tell("resume")
    found = site.wait_remote(
        lambda one: one["state"] == "out_of_sync", "the hold to be over"
    )
    assert "own address" in found["reason"]
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)  # goes on at once, on local alone
    handle.shutdown()
    control.call(site.state, "stop", 30.0)
    assert site.ended() == 0
    site.refused(3, "own address", commands=["serve", file])
    site.config.write_bytes(b"\xef\xbb\xbf" + right.encode())
    assert "stopped" in site.cli("status", file).stdout
    site.config.write_bytes(right.encode("utf-16"))
    site.refused(3, "UTF-16", "UTF-8", commands=["status", file])


def test_status_of_a_server_that_hangs_is_what_the_logs_say(site: Site) -> None:
    """It holds the volume and answers nothing: the process is named."""
    site.bring_up()
    pid = site.pid
    support.freeze(pid)
    try:
        shown = json.loads(site.cli("status", "--json", str(site.config)).stdout)
        for command in ("serve", "stop"):
            words = f"process {pid} holds the volume", f"kill -TERM {pid}"
            site.refused(11, *words, commands=[command, str(site.config)])
    finally:
        os.kill(pid, signal.SIGCONT)
    assert shown["state"] == "no_answer"
    assert f"process {pid} holds the volume" in shown["reason"]
    support.wait_until(lambda: site.status()["state"] == "in_sync", "it to go on")


@pytest.mark.parametrize("door", DOORS)
def test_remote_that_leads_back_is_refused(site: Site, door: str) -> None:
    """The volume knows itself behind a proxy, whose address is another."""
    support.requires_program("socat")
    site.bring_up(door)
    proxy = site.folder / "proxy.sock"
    site.processes.start(
        ["socat", f"UNIX-LISTEN:{proxy},fork", f"UNIX-CONNECT:{site.socket}"]
    )
    support.wait_listening(proxy, "the proxy to listen")
    text = site.config.read_text()
    site.config.write_text(text.replace(str(site.dr.socket), str(proxy)))
    site.dr.kill()
    site.tell("resume")
    found = site.wait_remote(
        lambda one: one["state"] == "out_of_sync", "the hold to be over"
    )
    assert "leads back to this very volume" in found["reason"]
    site.client().pwrite(b"a" * 4096, 0)
    control.call(site.state, "stop", 30.0)
    assert site.ended() == 0


# --- a start beside a server that runs ---

APPEND = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
print("begun", flush=True)
for number in range(int(sys.argv[2])):
    os.write(fd, b"line %d\\n" % number)
"""


def test_start_keeps_what_another_process_logs(site: Site) -> None:
    """A start that may be beside a server cuts nothing off the log they share."""
    site.create()
    log, count = site.state / "serve.log", 60_000  # not so long that it is put aside
    log.touch()
    command = [sys.executable, "-I", "-c", APPEND, str(log), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        while other.poll() is None:
            with serve_log.open_log(log):
                pass
        assert other.returncode == 0
    assert log.read_text().splitlines() == [f"line {n}" for n in range(count)]


def test_start_leaves_the_log_of_a_server_in_its_place(site: Site) -> None:
    """However long it is: a server whose log has another name never bounds it again."""
    site.create()
    site.cli("serve", str(site.config))
    log = site.state / "serve.log"
    with log.open("a") as file:
        file.write("long\n" * (serve_log.MAX_LOG_BYTES // 4))
    before = log.stat()
    pid = site.status()["pid"]
    (site.state / "control").unlink()
    site.refused(5, commands=["serve", str(site.config)])
    assert before.st_ino == log.stat().st_ino
    assert before.st_size <= log.stat().st_size
    assert not (site.state / "serve.log.1").exists()
    os.kill(pid, signal.SIGTERM)
    support.wait_until(lambda: not support.is_running(pid), "the server to end")
    site.cli("serve", str(site.config))
    assert before.st_ino == (site.state / "serve.log.1").stat().st_ino
    site.cli("stop", str(site.config))


# As `nbd-mirror serve` is, but with less patience.
IMPATIENT = """
from nbd_mirror.commands import cli, serve
serve.START_TIMEOUT_S = 1.0
cli.main()
"""


@pytest.mark.parametrize("door", DOORS)
def test_slow_start_goes_on_when_its_command_gives_up(site: Site, door: str) -> None:
    """
    A start that recovers for long is left by its command, which says that it goes on.

    nbdkit, by itself, would end with that command.
    """
    site.create()
    gate = site.folder / "gate"
    words = ["serve", str(site.config), "--door", door]
    done = site.processes.run(
        [sys.executable, "-c", IMPATIENT, *words],
        env=site.environment() | {"NBDM_FAULT": f"superblock_write:1=wait:{gate}"},
        check=False,
    )
    assert done.returncode == 11, done.stderr
    assert "it goes on starting" in done.stderr
    support.wait_until(Path(f"{gate}.reached").exists, "the start to be under way")
    gate.touch()
    support.wait_until(site.answers, "the server to answer")
    site.cli("stop", str(site.config))


# A server, without clients, that gets no thread for its maintenance.
WITHOUT_A_THREAD = """
import errno, sys
from nbd_mirror.base.errors import WaitTimeoutError, from_errno
from nbd_mirror.server import volume
from nbd_mirror.server.process import or_exit
from nbd_mirror.volume import control

begin = volume.begin

def fail(thread):
    if thread.name != "maintenance":
        return begin(thread)
    try:
        control.call(served.config.state, "ping", 2.0)
    except WaitTimeoutError:
        raise from_errno(errno.EAGAIN, "no thread") from None
    raise AssertionError("it has answered")

volume.begin = fail
served = volume.Volume.open(sys.argv[1], "direct", lambda: None)
or_exit(served.serve)
"""


def test_start_that_fails_has_answered_no_command(site: Site) -> None:
    """`serve` takes the first answer for the news that the volume is served."""
    site.create()
    done = site.processes.run(
        [sys.executable, "-c", WITHOUT_A_THREAD, str(site.config)],
        env=site.environment(),
        check=False,
    )
    assert "has answered" not in done.stderr
    assert "nbd-mirror: no thread" in done.stderr
    assert done.returncode not in (0, 1), done.stderr


# A server whose door gets no thread for requests.
DOOR_WITHOUT_A_THREAD = """
import errno, sys
from nbd_mirror.base.errors import WaitTimeoutError
from nbd_mirror.server import direct
from nbd_mirror.volume import config, control
from nbd_mirror.volume.core import server as core

lib = core.lib

class Lib:
    def __getattr__(self, name):
        starts = name in ("nbdm_server_start", "nbdm_server_run")
        return fail if starts else getattr(lib, name)

def fail(server):
    try:
        control.call(config.load(sys.argv[1]).state, "ping", 2.0)
    except WaitTimeoutError:
        return -errno.EAGAIN
    raise AssertionError("it has answered")

core.lib = Lib()
direct.main(sys.argv[1])
"""


def test_door_that_fails_to_start_has_answered_no_command(site: Site) -> None:
    """Its own threads are the last ones that a start can miss."""
    site.create()
    done = site.processes.run(
        [sys.executable, "-c", DOOR_WITHOUT_A_THREAD, str(site.config)],
        env=site.environment(),
        check=False,
    )
    assert "has answered" not in done.stderr
    assert "nbd-mirror: cannot start the thread requests" in done.stderr
    assert "try: raise `ulimit -u`" in done.stderr
    assert done.returncode == 14, done.stderr


# --- programs that the kernel does not start ---

LIMITED = """
import resource, sys
from nbd_mirror.commands import cli
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
cli.main()
"""
CROWDED = """
import os
from nbd_mirror.commands import cli
os.environ["LONG"] = "x" * (1 << 18)
cli.main()
"""


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_start_with_few_descriptors_says_so(site: Site, options: list[str]) -> None:
    """However few there are, up to a door that has none for its own: one clear line."""
    site.create()
    words = ["serve", str(site.config), *options]
    said = set()
    for limit in range(3, 9):
        done = site.processes.run(
            [sys.executable, "-c", LIMITED, str(limit), *words],
            env=site.environment(),
            check=False,
        )
        assert done.returncode not in (0, 1), done.stderr
        causes = [line for line in done.stderr.splitlines() if "  try: " not in line]
        assert len(causes) == 1, done.stderr
        assert "Too many open files" in causes[0]
        said.add(causes[0])
    assert any("cannot be started" in line for line in said), said


CRAMPED = """
import resource, sys
from nbd_mirror.commands import cli
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
cli.main()
"""


@pytest.mark.parametrize("options", [[], ["--foreground"]])
@pytest.mark.parametrize("file", ["local", "log"])
def test_start_that_may_not_write_a_file_to_its_end_says_so(
    site: Site, options: list[str], file: str
) -> None:
    """Not by what happens then, which a log of that size could not even hold."""
    site.create()
    path = site.local
    if file == "log":
        path = site.state / "serve.log"
        path.write_bytes(b"x\n" * (1 << 19))
    limit = path.stat().st_size - 1
    words = ["serve", str(site.config), *options]
    done = site.processes.run(
        [sys.executable, "-c", CRAMPED, str(limit), *words],
        env=site.environment(),
        check=False,
    )
    assert done.returncode == 8, done.stderr
    assert f"the limit of a file's size is {limit} bytes" in done.stderr
    assert "try: raise `ulimit -f`" in done.stderr


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_start_with_too_long_an_environment_says_so(
    site: Site, options: list[str]
) -> None:
    """The kernel refuses the server: what it is, and what helps."""
    site.create()
    words = ["serve", str(site.config), *options]
    done = site.processes.run(
        [sys.executable, "-c", CROWDED, *words], env=site.environment(), check=False
    )
    assert done.returncode == 14, done.stderr
    assert done.stderr == (
        f"nbd-mirror: {sys.executable} cannot be started: Argument list too long\n"
        "  try: unset long environment variables\n"
    )


def test_nbdkit_that_is_no_program_is_said(site: Site) -> None:
    """A script whose interpreter is missing, say."""
    site.create()
    folder = site.folder / "bin"
    folder.mkdir()
    nbdkit = folder / "nbdkit"
    nbdkit.write_text("#!/none\n")
    nbdkit.chmod(0o755)
    words = ["serve", str(site.config), "--door", "python"]
    done = site.processes.run(
        [*site.command(), *words],
        env=site.environment() | {"PATH": f"{folder}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 14, done.stderr
    assert f"nbd-mirror: {nbdkit} cannot be started" in done.stderr
