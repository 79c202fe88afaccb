# SPDX-License-Identifier: BSD-3-Clause
"""A volume's file: what is read, and the line each mistake gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from e2e.lib.clients import nbd
from pydantic import ValidationError

from nbd_mirror.base.errors import ConfigError, MissingError
from nbd_mirror.base.listen import Listen
from nbd_mirror.volume.config import RemoteConfig, check_links, load, to_params

GOOD = """\
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give the path of a good file."""
    path = tmp_path / "pg.toml"
    path.write_text(GOOD)
    return path


def _replace(file: Path, old: str, new: str) -> None:
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))


def _line(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file)
    return caught.value.message


def test_file_of_the_manual_is_read_in_base_units(file: Path) -> None:
    """Sizes become bytes, times seconds, the address its parts."""
    config = load(file)
    assert ("pg", 10 << 30, 65536) == (config.name, config.size, config.region_size)
    assert (2.0, 30.0) == (config.hold, config.late_write_window)
    assert Listen(path="/run/nbd-mirror/pg.sock") == config.listen
    assert config.listen.uri == "nbd+unix:///?socket=/run/nbd-mirror/pg.sock"
    assert ("dr", 5.0) == (config.remotes[0].name, config.remotes[0].deadline)
    assert file == config.source


def test_file_with_needed_keys_only_gets_the_defaults(tmp_path: Path) -> None:
    """A key that may be left out has the documented default."""
    path = tmp_path / "v.toml"
    path.write_text(
        'name="v"\nsize="adopt"\nlocal="d.img"\nstate="logs"\n'
        'listen="tcp:[::1]:10809"\n[[remote]]\nname="a"\nuri="nbd://h"\n'
    )
    config = load(path)
    assert (0, 65536, "degrade", "serve", 2.0, 30.0) == (
        config.size,
        config.region_size,
        config.policy,
        config.fenced_reads,
        config.hold,
        config.late_write_window,
    )
    assert config.remotes[0].deadline == 5.0
    assert (f"{tmp_path}/d.img", f"{tmp_path}/logs") == (config.local, config.state)
    assert config.listen.uri == "nbd://[::1]:10809"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            'region_size = "64KiB"',
            'region_size = "65000"',
            'pg.toml: region_size = "65000": must be a power of two from 4KiB to 4MiB',
        ),
        ('"64KiB"', '"2KiB"', 'region_size = "2KiB": must be a power of two from 4KiB'),
        ('"64KiB"', '"8MiB"', 'region_size = "8MiB": must be a power of two'),
        ('size = "10GiB"', "size = 0", "pg.toml: size = 0: must be a size above 0"),
        ('"10GiB"', '"2PiB"', 'size = "2PiB": must be a size above 0 and at most 1PiB'),
        ('"10GiB"', '"10GB"', 'size = "10GB": must be bytes, or a number with B, KiB'),
        ('"10GiB"', "true", "size = true: must be bytes"),
        ('"degrade"', '"maybe"', 'policy = "maybe": must be "degrade" or "stop"'),
        (
            'policy = "degrade"',
            'fenced_reads = "stale"',
            'fenced_reads = "stale": must be "serve" or "fail"',
        ),
        ('"2s"', '"1h"', 'hold = "1h": must be a time from 0s to 5min'),
        ('"30s"', '"x"', 'late_write_window = "x": must be seconds, or a number with'),
        ('"5s"', '"1ms"', 'remote "dr": deadline = "1ms": must be a time from 100ms'),
        ('name = "pg"', 'name = "a/b"', 'name = "a/b": must be 1 to 63 letters'),
        ('name = "pg"', "name = 5", "name = 5: must be 1 to 63 letters"),
        ('name = "pg"\n', "", "pg.toml: name: is missing; it must be 1 to 63 letters"),
        ('"dr"', '"local"', "is the local disk's name"),
        ('"/srv/pg.img"', '""', 'local = "": must be the path of a file'),
        ('"unix:/run', '"unix:run', 'must be "unix:/absolute/path"'),
        ("unix:/run/nbd-mirror/pg.sock", "tcp:::1:10809", "stands in brackets"),
        ("unix:/run/nbd-mirror/pg.sock", "tcp:a..b:1", '"tcp::PORT", or'),
        ("unix:/run/nbd-mirror/pg.sock", "tcp:.:1", '"tcp::PORT", or'),
        ("unix:/run/nbd-mirror/pg.sock", f"tcp:{'x' * 64}:1", '"tcp::PORT", or'),
        ("unix:/run/nbd-mirror/pg.sock", "tcp:[fe80::1%é]:1", "is no IPv6 address"),
        (
            "unix:/run/nbd-mirror/pg.sock",
            "tcp:[fe80::1%a\\u0000]:1",
            "is no IPv6 address",
        ),
        ("unix:/run/nbd-mirror/pg.sock", "tcp:h:0", "port 0 is not from 1 to 65535"),
        ("unix:/run/nbd-mirror/pg.sock", "unix:/" + "x" * 107, "108 bytes long"),
        ('name = "pg"', 'name = "pg"\nmax_clients = 0', "whole number from 1 to 65536"),
        ('name = "pg"', 'name = "pg"\nmax_clients = "9"', "a whole number from 1 to"),
        ('name = "pg"', 'name = "pg"\nmax_memory = "63MiB"', "a size from 64MiB to"),
        ('name = "pg"', 'name = "pg"\nlocal_deadline = "0s"', '"off", or a time from'),
        ('name = "pg"', 'name = "pg"\nlocal_deadline = "11min"', '"off", or a time'),
        ("nbd://dr.example.net/pg", "http://x/", "must be an NBD URI"),
        ("nbd://dr.example.net/pg", "nbd:///pg", "has no host"),
        ("nbd://dr.example.net/pg", "nbd://h:99999/pg", "must be an NBD URI"),
        ("nbd://dr.example.net/pg", "nbd+unix:///pg", "needs ?socket="),
        ("nbd://dr.example.net/pg", "nbd+unix:///?socket=rel", "needs ?socket=/abs"),
        ("hold =", "holt =", "pg.toml: holt: unknown key; did you mean hold?"),
        ("deadline =", "patience =", 'remote "dr": patience: unknown key; allowed are'),
        (
            'name = "pg"',
            'name = "pg"\ndeadline = "1s"',
            "deadline: unknown key here; it stands in a [[remote]] or [[node]] table",
        ),
        (
            'deadline = "5s"',
            'policy = "stop"',
            'remote "dr": policy: unknown key here; it stands before the first',
        ),
        ("[[remote]]", "[remote]", "remote: must be 1 to 8 [[remote]] tables"),
        (
            GOOD[GOOD.index("\n[[remote]]") :],
            'remote = ["dr"]\n',
            "pg.toml: remote 1: must be a [[remote]] table",
        ),
        ("nbd://dr.example.net", "nbd://dr\\u0000x", "must be an NBD URI"),
        ("nbd://dr.example.net", "nbd://dr\\nx", "must be an NBD URI"),
        (
            "unix:/run/nbd-mirror/pg.sock",
            "tcp:h:" + "9" * 5000,
            "port 99999... is not from 1 to 65535",
        ),
        (
            GOOD[GOOD.index("[[remote]]") :],
            "",
            "remote: is missing; it must be 1 to 8 [[remote]] tables",
        ),
        ("/var/lib/nbd-mirror/pg", "/srv/pg.img", "are the same path"),
        ("/var/lib/nbd-mirror/pg", "/srv", "must not lie in the state directory"),
    ],
)
def test_mistake_gets_one_line_with_key_value_and_rule(
    file: Path, old: str, new: str, line: str
) -> None:
    """A wrong key or value is named, with what is allowed, on one line."""
    _replace(file, old, new)
    message = _line(file)
    assert line in message
    assert message.startswith("pg.toml: ")
    assert "\n" not in message


def test_mistakes_several_get_a_line_each(file: Path) -> None:
    """One run reports all mistakes."""
    _replace(file, '"degrade"\nhold = "2s"', '"x"\nhold = "y"')
    assert ["pg.toml: policy", "pg.toml: hold"] == [
        line.split(" =")[0] for line in _line(file).splitlines()
    ]


def test_toml_error_gives_line_and_column(file: Path) -> None:
    """A syntax error says where."""
    _replace(file, 'policy = "degrade"', "policy = degrade")
    assert "line 7, column" in _line(file)


def test_file_that_is_no_text_is_refused(file: Path) -> None:
    """Binary content is an error of its own, with the line."""
    file.write_bytes(GOOD.encode() + b"# \xff\n")
    assert "line 15 is not UTF-8 text" in _line(file)


def test_remotes_of_one_name_are_refused(file: Path) -> None:
    """Two remotes cannot share a dirty map's name."""
    file.write_text(GOOD + '[[remote]]\nname = "dr"\nuri = "nbd://b"\n')
    assert 'two remotes are called "dr"' in _line(file)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "needs a [tls] table with a key or certificates"),
        ('tls = "off"\n', "needs a [tls] table with a key or certificates"),
        ('tls.key = "pg.key"\n', ""),
        ('tls.certificate = "c"\ntls.private_key = "k"\ntls.ca = "a"\n', ""),
        ('tls.certificate = "c"\ntls.private_key = "k"\n', "tls: must have either key"),
    ],
)
def test_listening_with_tls_needs_the_files_for_it(
    file: Path, table: str, words: str
) -> None:
    """A server that could prove nothing does not begin."""
    listen = 'listen = "tls:127.0.0.1:10809"\n'
    _replace(file, 'listen = "unix:/run/nbd-mirror/pg.sock"\n', listen + table)
    if words:
        assert words in _line(file)
        return
    config = load(file)
    assert config.tls is not None
    assert config.listen.tls
    assert config.tls.on


