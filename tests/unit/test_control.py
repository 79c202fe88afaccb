# SPDX-License-Identifier: BSD-3-Clause
"""The control socket: one line there, one line back, and no client held up."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import support
from unit.volumes import make_file

from nbd_mirror.base import strangers, unix
from nbd_mirror.base.errors import (
    AccessError,
    BusyError,
    ConfigError,
    FormatError,
    MirrorError,
    MissingError,
    NotRunningError,
    WaitTimeoutError,
)
from nbd_mirror.server import control_server
from nbd_mirror.server.control_server import MAX_REQUEST, ControlServer
from nbd_mirror.volume import offline
from nbd_mirror.volume.client import ask, serving_pid
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.control import call, control_path
from nbd_mirror.volume.offline import lock_holder

WRONG_PIDS: tuple[object, ...] = (None, "x", [], -1, 1 << 40, True)

release = threading.Event()
begun = threading.Event()


def _handler(command: str, args: dict[str, Any]) -> object:
    match command:
        case "echo":
            return args
        case "refuse":
            raise ConfigError("no such remote", "nbd-mirror status CONFIG")
        case "crash":
            raise ZeroDivisionError("oh")
        case "slow":
            begun.set()
            release.wait(10)
    return None


LINGER_S = 30  # of a file's close
SOON_S = 12.0


CALL = """
import sys
from nbd_mirror.volume.control import call
print(call(sys.argv[1], "status", 1.0))
"""


def _send_with_file(
    client: socket.socket, data: bytes, flags: int = 0
) -> list[socket.socket]:
    """Send *data* with a file whose last close waits; return what makes it wait."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        file = socket.create_connection(listener.getsockname())
        wall = listener.accept()[0]
    file.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            file.send(bytes(65536))
    linger = struct.pack("ii", 1, LINGER_S)
    file.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    files = array.array("i", [file.fileno()])
    client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)], flags)
    file.close()  # it is in the message, and in no other place
    return [wall]


@pytest.mark.parametrize("when", ["before", "behind", "late", "urgent"])
def test_open_files_of_a_server_keep_no_command(tmp_path: Path, when: str) -> None:
    """Sent before the answer, behind it, or urgently: the command ends in time."""
    kept: list[socket.socket] = []
    # As long as what is received at once, so that what is behind it stays unread.
    answer = b'{"ok": true, "result": 7}'.ljust(65535) + b"\n"

    def serve(listener: socket.socket) -> None:
        client = listener.accept()[0]
        kept.append(client)
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        support.freeze(struct.unpack("3i", peer)[0])
        if when == "behind":
            client.sendall(answer)
        flags = socket.MSG_OOB if when == "urgent" else 0
        data = answer if when == "before" else b"x"
        kept.extend(_send_with_file(client, data, flags))
        if when == "urgent":
            client.sendall(answer)
        os.kill(struct.unpack("3i", peer)[0], signal.SIGCONT)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(control_path(tmp_path)))
        listener.listen()
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        # As on an older kernel, which knows no such option.
        code = (
            "import nbd_mirror.base.strangers as old\nold.SO_PASSRIGHTS = -1\n" + CALL
        )
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, os.fspath(tmp_path)],
            capture_output=True,
            text=True,
            timeout=3 * LINGER_S,
            check=False,
        )
        assert time.monotonic() - start < SOON_S
        thread.join()
    if when == "behind":
        assert done.stdout == "7\n"
    else:
        assert "is no nbd-mirror server" in done.stderr
    for sock in kept:
        sock.close()


def _kernel_refuses_files() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        strangers.refuse_files(probe)
        with contextlib.suppress(OSError):
            return probe.getsockopt(socket.SOL_SOCKET, strangers.SO_PASSRIGHTS) == 0
    return False


def _assert_file_refused(sock: socket.socket) -> None:
    """Fail unless the kernel takes no file for the other end of *sock*."""
    with Path("/dev/null").open() as file:
        what = array.array("i", [file.fileno()])
        for flags in (0, socket.MSG_OOB):
            with pytest.raises(PermissionError):
                sock.sendmsg(
                    [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, what)], flags
                )


