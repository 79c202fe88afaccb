# SPDX-License-Identifier: BSD-3-Clause
"""
The set-up of a volume with nodes, as a user does it: init, key, nodes.

Each command is run in its own process. The key is tried with the programs that will use
it: nbdkit as the server and libnbd as the client.
"""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import support
from e2e.lib.clients import nbd
from support import Processes, wait_listening
from unit.command_line import nbd_mirror
from unit.volumes import make_file

from nbd_mirror.base.errors import (
    AccessError,
    ConfigError,
    ExistsError,
    MissingError,
    SpaceError,
    UnsupportedError,
)
from nbd_mirror.commands import serve
from nbd_mirror.commands.init import NewVolume, write_config
from nbd_mirror.volume.config import load
from nbd_mirror.volume.tls_files import check_tls, make_key

NOBODY = 65534

NODES = ("--node", "alpha=10.0.0.1:10810", "--node", "beta=[fd00::2]:10810")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder where volumes are looked up, which is not there yet."""
    folder = tmp_path / "etc"
    monkeypatch.setenv("NBD_MIRROR_CONFIG_DIR", str(folder))
    monkeypatch.setenv("NBD_MIRROR_NODE", "alpha")
    return folder


@pytest.fixture
def file(folder: Path) -> Path:
    """Give the path of a volume's file, as `init` writes it; it has no key yet."""
    nodes = [("alpha", "10.0.0.1:10810"), ("beta", "[fd00::2]:10810")]
    listen = "unix:/run/nbd-mirror/pg.sock"
    volume = NewVolume("pg", "1MiB", "/srv/pg.img", "/srv/state", listen, nodes)
    return write_config(volume).source


def init(*options: str) -> str:
    """Write the configuration by the command; return what is said."""
    words = ["init", "pg", "--size", "1MiB", "--local", "/srv/pg.img", *NODES]
    done = nbd_mirror(*words, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(code: int, *words: object, **environment: str) -> str:
    """Run a command that is refused; return its line."""
    done = nbd_mirror(*words, **environment)
    assert done.returncode == code, done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("nbd-mirror: ")
    assert not [line for line in rest if not line.startswith("  ")]
    return done.stderr


# --- init ---


def test_init_writes_a_file_with_a_comment_for_each_key(folder: Path) -> None:
    """It is what was asked for, and a reader learns what each key is."""
    said = init()
    file = folder / "pg.toml"
    volume = load(file, "beta")
    assert ("pg", 1 << 20, "/srv/pg.img") == (volume.name, volume.size, volume.local)
    assert volume.state == "/var/lib/nbd-mirror/pg"
    assert str(volume.listen) == "unix:/run/nbd-mirror/pg.sock"
    assert ["10.0.0.1:10810", "[fd00::2]:10810"] == [
        str(node.address) for node in volume.nodes
    ]
    assert volume.tls is not None
    assert volume.tls.key == f"{folder}/pg.key"
    lines = file.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        assert " = " not in line or before.startswith("# "), line
    assert max(map(len, lines[:30])) < 90 + len(str(folder))
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert f"beta: scp -p {file} '[fd00::2]:{file}'" in said
    assert "next, on one node: nbd-mirror key pg" in said


def test_init_takes_all_that_a_path_may_have(folder: Path, tmp_path: Path) -> None:
    """A quote, a line end and a letter of another alphabet; a path from here."""
    odd = 'a "b"\n\\c\x7f\x01 \xe9\U0001f600'
    words = ["--state", f"/x/{odd}", "--listen", f"unix:/y/{odd}"]
    init(*words)
    volume = load(folder / "pg.toml", "alpha")
    assert (f"/x/{odd}", f"/y/{odd}") == (volume.state, volume.listen.path)
    words = ["init", "rel", "--size", "1MiB", "--local", "d.img", *NODES]
    assert nbd_mirror(*words).returncode == 0
    assert load(folder / "rel.toml", "alpha").local == f"{Path.cwd()}/d.img"


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        (3, ["pg", "--size", "big", *NODES], 'pg.toml: size = "big": must be bytes'),
        (3, ["pg", "--size", "adopt", *NODES], 'size = "adopt": must be a size where'),
        (3, ["a/b", "--size", "1MiB", *NODES], 'NAME = "a/b": must be 1 to 63'),
        (3, ["a.toml", "--size", "1MiB", *NODES], "is the name of a file"),
        (3, ["pg", "--size", "1MiB", *NODES[:2]], "must be 2 to 9 [[node]] tables"),
        (
            3,
            ["pg", "--size", "1MiB", *NODES, "--node", "beta=h:1"],
            'two nodes are called "beta"',
        ),
        (
            3,
            ["pg", "--size", "1MiB", *NODES, "--node", "c=10.0.0.1:10810"],
            "have one address, 10.0.0.1:10810",
        ),
        (
            3,
            ["pg", "--size", "1MiB", *NODES, "--node", "c=h"],
            'node "c": address = "h": must be "HOST:PORT"',
        ),
        (
            3,
            ["pg", "--size", "1MiB", *NODES, "--listen", "here"],
            'listen = "here": must be "unix:/absolute/path"',
        ),
    ],
)
def test_init_with_a_mistake_writes_nothing(
    folder: Path, code: int, words: list[str], line: str
) -> None:
    """One line, which is the one that a reader of the file would get."""
    said = refusal(code, "init", *words, "--local", "/srv/pg.img")
    assert line in said
    assert not folder.exists()