@pytest.mark.parametrize(
    "name", ["control", "failed", "unflushed", "lock", "dirty.dr", "serve.log"]
)
def test_listening_at_a_file_of_the_state_is_refused(file: Path, name: str) -> None:
    """A socket in its place would be taken for it."""
    state = "/var/lib/nbd-mirror/pg"
    _replace(file, "/run/nbd-mirror/pg.sock", f"{state}/{name}")
    assert "that is the name of a file of the state" in _line(file)
    _replace(file, "/run/nbd-mirror/pg.sock", f"{state}/pg.sock")
    assert load(file).listen.path == f"{state}/pg.sock"


def test_links_do_not_hide_that_a_log_is_taken_for_something_else(
    file: Path, tmp_path: Path
) -> None:
    """Neither the disk nor the socket is a file of the state, whatever their names."""
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to("state")
    (tmp_path / "disk").symlink_to("state/superblock")
    text = GOOD.replace("/var/lib/nbd-mirror/pg", f"{tmp_path}/state")
    for old, new in (
        ("/srv/pg.img", f"{tmp_path}/link/superblock"),
        ("/srv/pg.img", f"{tmp_path}/disk"),
        ("/run/nbd-mirror/pg.sock", f"{tmp_path}/link/failed"),
    ):
        file.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=r"in the state dir|a file of the state"):
            check_links(load(file))
    file.write_text(text)
    check_links(load(file))
    # A disk that has failed may hang where it is looked at.
    file.write_text(text.replace("/srv/pg.img", f"{tmp_path}/disk"))
    check_links(load(file), uses_local=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [("dr", "dr.new"), ("dr.bad", "dr"), ("x", "local.new"), ("local.bad", "x")],
)
def test_remotes_whose_logs_would_be_one_file_are_refused(
    file: Path, one: str, other: str
) -> None:
    """The name under which a map is made, or set aside, is no other disk's map."""
    text = GOOD.replace('"dr"', f'"{one}"')
    file.write_text(f'{text}[[remote]]\nname = "{other}"\nuri = "nbd://h"\n')
    message = _line(file)
    assert message.startswith("pg.toml: remote: no remote can be called")
    assert "give one of them another name" in message
    assert "\n" not in message
    for name in ("dr2.new", "new", "dr.newer"):
        file.write_text(f'{GOOD}[[remote]]\nname = "{name}"\nuri = "nbd://h"\n')
        assert load(file).remotes[1].name == name


