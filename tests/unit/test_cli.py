# SPDX-License-Identifier: BSD-3-Clause
"""
The command line, as a user meets it: lines, exit codes, and no traceback ever.

What needs no server is run in its own process; status and watch are shown what
a server would answer.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import support
from rich.console import Console

from nbd_mirror.base.errors import (
    EXIT_CODES,
    BusyError,
    ConfigError,
    FormatError,
    MetadataFailedError,
    MissingError,
    NotRunningError,
    WaitTimeoutError,
)
from nbd_mirror.base.listen import parse_listen
from nbd_mirror.commands import cli, serve, watch
from nbd_mirror.commands.cli import report
from nbd_mirror.commands.show import describe_resync, show_status
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.control import ControlServer, control_path
from nbd_mirror.volume.status import Resync, Status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give the path of a volume's file; its state directory exists."""
    (tmp_path / "st").mkdir()
    path = tmp_path / "v.toml"
    path.write_text(
        'name="v"\nsize="1MiB"\nlocal="d.img"\nstate="st"\n'
        f'listen="unix:{tmp_path}/v.sock"\n'
        '[[remote]]\nname="dr"\nuri="nbd://h/x"\n'
    )
    return path


def nbd_mirror(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "nbd_mirror", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ("Traceback" in done.stderr) is (environment.get("NBD_MIRROR_DEBUG") == "1")
    return done


def _remote(**changes: Any) -> dict[str, Any]:
    remote = {
        "name": "dr",
        "uri": "nbd://h/x",
        "state": "in_sync",
        "reason": "",
        "hint": "",
        "connected": True,
        "dirty_bytes": 0,
        "late_bytes": 0,
        "unflushed_bytes": 0,
        "flush_bound_bytes": 64 << 20,
        "assumed": False,
        "paused": False,
        "resync": None,
        "last_error": "",
        "since": "2024-01-01T00:00:00+00:00",
    }
    return {**remote, **changes}


def _local(**changes: Any) -> dict[str, Any]:
    local = {
        "path": "/d.img",
        "state": "ok",
        "reason": "",
        "hint": "",
        "dirty_bytes": 0,
        "errors": 0,
        "repaired_regions": 0,
        "copied_bytes": 0,
        "resync": None,
        "last_error": "",
        "since": "",
    }
    return {**local, **changes}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _status(*remotes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    status = {
        "volume": "v",
        "uuid": "u",
        "size": 1 << 20,
        "state": remotes[0]["state"],
        "reason": "",
        "hint": "",
        "local": _local(),
        "door": "native",
        "pid": 1,
        "clients": 1,
        "inflight": 0,
        "active_extents": 0,
        "policy": "degrade",
        "fenced_reads": "serve",
        "region_size": 65536,
        "generation": 1,
        "remotes": list(remotes),
    }
    return {**status, **changes}


# --- errors and exit codes ---


def test_help_documents_every_exit_code() -> None:
    """The epilog is the table of errors.py."""
    said = nbd_mirror("--help")
    assert said.returncode == 0
    for code, meaning in EXIT_CODES.items():
        assert f"{code:<4} {meaning}" in said.stdout


def test_version_is_printed() -> None:
    """--version prints one line."""
    assert nbd_mirror("--version").stdout.startswith("nbd-mirror 0.")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["nonsense"], 2),
        (["wait", "x", "--for", "nonsense"], 2),
        (["wait", "FILE", "--for", "in_sync", "--timeout", "soon"], 2),
        (["status", "/nonexistent/x.toml"], MissingError.exit_code),
        (["create", "FILE"], MissingError.exit_code),
        (["serve", "FILE"], MissingError.exit_code),
        (["create", "FILE", "--assume-in-sync", "x"], ConfigError.exit_code),
        (["stop", "FILE"], NotRunningError.exit_code),
        (["pause", "FILE"], NotRunningError.exit_code),
        (["invalidate", "FILE", "dr"], NotRunningError.exit_code),
        (["invalidate", "FILE", "rd"], ConfigError.exit_code),
        (["invalidate", "FILE", "local"], NotRunningError.exit_code),
        (["resume", "FILE", "local"], NotRunningError.exit_code),
        (["pause", "FILE", "local"], ConfigError.exit_code),
        (["inspect", "FILE"], MissingError.exit_code),
        (["detach", "/dev/sda"], MissingError.exit_code),
    ],
)
def test_mistake_gets_its_exit_code_and_no_traceback(
    file: Path, args: list[str], code: int
) -> None:
    """Each mistake ends with the documented code and words on standard error."""
    done = nbd_mirror(*[str(file) if arg == "FILE" else arg for arg in args])
    assert (code, "") == (done.returncode, done.stdout)
    assert done.stderr