def test_kernel_refuses_files_that_are_sent_to_us(state: Path) -> None:
    """To a command and to a server, also one that has not accepted the client yet."""
    support.requires(_kernel_refuses_files(), "the kernel has no SO_PASSRIGHTS")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(control_path(state)))
        _assert_file_refused(client)
        # Not all of it: the server closes the connection once it has answered.
        client.sendall(b'{"command": "echo", ')
        _assert_file_refused(client)
        client.sendall(b'"a": 1}\n')
        assert json.loads(client.recv(1000))["ok"]
    sock = unix.unix_socket()
    with sock, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        sock.connect(listener.getsockname())
        with listener.accept()[0] as server:
            _assert_file_refused(server)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Give a state directory with a server on its control socket."""
    release.clear()
    with ControlServer(control_path(tmp_path), _handler, timeout_s=0.5):
        yield tmp_path
        release.set()


def test_call_gets_the_result_of_the_handler(state: Path) -> None:
    """Arguments arrive, the result comes back."""
    assert {"a": 1, "b": "ü"} == call(state, "echo", a=1, b="ü")


def test_call_refused_raises_the_same_class(state: Path) -> None:
    """An error keeps its class, its words and its hint."""
    with pytest.raises(ConfigError, match="no such remote") as caught:
        call(state, "refuse")
    assert caught.value.hint == "nbd-mirror status CONFIG"


def test_bug_in_a_command_is_in_the_servers_log(tmp_path: Path) -> None:
    """With its traceback, which the report of it needs."""
    said: list[str] = []

    def log(level: str, text: str) -> None:
        said.append(f"{level} {text}")

    with (
        ControlServer(control_path(tmp_path), _handler, log=log),
        pytest.raises(MirrorError, match="internal error"),
    ):
        call(tmp_path, "crash")
    assert len(said) == 1
    assert said[0].startswith("error control: Traceback")
    assert "ZeroDivisionError" in said[0]


def test_call_that_meets_a_bug_says_so_and_server_goes_on(state: Path) -> None:
    """A bug in one command does not end the server."""
    with pytest.raises(MirrorError, match="internal error in the server: ZeroDivision"):
        call(state, "crash")
    assert {} == call(state, "echo")


def test_call_without_socket_says_not_running(tmp_path: Path) -> None:
    """No socket: no server, and the command that starts one."""
    with pytest.raises(NotRunningError) as caught:
        call(tmp_path, "echo")
    assert caught.value.hint == "nbd-mirror serve CONFIG"


def test_call_of_a_dead_server_says_not_running(tmp_path: Path) -> None:
    """A socket a killed server left behind is no server."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control_path(tmp_path)))
    with pytest.raises(NotRunningError):
        call(tmp_path, "echo")


def test_call_without_answer_ends_in_time(state: Path) -> None:
    """A server that does not answer is not waited for for ever."""
    begin = time.monotonic()
    with pytest.raises(WaitTimeoutError, match='did not answer "slow" within'):
        call(state, "slow", 0.2)
    assert time.monotonic() - begin < 2


def test_socket_may_be_opened_by_its_owner_only(state: Path) -> None:
    """The mode is 0600, whatever the umask."""
    assert 0o600 == stat.S_IMODE(control_path(state).stat().st_mode)