def test_init_with_an_option_that_is_no_node_is_wrong_usage(folder: Path) -> None:
    """The words of the command line are checked before the file's."""
    words = ["init", "pg", "--size", "1MiB", "--local", "/d", "--node", "alpha"]
    done = nbd_mirror(*words)
    assert done.returncode == 2
    assert "alpha: it must be NODE=HOST:PORT" in done.stderr
    assert not folder.exists()


def test_init_changes_no_file_that_is_there(folder: Path) -> None:
    """A second one is refused, and what an operator wrote stays."""
    init()
    file = folder / "pg.toml"
    file.write_text("# mine")
    words = ["init", "pg", "--size", "1MiB", "--local", "/d", *NODES]
    assert "is there already" in refusal(ExistsError.exit_code, *words)
    assert file.read_text() == "# mine"
    assert [file] == list(folder.iterdir())


# --- key ---


def test_key_is_made_for_its_owner_alone(file: Path, folder: Path) -> None:
    """Whatever the umask; with the command that copies it, and its fingerprint."""
    before = os.umask(0)
    try:
        done = nbd_mirror("key", "pg")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    path = folder / "pg.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    name, _, digits = path.read_text().partition(":")
    assert (name, len(bytes.fromhex(digits))) == ("pg", 32)
    assert f"beta: scp -p {path} '[fd00::2]:{path}'" in done.stdout
    assert "alpha: scp" not in done.stdout
    fingerprint = check_tls(load(file, "beta"))
    assert f"fingerprint {fingerprint}" in done.stdout
    assert fingerprint in nbd_mirror("nodes", "pg", "--node", "beta").stdout
    assert digits.strip() not in done.stdout
    assert {path, file} == set(folder.iterdir())


def test_key_that_is_there_is_replaced_by_force_alone(file: Path, folder: Path) -> None:
    """A new one shuts out the nodes that have the old one."""
    assert nbd_mirror("key", "pg").returncode == 0
    path = folder / "pg.key"
    before = path.read_text()
    said = refusal(ExistsError.exit_code, "key", "pg")
    assert "nbd-mirror key pg --force" in said
    assert path.read_text() == before
    assert nbd_mirror("key", "pg", "--force").returncode == 0
    assert path.read_text() != before
    assert {path, file} == set(folder.iterdir())


def test_key_of_a_volume_without_nodes_is_for_its_clients(tmp_path: Path) -> None:
    """They use TLS with it, where `listen` says so; a plain volume has no key."""
    path = make_file(tmp_path)
    said = refusal(ConfigError.exit_code, "key", path)
    assert "volume v has no [tls] table" in said
    text = path.read_text().replace(f"unix:{tmp_path}/v.sock", "tls:127.0.0.1:1")
    path.write_text(f'{text}[tls]\nkey = "v.key"\n')
    done = nbd_mirror("key", path)
    assert done.returncode == 0, done.stderr
    assert "copy it to the host of each client" in done.stdout
    assert "node" not in done.stdout