def test_error_is_one_line_and_a_hint_with_the_users_name_for_it(file: Path) -> None:
    """The hint can be pasted."""
    done = nbd_mirror("stop", file)
    assert done.stderr == (
        "nbd-mirror: no server answers for this volume\n"
        f"  try: nbd-mirror serve {file}\n"
    )


def test_current_folder_that_was_removed_is_said(file: Path, tmp_path: Path) -> None:
    """A relative path leads nowhere from there; a whole one is as good as ever."""
    gone = tmp_path / "gone"
    script = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    for config, code in (("v.toml", 4), (str(file), NotRunningError.exit_code)):
        command = [sys.executable, "-m", "nbd_mirror", "stop", config]
        done = subprocess.run(
            ["sh", "-c", script, gone, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr


def test_traceback_is_shown_only_when_asked_for(file: Path) -> None:
    """NBD_MIRROR_DEBUG=1 adds it, the code stays."""
    done = nbd_mirror("stop", file, NBD_MIRROR_DEBUG="1")
    assert done.returncode == NotRunningError.exit_code


def test_config_mistakes_get_a_line_each(file: Path) -> None:
    """Several mistakes, several lines, each with the program's name."""
    file.write_text(file.read_text().replace('"1MiB"', '"x"').replace('"v"', '"/"', 1))
    done = nbd_mirror("status", file)
    assert done.returncode == ConfigError.exit_code
    lines = done.stderr.splitlines()
    assert [True, True] == [line.startswith("nbd-mirror: v.toml: ") for line in lines]


def test_wait_interrupted_ends_with_130(file: Path) -> None:
    """Ctrl-C is no error of ours, and has its own code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbd_mirror", "wait", file, "--for", "in_sync"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr:
        assert "no server answers yet" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()


# --- create ---


def test_create_in_a_folder_with_other_files_is_refused(file: Path) -> None:
    """`state = "/etc"` must not fill /etc with logs."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st" / "passwd").touch()
    done = nbd_mirror("create", file)
    assert done.returncode == 6
    assert "other files, such as passwd" in done.stderr


def test_create_over_another_volumes_state_is_refused_even_by_force(file: Path) -> None:
    """A wrong `state` must not cost another volume its logs."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st").rmdir()
    assert nbd_mirror("create", file).returncode == 0
    other = file.with_name("other.toml")
    other.write_text(file.read_text().replace('name="v"', 'name="other"', 1))
    for words in (["create", other, "--force"], ["inspect", other]):
        done = nbd_mirror(*words)
        assert done.returncode == FormatError.exit_code
        assert "is the state of volume v, not of other" in done.stderr


def test_output_nobody_reads_to_the_end_is_no_error(file: Path) -> None:
    """`status | head -1` is how people use it."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st").rmdir()
    nbd_mirror("create", file)
    words = [sys.executable, "-m", "nbd_mirror", "inspect", str(file)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b""


def test_create_with_a_local_disk_too_small_tells_both_sizes(file: Path) -> None:
    """What is there and what is needed."""
    (file.parent / "d.img").write_bytes(bytes(5000))
    done = nbd_mirror("create", file)
    assert done.returncode == ConfigError.exit_code
    assert "has 5000 bytes, the volume needs 1048576" in done.stderr


# --- the listening socket ---


def test_uri_of_a_path_with_a_space_is_one_clients_take() -> None:
    """%20, as URIs have it: libnbd takes a plus sign for a plus sign."""
    listen = parse_listen("unix:/run/my disk.sock")
    assert listen.uri == "nbd+unix:///?socket=/run/my%20disk.sock"


def test_bind_to_a_socket_in_use_is_refused_and_leaves_it(tmp_path: Path) -> None:
    """A living server keeps its socket."""
    listen = parse_listen(f"unix:{tmp_path}/s")
    with serve.bind(listen):
        with pytest.raises(BusyError, match="socket in use"):
            serve.bind(listen)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")


def test_bind_replaces_a_stale_socket_with_mode_0600(tmp_path: Path) -> None:
    """A killed server's socket is replaced; only the owner may connect."""
    listen = parse_listen(f"unix:{tmp_path}/s")
    serve.bind(listen).close()
    with serve.bind(listen):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_bind_over_a_file_is_refused_and_leaves_it(tmp_path: Path) -> None:
    """A path that holds data is never removed."""
    (tmp_path / "s").write_text("precious")
    with pytest.raises(BusyError, match="is no socket"):
        serve.bind(parse_listen(f"unix:{tmp_path}/s"))
    assert (tmp_path / "s").read_text() == "precious"


def test_bind_without_the_folder_is_told(tmp_path: Path) -> None:
    """A missing folder is named."""
    with pytest.raises(MissingError, match="cannot listen on"):
        serve.bind(parse_listen(f"unix:{tmp_path}/none/s"))


def test_bind_to_a_port_in_use_is_refused() -> None:
    """TCP ports too."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BusyError, match="socket in use"):
            serve.bind(parse_listen(f"tcp:127.0.0.1:{port}"))


def test_bind_to_an_address_of_another_host_is_refused() -> None:
    """An address this host does not have is a wrong configuration."""
    with pytest.raises(ConfigError, match="cannot listen on"):
        serve.bind(parse_listen("tcp:192.0.2.1:10809"))


def _families(listeners: serve.Listeners) -> set[int]:
    return {int(sock.family) for sock in listeners.sockets}


@pytest.mark.parametrize("host", ["localhost", ""])
def test_bind_to_a_name_takes_all_its_addresses(host: str) -> None:
    """IPv4 and IPv6, as a client may try either first; and the URI leads there."""
    port = _free_port()
    listen = parse_listen(f"tcp:{host}:{port}")
    found = socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
    with serve.bind(listen) as listeners:
        assert {socket.AF_INET} <= _families(listeners)
        assert {one[0] for one in found} <= _families(listeners)
        for _, _, _, _, address in found:
            with socket.create_connection(address[:2]):
                pass
        with pytest.raises(BusyError, match="socket in use"):
            serve.bind(listen)
    assert listen.uri == f"nbd://localhost:{port}"
    with serve.bind(listen):
        pass


def test_bind_to_all_of_ipv6_takes_ipv4_too() -> None:
    """One socket for both, whatever this host's default is."""
    port = _free_port()
    with serve.bind(parse_listen(f"tcp:[::]:{port}")) as listeners:
        assert len(listeners.sockets) == 1
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)):
                pass