def test_call_of_another_user_is_refused_even_past_the_mode(state: Path) -> None:
    """The peer's uid counts too: an open mode lets no other user command it."""
    support.requires(os.geteuid() == 0, "only root can become another user")
    for path in [state, *state.parents]:
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    control_path(state).chmod(0o666)
    script = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        's.sendall(b\'{"command":"echo"}\\n\'); print(s.recv(4096).decode())'
    )
    done = subprocess.run(
        [sys.executable, "-Ic", script, control_path(state)],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert answer["error"]["class"] == AccessError.__name__


def test_client_that_says_nothing_holds_nobody(state: Path) -> None:
    """A stuck client is dropped after its time-out; others are served all the while."""
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.settimeout(5)
        stuck.connect(str(control_path(state)))
        assert {} == call(state, "echo")
        assert b"" == stuck.recv(1)


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b"[]\n", b"{}\n", b'{"command": 5}\n', b"x" * (MAX_REQUEST + 1)],
)
def test_request_that_is_garbled_gets_an_error(state: Path, line: bytes) -> None:
    """What is no request is answered as such, and the server goes on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(control_path(state)))
        sock.sendall(line)
        answer = json.loads(sock.recv(4096))
    assert answer["error"]["class"] == FormatError.__name__
    assert {} == call(state, "echo")


def test_answer_that_is_garbled_is_told(tmp_path: Path) -> None:
    """A program that answers on the socket in another form is not believed."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(control_path(tmp_path)))
        other.listen()

        def answer() -> None:
            client, _ = other.accept()
            with client:
                client.recv(4096)
                client.sendall(b'{"hello": 1}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(FormatError, match="no nbd-mirror server"):
            call(tmp_path, "echo")
        thread.join()


def test_server_second_on_one_socket_is_refused(state: Path) -> None:
    """A living server's socket is not taken away."""
    with pytest.raises(BusyError, match="another server answers"):
        ControlServer(control_path(state), _handler).start()
    assert {} == call(state, "echo")


def test_server_after_a_killed_one_takes_its_socket(tmp_path: Path) -> None:
    """A stale socket is replaced."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control_path(tmp_path)))
    with ControlServer(control_path(tmp_path), _handler):
        assert {} == call(tmp_path, "echo")


def test_server_without_folder_is_told(tmp_path: Path) -> None:
    """No state directory is an error with the path in it."""
    with pytest.raises(MissingError, match="cannot be made"):
        ControlServer(control_path(tmp_path / "none"), _handler).start()


def test_server_closed_leaves_no_socket_and_no_thread(tmp_path: Path) -> None:
    """close() joins every thread, one with a request under way too."""
    before = set(threading.enumerate())
    release.clear()
    begun.clear()
    server = ControlServer(control_path(tmp_path), _handler)
    server.start()
    answers: list[object] = []
    client = threading.Thread(target=lambda: answers.append(call(tmp_path, "slow")))
    client.start()
    assert begun.wait(5)
    release.set()
    server.close()
    client.join()
    assert [None] == answers
    assert before == set(threading.enumerate())
    assert not control_path(tmp_path).exists()


def test_server_closed_leaves_what_its_path_leads_to_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder was moved away, and another server's is there; or a link."""
    monkeypatch.setattr(control_server, "LOOK_S", 60.0)  # it binds no name anew
    path = control_path(tmp_path / "state")
    path.parent.mkdir()
    with ControlServer(path, _handler):
        path.parent.rename(tmp_path / "away")
        path.parent.mkdir()
        with ControlServer(path, _handler):
            pass
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert not (tmp_path / "away" / path.name).exists()


def test_path_over_107_bytes_works_on_both_ends(tmp_path: Path) -> None:
    """A deep state directory is no obstacle."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with ControlServer(control_path(deep), _handler):
        assert {"x": 1} == call(deep, "echo", x=1)
        with pytest.raises(BusyError):
            ControlServer(control_path(deep), _handler).start()
    assert not control_path(deep).exists()


def test_clients_many_at_once_are_all_answered(state: Path) -> None:
    """More clients than slots wait their turn."""
    results: list[dict[str, int]] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(call(state, "echo", i=i)))
        for i in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(range(40)) == sorted(one["i"] for one in results)


def test_ping_names_the_process_that_listens(tmp_path: Path) -> None:
    """A server of another user's cannot have root wait for, or kill, any process."""
    config = SimpleNamespace(state_dir=tmp_path, state=str(tmp_path), name="pg")
    answer = {"volume": "pg", "pid": os.getppid()}
    with ControlServer(control_path(tmp_path), lambda *_: answer):
        assert serving_pid(cast("VolumeConfig", config)) == os.getpid()


def test_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    """The lock's file is believed only of the process that holds the lock."""
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.write_text(f"{os.getpid()}\n")
        assert lock_holder(tmp_path) == os.getpid()
        lock.write_text(f"{os.getppid()}\n")
        assert lock_holder(tmp_path) is None


def test_command_that_takes_long_is_none_of_a_server_that_hangs(
    tmp_path: Path,
) -> None:
    """It answers all others, so no message says to kill it."""
    done = threading.Event()

    def handle(command: str, _: dict[str, Any]) -> object:
        return {"volume": "v", "pid": 1} if command == "ping" else done.wait(10)

    config = load(make_file(tmp_path))
    with (config.state_dir / "lock").open("w") as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ControlServer(control_path(config.state_dir), handle):
            with pytest.raises(WaitTimeoutError) as raised:
                ask(config, "resume", 0.3)
            done.set()
    assert '"resume" is not done after 0.3s' in str(raised.value)
    assert "kill" not in raised.value.hint


def test_lock_of_another_file_with_its_number_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers repeat in another file system, where another process holds a lock."""
    lock = tmp_path / "lock"
    lock.write_text(f"{os.getppid()}\n")
    number = f"00:19:{lock.stat().st_ino}"
    locks = tmp_path / "locks"
    locks.write_text(f"1: FLOCK  ADVISORY  WRITE {os.getppid()} {number} 0 EOF\n")
    monkeypatch.setattr(offline, "LOCKS", locks)
    assert lock_holder(tmp_path) is None


@pytest.mark.parametrize(
    "result",
    [
        7,
        [],
        {"volume": 7, "pid": 1},
        *({"volume": "pg", "pid": pid} for pid in WRONG_PIDS),
    ],
)
def test_ping_of_a_hostile_server_is_one_clear_error(
    tmp_path: Path, result: object
) -> None:
    """Root may ask another user's server: no answer of it is a bug of ours."""
    config = SimpleNamespace(state_dir=tmp_path, state=str(tmp_path), name="pg")
    with (
        ControlServer(control_path(tmp_path), lambda *_: result),
        pytest.raises(FormatError, match="no nbd-mirror server"),
    ):
        serving_pid(cast("VolumeConfig", config))
