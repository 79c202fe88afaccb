# SPDX-License-Identifier: BSD-3-Clause
"""
Every text that is read, made up by Hypothesis: any bytes give a value or one error.

A configuration is right, or a ConfigError whose every line names the file; sizes,
times and addresses are read or a ValueError; what the control socket is sent, and
what answers on it, ends in an answer, never in a traceback or a dead server.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nbd_mirror.base.errors import (
    ConfigError,
    FormatError,
    MirrorError,
    NotRunningError,
)
from nbd_mirror.base.listen import parse_listen
from nbd_mirror.base.units import parse_duration, parse_size
from nbd_mirror.server.control_server import MAX_REQUEST, ControlServer
from nbd_mirror.volume.config import VolumeConfig, load, to_params
from nbd_mirror.volume.control import call, control_path

GOOD = b"""\
name = "pg"
size = "10GiB"
local = "/srv/pg.img"
state = "/var/lib/nbd-mirror/pg"
listen = "unix:/run/nbd-mirror/pg.sock"
region_size = "64KiB"
policy = "degrade"
hold = "2s"
late_write_window = "30s"

[[remote]]
name = "dr"
uri = "nbd://dr.example.net/pg"
deadline = "5s"
"""
KEYS = (
    "name",
    "size",
    "local",
    "state",
    "listen",
    "region_size",
    "policy",
    "hold",
    "late_write_window",
    "remote",
    "uri",
    "deadline",
    "reigon_size",
)

# What parsers stumble over.
NASTY = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"\r\n",
    b"'''",
    b'"""',
    b"[" * 5000,
    b"{a=" * 5000,
    b"a." * 5000 + b"a",
    b"1" * 5000,
    b"0x" + b"f" * 5000,
    b"-1",
    b"1e400",
    b"nan",
    b"-inf",
    b"true",
    b"1979-05-27T07:32:00Z",
    b"{name = 1}",
    b"[1, 'a', [2]]",
    b'"\\u0000"',
    b'"\\n\\u001b[2J"',
    b'"\\u2028\\u0085"',
    b'"unix:/\\n"',
    b'"tcp:[::1]:10809"',
    b'"tcp:h:' + b"9" * 5000 + b'"',
    b'"nbd+unix:///?socket=/a%00b"',
    b'"nbd://[::"',
    b'"nbd://h:99999/"',
    b"[[remote]]\n",
    b"[remote]\n",
    b"[remote.x]\n",
    b"remote = []\n",
    b'"a\\nb" = 1\n',
    b"name = ['x']\n",
    b'name = "x\\ny"\n',
)