def test_bind_passes_over_an_address_this_host_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name of several addresses works with those that are there."""
    port = _free_port()
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host in ("192.0.2.1", "127.0.0.1", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with serve.bind(parse_listen(f"tcp:somewhere:{port}")) as listeners:
        assert [one.getsockname()[0] for one in listeners.sockets] == ["127.0.0.1"]


def test_bind_by_two_at_once_leaves_one_winner(tmp_path: Path) -> None:
    """However they interleave, exactly one gets a stale socket's place."""
    listen = parse_listen(f"unix:{tmp_path}/s")
    for _ in range(20):
        results: list[object] = []

        def attempt(results: list[object] = results) -> None:
            try:
                results.append(serve.bind(listen))
            except BusyError as error:
                results.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sockets = [one for one in results if isinstance(one, serve.Listeners)]
        assert len(sockets) == 1
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")
        sockets[0].close()


# --- status, wait, watch ---


def _shown(status: dict[str, Any], **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, **options)
    show_status(console, Status.model_validate(status), "pg")
    return out.getvalue()


def test_words_of_a_server_command_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Root may ask another user's server: nothing that is said is an escape."""
    words = "no\x1b[2J \x9b2J\x7f caf\xe9"
    status = _status(_remote(state=f"out{words}", reason=words, name=words))
    out = io.StringIO()
    Console(file=out, width=200).print(
        watch._picture(Status.model_validate(status), "pg")
    )
    report(BusyError(words, words))
    cli._say(f"policy {words}")
    said = capsys.readouterr()
    for shown in (_shown(status), out.getvalue(), said.err, said.out):
        assert "no?[2J ?2J? caf\xe9" in shown
        assert not set("\x1b\x9b\x7f") & set(shown)