# As on a full disk.
LIMITED = """
import resource
from nbd_mirror.commands import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
cli.main()
"""


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_key_that_cannot_be_written_leaves_all_as_it_was(
    file: Path, folder: Path, options: list[str]
) -> None:
    """There is the old key or none, and never a part of one."""
    if options:
        make_key(load(file), force=False)
    before = {path: path.read_text() for path in folder.iterdir()}
    done = subprocess.run(  # by pipes, which have no limit
        [sys.executable, "-c", LIMITED, "key", "pg", *options],
        env={**os.environ, "PYTHONPATH": str(support.ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == SpaceError.exit_code, done.stderr
    assert f"the key {folder}/pg.key cannot be written" in done.stderr
    assert before == {path: path.read_text() for path in folder.iterdir()}


def test_key_does_not_follow_a_link(file: Path, folder: Path, tmp_path: Path) -> None:
    """A file that a link of the key's name leads to is never written."""
    (tmp_path / "other").write_text("x")
    (folder / "pg.key").symlink_to(tmp_path / "other")
    refusal(ExistsError.exit_code, "key", "pg")
    assert nbd_mirror("key", "pg", "--force").returncode == 0
    assert (tmp_path / "other").read_text() == "x"
    assert not (folder / "pg.key").is_symlink()


@pytest.mark.parametrize(
    ("tls", "code", "line"),
    [
        (
            "tls = 'off'",
            ConfigError.exit_code,
            'has tls = "off": its nodes need no key',
        ),
        ("tls.key = '/nonexistent/k'", MissingError.exit_code, "the folder of /nonexi"),
        (
            "tls = {certificate = 'a', private_key = 'b', ca = 'c'}",
            ConfigError.exit_code,
            "uses certificates, which nbd-mirror does not make",
        ),
    ],
)
def test_key_that_cannot_be_made_is_one_line(
    file: Path, folder: Path, tls: str, code: int, line: str
) -> None:
    """It says which other way the nodes have, or which folder is missing."""
    text, _, _ = file.read_text().partition("[tls]")
    file.write_text(f"{tls}\n{text}")
    assert line in refusal(code, "key", "pg")
    assert [file] == list(folder.iterdir())


def test_key_is_what_gnutls_reads(
    file: Path, folder: Path, tmp_path: Path, processes: Processes
) -> None:
    """A server and a client with the file meet; one with another key is refused."""
    assert nbd_mirror("key", "pg").returncode == 0
    keys = [folder / "pg.key", tmp_path / "other.key"]
    keys[1].write_text(f"pg:{'ab' * 32}\n")
    path = tmp_path / "sock"
    server = ["nbdkit", "-f", "-U", str(path), "--tls=require", f"--tls-psk={keys[0]}"]
    processes.start([*server, "memory", "1M"])
    wait_listening(path, "the server")
    for key in keys:
        client = nbd.NBD()
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_username("pg")
        client.set_tls_psk_file(os.fspath(key))
        if key == keys[0]:
            client.connect_unix(os.fspath(path))
            assert client.get_size() == 1 << 20
        else:
            with pytest.raises(nbd.Error):
                client.connect_unix(os.fspath(path))


# --- the files of [tls], checked ---

KEYS = {
    "nothing": ("", "must be one line, pg:HEX"),
    "two keys": ("pg:" + "ab" * 32 + "\nqg:" + "cd" * 32 + "\n", "must be one line"),
    "no name": ("ab" * 32, "must be one line, pg:HEX"),
    "another volume's": ("qg:" + "ab" * 32, 'is a key of "qg", not of "pg"'),
    "no number": ("pg:hello", "must be one line, pg:HEX"),
    "a short one": ("pg:abcd", "has 4 hexadecimal digits"),
    "a long one": ("pg:" + "ab" * 65, "has 130 hexadecimal digits"),
    "half a byte": ("pg:" + "a" * 63, "has 63 hexadecimal digits"),
    "another system's line end": ("pg:" + "ab" * 32 + "\r\n", "must be one line"),
    "no text": ("\xff\x00", "must be one line, pg:HEX"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_key_with_a_bad_content_is_refused(file: Path, folder: Path, kind: str) -> None:
    """One line with the path and the rule, and no part of a secret."""
    content, line = KEYS[kind]
    path = folder / "pg.key"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        check_tls(load(file))
    assert f"key = {path}: {line}" in caught.value.message
    assert caught.value.message.isprintable()
    assert "ab" * 8 not in caught.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_key_that_others_can_read_is_refused(
    file: Path, folder: Path, mode: int
) -> None:
    """It may be in other hands, so that a new one is the remedy."""
    make_key(load(file), force=False)
    (folder / "pg.key").chmod(mode)
    with pytest.raises(AccessError, match="other users may read or change") as caught:
        check_tls(load(file))
    assert "chmod 600" in caught.value.hint


def test_key_of_another_user_is_refused(file: Path, folder: Path) -> None:
    """That user can read it, whatever its mode; root's is taken by all."""
    support.requires(os.geteuid() == 0, "only root can give a file away")
    make_key(load(file), force=False)
    os.chown(folder / "pg.key", NOBODY, -1)
    with pytest.raises(AccessError, match="may read and change it") as caught:
        check_tls(load(file))
    assert f"chown root {folder / 'pg.key'}" in caught.value.hint


def test_key_that_is_missing_is_refused(file: Path, folder: Path) -> None:
    """The rest is shown all the same, and the hint says where a key comes from."""
    said = refusal(MissingError.exit_code, "nodes", "pg", "--node", "beta")
    assert "the file is not there" in said
    assert "nbd-mirror key pg --node beta" in said


def test_key_that_is_no_file_is_refused(file: Path, folder: Path) -> None:
    """A pipe without a writer is not waited for."""
    os.mkfifo(folder / "pg.key", 0o600)
    assert "is no plain file" in refusal(ConfigError.exit_code, "nodes", "pg")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate that signs itself, and its key."""
    support.requires_program("openssl")
    files = folder / f"{name}.pem", folder / f"{name}.key"
    words = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    words += ["-subj", f"/CN={name}", "-days", "2"]
    subprocess.run(
        ["openssl", "req", *words, "-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
        timeout=60,
    )
    files[1].chmod(0o600)
    return files


def test_certificates_are_checked_together(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    """The certificate, its private key, and the certificates that sign."""
    one, key = certificate(tmp_path, "one")
    other, other_key = certificate(tmp_path, "other")
    text, _, _ = file.read_text().partition("[tls]")

    def use(certificate: Path, private_key: Path, ca: Path) -> None:
        words = f'certificate = "{certificate}"\nprivate_key = "{private_key}"\n'
        file.write_text(f'{text}[tls]\n{words}ca = "{ca}"\n')

    use(one, key, other)
    assert check_tls(load(file)) == ""
    for error, words, names in (
        (ConfigError, "cannot be used", (one, other_key, other)),
        (ConfigError, f"ca = {key}: has no", (one, key, key)),
        (ConfigError, "cannot be used", (key, key, other)),
        (
            MissingError,
            f"ca = {tmp_path}/none.pem: ",
            (one, key, tmp_path / "none.pem"),
        ),
    ):
        use(*names)
        with pytest.raises(error) as caught:
            check_tls(load(file))
        assert words in caught.value.message
        assert caught.value.message.isprintable()
    use(one, key, other)
    key.chmod(0o644)
    with pytest.raises(AccessError, match="private_key = "):
        check_tls(load(file))


@pytest.mark.parametrize("name", ["ca", "certificate"])
def test_certificates_that_others_can_change_are_refused(
    file: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    """They could add their own to those that count; a reader is no danger."""
    one, key = certificate(tmp_path, "one")
    ca, _ = certificate(tmp_path, "ca")
    text, _, _ = file.read_text().partition("[tls]")
    three = f'certificate = "{one}"\nprivate_key = "{key}"\nca = "{ca}"\n'
    file.write_text(f"{text}[tls]\n{three}")
    path = {"ca": ca, "certificate": one}[name]
    for mode in (0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(AccessError, match=f"^{name} = .*may change") as caught:
            check_tls(load(file))
        assert f"chmod go-w {path}" in caught.value.hint
    path.chmod(0o644)
    assert check_tls(load(file)) == ""
    if os.geteuid() == 0:  # only root can give a file away
        os.chown(path, NOBODY, -1)
        with pytest.raises(AccessError, match=f"^{name} = .*may change") as caught:
            check_tls(load(file))
        assert f"chown root {path}" in caught.value.hint


def test_private_key_with_a_password_is_refused_at_once(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    """A server has nobody to ask for the password."""
    one, key = certificate(tmp_path, "one")
    locked = tmp_path / "locked.key"
    words = ["-in", str(key), "-out", str(locked), "-aes128", "-passout", "pass:secret"]
    subprocess.run(
        ["openssl", "ec", *words], check=True, capture_output=True, timeout=60
    )
    locked.chmod(0o600)
    text, _, _ = file.read_text().partition("[tls]")
    three = f'certificate = "{one}"\nprivate_key = "{locked}"\nca = "{one}"\n'
    file.write_text(f"{text}[tls]\n{three}")
    assert "cannot be used" in refusal(ConfigError.exit_code, "nodes", "pg")


# --- three nodes ---


def all_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Give each file below *folder*, with its size and the time of its last change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[path] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def three(file: Path, tmp_path: Path) -> Path:
    """Give the path of a file with three nodes; the disk and the state are there."""
    (tmp_path / "pg.img").write_bytes(bytes(1 << 20))
    (tmp_path / "state").mkdir()
    text = file.read_text().replace("/srv/pg.img", f"{tmp_path}/pg.img")
    text = text.replace("/srv/state", f"{tmp_path}/state")
    third = '[[node]]\nname = "gamma"\naddress = "10.0.0.3:10810"\n\n[tls]'
    file.write_text(text.replace("[tls]", third))
    return file


@pytest.mark.parametrize(
    "words",
    [
        ["create", "FILE"],
        ["create", "FILE", "--force"],
        ["serve", "FILE"],
        ["serve", "FILE", "--foreground"],
    ],
    ids=" ".join,
)
def test_three_nodes_are_refused_and_nothing_is_touched(
    three: Path, tmp_path: Path, words: list[str]
) -> None:
    """One line, one exit code, and what helps."""
    before = all_files(tmp_path)
    asked = [str(three) if word == "FILE" else word for word in words]
    said = refusal(UnsupportedError.exit_code, *asked, "--node", "beta")
    assert "volume pg has 3 [[node]] tables: this version serves two nodes" in said
    assert "try: two [[node]] tables" in said
    assert before == all_files(tmp_path)


def test_server_refuses_three_nodes(three: Path, processes: Processes) -> None:
    """Also one that is started without our command, by an operator's unit say."""
    done = processes.run(
        [sys.executable, "-P", "-m", "nbd_mirror.server", three],
        env={**os.environ, **serve._environment(None, "beta")},
        check=False,
    )
    assert done.returncode == UnsupportedError.exit_code, done.stderr
    assert "this version serves two nodes" in done.stderr


def test_host_that_is_no_node_can_say_which(file: Path, folder: Path) -> None:
    """Commands name the nodes there are; with the name they go on."""
    said = refusal(ConfigError.exit_code, "nodes", "pg", NBD_MIRROR_NODE="gamma")
    assert 'NBD_MIRROR_NODE: no node is called "gamma"; there are: alpha, beta' in said
    nbd_mirror("key", "pg")
    for node, other in (("alpha", "beta"), ("beta", "alpha")):
        done = nbd_mirror("nodes", "pg", "--node", node, NBD_MIRROR_NODE="gamma")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        (mine,) = (line for line in lines if "this host, by --node" in line)
        assert f"node {node}: " in mine
        assert f"node {other}: " in done.stdout


def test_nodes_shows_a_volume_without_any(tmp_path: Path) -> None:
    """A plain volume has one host and its remotes."""
    done = nbd_mirror("nodes", make_file(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "remote dr: nbd://h/x" in done.stdout
    assert "tls" not in done.stdout