def test_remotes_more_than_eight_are_refused(file: Path) -> None:
    """The superblock has room for eight."""
    more = "".join(f'[[remote]]\nname = "r{i}"\nuri = "nbd://b"\n' for i in range(8))
    file.write_text(GOOD + more)
    assert "must be 1 to 8 [[remote]] tables, not 9" in _line(file)


def test_name_is_looked_up_in_the_config_dir(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value without a slash is a volume's name."""
    monkeypatch.setenv("NBD_MIRROR_CONFIG_DIR", str(file.parent))
    assert file == load("pg").source


def test_path_is_not_looked_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that ends in .toml is a path from where the user stands."""
    monkeypatch.setenv("NBD_MIRROR_CONFIG_DIR", "/nonexistent")
    monkeypatch.chdir(file.parent)
    assert file == load("pg.toml").source


def test_name_that_is_missing_says_which_file_was_sought(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the whole path, and points at a file of that name here."""
    monkeypatch.setenv("NBD_MIRROR_CONFIG_DIR", "/nonexistent")
    monkeypatch.chdir(file.parent)
    with pytest.raises(MissingError, match=r"/nonexistent/pg\.toml") as caught:
        load("pg")
    assert "./pg.toml" in caught.value.hint


@pytest.mark.parametrize("name", ["a\nb", "a" * 5000, "\x1b[2J"], ids=len)
def test_name_of_any_kind_is_said_in_one_short_line(tmp_path: Path, name: str) -> None:
    """A name with a line feed, and one that is longer than a file's may be."""
    with pytest.raises((ConfigError, MissingError)) as caught:
        load(tmp_path / name)
    assert len(caught.value.message) < 600
    assert caught.value.message.isprintable()


def test_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    """The message says that it is a folder."""
    for folder in (tmp_path, ".", ".."):
        with pytest.raises(ConfigError, match="is a folder"):
            load(folder)


@pytest.mark.timeout(20)
def test_fifo_or_device_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    """A file without an end, or a pipe without a writer, is not waited for."""
    fifo = tmp_path / "v.toml"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero", "/dev/null"):
        with pytest.raises(ConfigError, match="is no plain file"):
            load(path)


PIECES = (*map(chr, range(0x20, 0x7F)), "\xe9", "%2", "%zz", "%20", "%e9")


def is_uri(uri: str) -> bool:
    """Tell whether a remote may have it."""
    try:
        RemoteConfig(name="dr", uri=uri)
    except ValidationError:
        return False
    return True


def libnbd_reads(uri: str) -> bool:
    """Tell whether libnbd gets as far as to connect, which fails."""
    with pytest.raises(nbd.Error) as caught:
        nbd.NBD().connect_uri(uri)
    return bool(caught.value.errno != "EINVAL")


@pytest.mark.parametrize(
    "uri",
    [
        "nbd+unix:///x?socket=/nonexistent/{}",
        "nbd+unix:///{}?socket=/nonexistent",
        "nbd://127.0.0.1:1/{}",
        "nbd://127.0.0.1:1/?a={}",
    ],
)
def test_uri_is_taken_if_libnbd_can_read_it(uri: str) -> None:
    """What it cannot read is a mistake of the file, and no remote that is away."""
    asked = [uri.format(piece) for piece in PIECES]
    unlike = [one for one in asked if is_uri(one) != libnbd_reads(one)]
    # It passes over what C ends a text at, and a '#' with all behind it.
    assert [one for one in unlike if "#" not in one] == []
    assert not is_uri("nbd://127.0.0.1:1/x%00y")


@pytest.mark.parametrize(
    "uri",
    [
        "NBD://127.0.0.1:1/",
        "nbd://127.0.0.1:/",
        "nbd://127.0.0.1:1/?socket=/nonexistent",
        "nbd://[::1/",
        "nbd://[::1]x:1/",
        "nbd://a b/",
        "nbd://a%zz/",
        "nbd://a\xe9/",
        "nbd://a|b/",
    ],
)
def test_uri_that_libnbd_refuses_is_refused(uri: str) -> None:
    """Of a host nothing is tried that would be looked up."""
    assert not libnbd_reads(uri)
    assert not is_uri(uri)


def test_uri_that_no_uri_can_be_says_how_it_is_written(file: Path) -> None:
    """The character, and what stands for it."""
    text = GOOD.replace("nbd://dr.example.net/pg", "nbd+unix:///?socket=/my disk")
    file.write_text(text)
    with pytest.raises(ConfigError, match='has " ", which a URI writes as %20'):
        load(file)
    file.write_text(text.replace("my disk", "my%20disk"))
    assert load(file).remotes[0].uri.endswith("/my%20disk")


def test_params_hold_what_the_engine_is_told(file: Path) -> None:
    """Times become milliseconds; assumed remotes are marked."""
    params = to_params(load(file), ["dr"])
    assert ("pg", 10 << 30, 2000) == (params.name, params.size, params.hold_ms)
    assert [("dr", 5000, True)] == [
        (one.name, one.deadline_ms, one.assume_in_sync) for one in params.remotes
    ]


def test_deadline_of_the_local_disk_is_off_unless_given(file: Path) -> None:
    """The engine takes 0 for none; a stop may take so much longer."""
    assert to_params(load(file), []).local_deadline_ms == 0
    limit_s = load(file).stop_limit_s
    text = file.read_text()
    for value, expected in (("off", 0), ("10s", 10_000)):
        file.write_text(f'local_deadline = "{value}"\n{text}')
        assert to_params(load(file), []).local_deadline_ms == expected
        assert load(file).stop_limit_s == limit_s + expected / 1000


def test_params_assuming_an_unknown_remote_are_refused(file: Path) -> None:
    """A misspelt remote must not leave the real one dirty unnoticed."""
    with pytest.raises(ConfigError, match='has no remote "rd"; it has: dr'):
        to_params(load(file), ["rd"])