def test_status_shows_why_and_what_to_try_with_the_volumes_name() -> None:
    """Reason and hint stand under the state they belong to."""
    text = _shown(
        _status(
            _remote(
                state="out_of_sync",
                reason="Connection refused",
                hint="nbd-mirror resume CONFIG dr",
                dirty_bytes=3 << 20,
                last_error="timed out",
            )
        )
    )
    assert "out_of_sync" in text
    assert "3MiB dirty" in text
    assert "why: Connection refused" in text
    assert "try: nbd-mirror resume pg dr" in text
    assert "last error: timed out" in text
    assert "\x1b" not in text


def test_status_of_a_failed_local_disk_is_loud_and_said_once() -> None:
    """Reason, what it misses and both commands stand under it, and not twice."""
    local = _local(
        state="failed",
        reason="Input/output error; the remotes serve reads and writes",
        hint="nbd-mirror resume CONFIG local",
        dirty_bytes=3 << 20,
        errors=1,
        since="2024-01-01T00:00:00+00:00",
    )
    text = _shown(
        _status(
            _remote(),
            local=local,
            state="failed",
            reason=f"local: {local['reason']}",
            hint=local["hint"],
        )
    )
    assert "/d.img, 3MiB dirty, 1 error, since 2024" in text
    assert text.count("why: Input/output error; the remotes serve") == 1
    assert text.count("try: nbd-mirror resume pg local") == 1


def test_status_counts_repaired_regions_of_a_disk_that_is_ok() -> None:
    """A disk that loses sectors is shown to, before it fails as a whole."""
    local = _local(errors=2, repaired_regions=2, last_error="failed to read at 512")
    text = _shown(_status(_remote(), local=local))
    assert "/d.img, 2 errors, 2 regions repaired" in text
    assert "last error: failed to read at 512" in text


def test_status_on_a_terminal_is_coloured_unless_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NO_COLOR is respected."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in _shown(_status(_remote()), force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in _shown(_status(_remote()), force_terminal=True)


def test_resync_is_never_called_complete_before_it_is() -> None:
    """One byte left of a terabyte is not 100 per cent."""
    resync = {
        "done_bytes": (1 << 40) - 1,
        "total_bytes": 1 << 40,
        "bytes_per_s": 1 << 20,
        "eta_s": 1.0,
        "growing": False,
    }
    assert describe_resync(Resync.model_validate(resync)).startswith("99.9%")
    resync["growing"] = True
    assert "growing" in describe_resync(Resync.model_validate(resync))


@pytest.fixture
def config(file: Path) -> VolumeConfig:
    """Give the volume."""
    return load(file)


def _served(config: VolumeConfig, *answers: dict[str, Any]) -> ControlServer:
    """Answer status with each of *answers* in turn, then with the last one."""
    left = list(answers)

    def handler(command: str, _: dict[str, Any]) -> object:
        assert command == "status"
        return left.pop(0) if len(left) > 1 else left[0]

    return ControlServer(control_path(config.state_dir), handler)


def _wait(config: VolumeConfig, timeout_s: float, remote: str | None = None) -> None:
    watch.wait_for(config, "in_sync", timeout_s, remote, lambda _: None)


def test_wait_ends_when_all_remotes_have_the_state(config: VolumeConfig) -> None:
    """It asks again until all are there."""
    later = _remote(state="resyncing", name="b")
    answers = [_status(_remote(), later), _status(_remote(), _remote(name="b"))]
    with _served(config, *answers):
        _wait(config, 10)


def test_wait_for_one_remote_does_not_mind_the_others(config: VolumeConfig) -> None:
    """--remote looks at that one alone."""
    with _served(config, _status(_remote(), _remote(state="failed", name="b"))):
        _wait(config, 10, "dr")