quick = settings(
    max_examples=300,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """Give the good file with pieces of it replaced by something else."""
    text = GOOD
    pieces = st.one_of(st.sampled_from(NASTY), st.binary(max_size=20))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        text = text[:start] + draw(pieces) + text[end:]
    return text


@st.composite
def revalued(draw: st.DrawFn) -> bytes:
    """Give the good file with other values, keys and tables."""
    lines = GOOD.splitlines(keepends=True)
    values = st.one_of(
        st.sampled_from(NASTY),
        st.text(max_size=30).map(lambda text: json.dumps(text).encode()),
        st.integers().map(lambda number: str(number).encode()),
        st.floats().map(lambda number: str(number).encode()),
    )
    keys = st.one_of(
        st.sampled_from(KEYS).map(str.encode),
        st.text(max_size=5).map(lambda text: json.dumps(text).encode()),
    )
    for _ in range(draw(st.integers(1, 4))):
        line = draw(keys) + b" = " + draw(values) + b"\n"
        at = draw(st.integers(0, len(lines)))
        drop = draw(st.integers(0, 1))
        lines[at : at + drop] = [line]
    return b"".join(lines)


def read(content: bytes) -> VolumeConfig | None:
    """Load a file of *content*; None: refused, as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pg.toml")
        path.write_bytes(content)
        try:
            return load(path)
        except ConfigError as error:
            lines = error.message.split("\n")
            assert all(line.startswith("pg.toml: ") for line in lines)
            # No line of a terminal's is drawn over, no other one made up.
            assert all(line.isprintable() for line in lines), lines
            assert all(len(line) < 1000 for line in lines)
            return None


@quick
@given(st.one_of(st.binary(max_size=300), mangled(), revalued()))
@example(b"a = " + b"[" * 5000)
@example(b"size = " + b"1" * 5000)
@example(b"size = 0x" + b"f" * 5000)
@example(GOOD.replace(b"[[remote]]", b'"a\\nb" = 1\n[[remote]]'))
@example(GOOD.replace(b'"dr"', b'"d\\nr"'))
@example(GOOD.replace(b'"/srv/pg.img"', b'"/var/lib/nbd-mirror/pg/\\n"'))
@example(GOOD.replace(b"nbd://dr.example.net/pg", b"nbd+unix:///?socket=/a%00b"))
def test_config_any_bytes_are_read_or_refused_in_lines(content: bytes) -> None:
    """Any bytes in the file give a configuration or one error."""
    config = read(content)
    if config is not None:
        params = to_params(config)
        assert params.region_size == config.region_size
        assert "\0" not in params.local + params.state_dir
        assert all("\0" not in remote.uri for remote in config.remotes)


def test_config_the_generators_also_make_right_files() -> None:
    """A file is not refused for whatever is put in it: the oracle could not fail."""
    assert read(GOOD) is not None
    assert read(GOOD.replace(b"10GiB", b"11GiB")) is not None


@quick
@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()))
@example("9" * 5000)
@example("1" * 20 + "." + "9" * 20 + "PiB")
@example("tcp:h:" + "9" * 5000)
@example("tcp:[" + ":" * 5000 + "]:1")
@example("unix:/\ud800")
def test_units_and_addresses_are_read_or_value_errors(value: object) -> None:
    """Nothing but ValueError comes out, with words in it."""
    for parse in (parse_size, parse_duration, parse_listen):
        try:
            read = parse(value)
        except ValueError:
            continue
        assert not isinstance(read, int | float) or read >= 0


numbers = st.from_regex(r"[0-9]{1,20}(\.[0-9]{1,20})?", fullmatch=True)


@quick
@given(numbers, st.sampled_from(["", "B", "KiB", "PiB", "s", "ms", "d", "KB", "kib"]))
def test_units_of_any_number_are_exact_or_refused(number: str, unit: str) -> None:
    """What is read as a size is a whole number of bytes, and not rounded."""
    with contextlib.suppress(ValueError):
        assert parse_size(number + unit) >= int(number.partition(".")[0])
    with contextlib.suppress(ValueError):
        assert parse_duration(number + unit) >= 0


# --- the control socket ---


def handler(command: str, args: dict[str, Any]) -> object:
    """Answer with what was asked."""
    return {"command": command, "args": args}


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """Give the state directory of a control server that lives as long as these."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        with ControlServer(control_path(state), handler, timeout_s=2):
            yield state


def send(state: Path, line: bytes) -> bytes:
    """Send it and say no more; return what comes back until the end."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(control_path(state)))
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(line)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                answer += chunk
        return answer


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)
lines = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps({"command": value}).encode()),
    st.sampled_from(NASTY),
)


@quick
@given(lines)
@example(b"[" * 60000)
@example(b'{"command":' * 4000)
@example(b'{"command": "\\ud800"}')
@example(b'{"command": "x", "n": ' + b"1" * 5000 + b"}")
@example(b" " * (MAX_REQUEST + 1))
def test_control_any_line_is_answered_or_refused(server: Path, line: bytes) -> None:
    """Garbage gets FormatError, in one line of JSON, and the server goes on."""
    line = line.replace(b"\n", b" ")
    answer = send(server, line + b"\n")
    # Closed on with garbage unread, the answer may be lost: only if over long.
    if answer or len(line) <= MAX_REQUEST:
        told = json.loads(answer)
        if told["ok"]:
            assert isinstance(told["result"]["command"], str)
        else:
            assert told["error"]["class"] == FormatError.__name__, told
            assert "\n" not in told["error"]["message"]
    assert call(server, "echo")["command"] == "echo"


def answer_with(state: Path, answer: bytes) -> threading.Thread:
    """Answer one request on the control socket with these bytes."""
    other = socket.socket(socket.AF_UNIX)
    other.bind(str(control_path(state)))
    other.listen()

    def serve() -> None:
        with other:
            client, _ = other.accept()
            with client:
                client.recv(4096)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


answers = st.one_of(
    lines,
    json_values.map(lambda value: json.dumps({"ok": value}).encode()),
    json_values.map(lambda value: json.dumps({"ok": False, "error": value}).encode()),
    st.tuples(json_values, json_values, json_values).map(
        lambda three: json.dumps(
            {
                "ok": False,
                "error": dict(zip(("class", "message", "hint"), three, strict=True)),
            }
        ).encode()
    ),
)


@quick
@given(answers)
@example(b"[" * 60000)
@example(b'{"ok": false, "error": {"class": [], "message": {}, "hint": 1}}')
def test_control_any_answer_is_believed_or_an_error(answer: bytes) -> None:
    """Any program that listens there gives a client a result or a MirrorError."""
    with tempfile.TemporaryDirectory() as folder:
        thread = answer_with(Path(folder), answer.replace(b"\n", b" ") + b"\n")
        error = None
        try:
            call(folder, "status")
        except MirrorError as caught:
            error = caught
        thread.join()
    if error is not None:
        assert isinstance(error.message, str)
        assert isinstance(error.hint, str)
        assert not isinstance(error, NotRunningError)