def test_wait_for_all_waits_for_the_local_disk_too(config: VolumeConfig) -> None:
    """Remotes that are in sync are not enough while local is copied back."""
    local = _local(state="resyncing", reason="1 MiB left")
    answers = [_status(_remote(), local=local), _status(_remote())]
    with _served(config, *answers):
        _wait(config, 10)
    with (
        _served(config, answers[0]),
        pytest.raises(WaitTimeoutError, match="local is resyncing: 1 MiB left"),
    ):
        _wait(config, 0.2)


def test_wait_for_the_local_disk_alone(config: VolumeConfig) -> None:
    """--remote local does not mind the remotes; one remote does not mind local."""
    failed = _local(state="failed", reason="EIO")
    with _served(config, _status(_remote(state="out_of_sync"))):
        _wait(config, 10, "local")
    with _served(config, _status(_remote(), local=failed)):
        _wait(config, 10, "dr")
        with pytest.raises(WaitTimeoutError, match="local is failed: EIO"):
            _wait(config, 0.2, "local")


def test_wait_over_its_time_says_state_reason_and_hint(config: VolumeConfig) -> None:
    """A `wait` in vain says why."""
    remote = _remote(state="out_of_sync", reason="refused", hint="nbd-mirror resume")
    with (
        _served(config, _status(remote)),
        pytest.raises(WaitTimeoutError, match="dr is out_of_sync: refused") as caught,
    ):
        _wait(config, 0.2)
    assert caught.value.hint == "nbd-mirror resume"


def test_wait_on_a_failed_volume_ends_at_once(config: VolumeConfig) -> None:
    """What can never come is not waited for."""
    status = _status(_remote(), state="failed", reason="fdatasync: EIO")
    with (
        _served(config, status),
        pytest.raises(MetadataFailedError, match="fdatasync: EIO"),
    ):
        _wait(config, 60)


def test_wait_without_server_ends_in_time(config: VolumeConfig) -> None:
    """No server in time: said as such."""
    with pytest.raises(NotRunningError):
        _wait(config, 0.2)


def test_status_of_another_volumes_server_is_refused(config: VolumeConfig) -> None:
    """A wrong `state` reaches another volume: nothing is shown or done."""
    with (
        _served(config, _status(_remote(), volume="other")),
        pytest.raises(FormatError, match="is the state of volume other, not of v"),
    ):
        watch.status_of(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "1"},
        {"remotes": {}},
        {"remotes": [7]},
        {"local": None},
        {"local": {"path": "/d.img"}},
        {"hint": None},
        {"clients": 1 << 4000},
        {"max_clients": "1"},
        {"remotes": [{"name": "dr"}]},
        {"local": {**_local(), "resync": {"done_bytes": 1}}},
        {"local": {**_local(), "dirty_bytes": 1e999}},
    ],
)
def test_status_that_is_none_is_one_clear_error(
    config: VolumeConfig, changes: dict[str, Any]
) -> None:
    """Of another user's server, or another version's, no answer is a bug of ours."""
    with (
        _served(config, _status(_remote(), **changes)),
        pytest.raises(FormatError, match="no nbd-mirror server, or one of another"),
    ):
        watch.status_of(config)


def test_status_of_an_earlier_versions_server_is_shown(config: VolumeConfig) -> None:
    """A server goes on as it was begun when a newer version is installed."""
    remote, local = _remote(), {"path": "/d.img", "state": "ok"}
    del remote["flush_bound_bytes"]
    status = _status(remote, local=local)
    del status["fenced_reads"]
    out = io.StringIO()
    with _served(config, status):
        answer = watch.status_of(config)
        show_status(Console(file=out, width=200), answer, "v")
        _wait(config, 10)
    assert "in_sync" in out.getvalue()
    assert "/d.img" in out.getvalue()
    # Programs find every key, with what it would say if nothing had happened.
    found = answer.dump()
    assert (found["fenced_reads"], found["persists"]) == ("serve", None)
    assert (found["local"]["dirty_bytes"], found["local"]["reason"]) == (0, "")
    assert found["remotes"][0]["flush_bound_bytes"] is None


def test_status_of_a_later_versions_server_is_shown(config: VolumeConfig) -> None:
    """What it says beside what is known is left out."""
    later = {"from_now_on": {"x": [1 << 4000]}}
    status = _status({**_remote(), **later}, local={**_local(), **later}, **later)
    with _served(config, status):
        answer = watch.status_of(config)
    assert "from_now_on" not in json.dumps(answer.dump())
    assert answer.remotes[0].state == "in_sync"


def test_stop_names_no_process_that_the_kernel_does_not(config: VolumeConfig) -> None:
    """A server of another process namespace cannot have root kill what it names."""
    support.requires(os.geteuid() == 0, "only root can make a process namespace")
    support.requires_program("unshare")
    answers = {
        "ping": {"volume": "v", "pid": os.getpid()},
        "status": _status(_remote()),
        "stop": {},
    }
    script = (
        "import sys\n"
        "from nbd_mirror.commands import serve\n"
        "from nbd_mirror.volume import config\n"
        "volume = config.load(sys.argv[1])\n"
        "serve.STOP_SLACK_S = 1 - volume.stop_limit_s\n"
        "try: serve.stop(volume)\n"
        "except serve.WaitTimeoutError as error: print(error.message, error.hint)\n"
    )
    python = [sys.executable, "-c", script, str(config.source)]
    with ControlServer(control_path(config.state_dir), lambda one, _: answers[one]):
        done = subprocess.run(
            ["unshare", "--pid", "--fork", *python],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert "has not ended" in done.stdout, done.stderr
    assert str(os.getpid()) not in done.stdout


def test_watch_off_a_terminal_prints_a_line_a_change(config: VolumeConfig) -> None:
    """Same states give no second line; it ends at --until."""
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1,
        "eta_s": None,
    }
    answers = [
        _status(_remote(state="out_of_sync", dirty_bytes=1 << 20)),
        _status(_remote(state="out_of_sync", dirty_bytes=1 << 20)),
        _status(_remote(state="resyncing", resync=resync)),
        _status(_remote()),
    ]
    out = io.StringIO()
    with _served(config, *answers):
        watch.watch(config, Console(file=out, width=100), "v", "in_sync")
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "dr: out_of_sync, 1MiB dirty",
        "dr: resyncing, 50% of 1MiB",
        "dr: in_sync",
    ]


def test_watch_shows_the_local_disk_until_it_is_ok(config: VolumeConfig) -> None:
    """What is copied back has its lines and its bar, and ends like a resync."""
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1 << 20,
        "eta_s": 3.0,
        "growing": False,
    }
    answers = [
        _status(_remote(), local=_local(state="failed", dirty_bytes=1 << 20)),
        _status(_remote(), local=_local(state="resyncing", resync=resync)),
        _status(_remote()),
    ]
    plain, live = io.StringIO(), io.StringIO()
    with _served(config, *answers):
        watch.watch(config, Console(file=plain, width=100), "v", "in_sync")
    console = Console(file=live, width=120, force_terminal=True)
    with _served(config, *answers):
        watch.watch(config, console, "v", "in_sync")
    lines = [line.split(" ", 1)[1] for line in plain.getvalue().splitlines()]
    assert lines == [
        "local: failed, 1MiB dirty",
        "dr: in_sync",
        "local: resyncing, 50% of 1MiB",
    ]
    for part in ("local", "50.0%", "3s left"):
        assert part in live.getvalue()


def test_watch_on_a_narrow_terminal_is_readable(config: VolumeConfig) -> None:
    """At 40 columns the state is whole, and the reason has the line to itself."""
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system=None)
    reason = "could not connect to the remote host: Connection refused"
    first = _status(_remote(state="out_of_sync", reason=reason))
    with _served(config, first, _status(_remote())):
        watch.watch(config, console, "v", "in_sync")
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert "could not connect to the remote" in lines
    assert "host: Connection refused" in lines
    assert any(line.startswith("dr  out_of_sync  ") for line in lines)


def test_watch_on_a_terminal_draws_and_ends(config: VolumeConfig) -> None:
    """The live picture holds state, bar and reason."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    resync = {
        "done_bytes": 1 << 19,
        "total_bytes": 1 << 20,
        "bytes_per_s": 1 << 20,
        "eta_s": 3.0,
    }
    first = _status(_remote(state="resyncing", resync=resync, reason="copying"))
    with _served(config, first, _status(_remote())):
        watch.watch(config, console, "v", "in_sync")
    text = out.getvalue()
    for part in ("resyncing", "50.0%", "3s left", "copying", "in_sync"):
        assert part in text
