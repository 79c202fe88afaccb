# SPDX-License-Identifier: BSD-3-Clause
"""The listening socket: bound for the server, in use, stale, or by a name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import support
from unit.volumes import make_file

from nbd_mirror.base import unix
from nbd_mirror.base.errors import (
    BusyError,
    ConfigError,
    MissingError,
    NotRunningError,
)
from nbd_mirror.base.listen import Listen, parse_listen
from nbd_mirror.commands import listeners
from nbd_mirror.commands.listeners import Listeners, bind, bind_all
from nbd_mirror.device.handshake import Connection
from nbd_mirror.server import direct
from nbd_mirror.volume.config import VolumeConfig, load
from nbd_mirror.volume.loops import own_address

NOBODY = 65534
NO_HOSTS = ["a..b", "x" * 64, "fe80::1%\0", "fe80::1%" + "é" * 64]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_uri_of_a_path_with_a_space_is_one_clients_take() -> None:
    """%20, as URIs have it: libnbd takes a plus sign for a plus sign."""
    listen = parse_listen("unix:/run/my disk.sock")
    assert listen.uri == "nbd+unix:///?socket=/run/my%20disk.sock"


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("tls:10.0.0.1:10809", "nbds://10.0.0.1:10809"),
        ("tls:[::1]:10809", "nbds://[::1]:10809"),
        ("tls::10809", "nbds://localhost:10809"),
    ],
)
def test_tls_is_tcp_with_another_uri(text: str, uri: str) -> None:
    """An address with TLS is written as one without, and clients need nbds://."""
    listen = parse_listen(text)
    assert (listen.tls, listen.uri, str(listen)) == (True, uri, text)
    assert parse_listen(text.replace("tls:", "tcp:", 1)).tls is False


def test_bind_to_a_socket_in_use_is_refused_and_leaves_it(tmp_path: Path) -> None:
    """A living server keeps its socket."""
    listen = parse_listen(f"unix:{tmp_path}/s")
    with bind(listen):
        with pytest.raises(BusyError, match="socket in use"):
            bind(listen)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_bind_waits_a_moment_for_a_server_that_ends(tmp_path: Path, kind: str) -> None:
    """It keeps its socket until its last moment."""
    where = f"unix:{tmp_path}/s" if kind == "unix" else f"tcp:127.0.0.1:{_free_port()}"
    listen = parse_listen(where)
    ending = bind(listen)
    timer = threading.Timer(0.2, ending.close)
    timer.start()
    with bind(listen) as started:
        assert started.sockets
    timer.join()


def test_bind_replaces_a_stale_socket_with_mode_0600(tmp_path: Path) -> None:
    """A killed server's socket is replaced; only the owner may connect."""
    listen = parse_listen(f"unix:{tmp_path}/s")
    bind(listen).close()
    with bind(listen):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


BIND = """
import sys
from nbd_mirror.base.errors import AccessError
from nbd_mirror.base.listen import parse_listen
from nbd_mirror.commands.listeners import bind
try:
    bind(parse_listen(f"unix:{sys.argv[1]}"))
except AccessError as error:
    print(error, error.hint, sep="\\n")
"""


@pytest.mark.parametrize("mode", [0o600, 0o666], ids=oct)
def test_bind_says_whose_socket_is_in_the_way(mode: int) -> None:
    """One that this user may not ask, or, in a sticky folder, may not remove."""
    support.requires(os.geteuid() == 0, "only root becomes another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        path = Path(folder) / "s"
        bind(parse_listen(f"unix:{path}")).close()
        path.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-P", "-c", BIND, os.fspath(path)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.stderr == ""
        assert f"cannot listen on {path}: a socket of user root is" in done.stdout
        assert "choose another path for `listen`" in done.stdout
        assert path.is_socket()


def test_stale_socket_is_removed_only_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's owner puts a link to another one in its place, after the check."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    for one in (folder, other):
        one.mkdir()
    bind(parse_listen(f"unix:{folder}/passwd")).close()
    (other / "passwd").write_text("root")
    check = listeners._is_stale

    def check_and_swap(*args: Any) -> bool:
        stale = check(*args)
        folder.rename(tmp_path / "away")
        folder.symlink_to(other)
        return stale

    monkeypatch.setattr(listeners, "_is_stale", check_and_swap)
    listeners.remove_stale(folder / "passwd")
    assert (other / "passwd").read_text() == "root"
    assert not (tmp_path / "away" / "passwd").exists()


def test_socket_of_a_living_server_is_asked_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is a link, which leads to a dead socket whenever that is asked."""
    living, dead, link = tmp_path / "living", tmp_path / "dead", tmp_path / "link"
    for one in (living, dead):
        one.mkdir()
    bind(parse_listen(f"unix:{dead}/s")).close()
    link.symlink_to(living)
    ask = unix.answers

    def ask_elsewhere(*args: Any) -> bool:
        link.unlink()
        link.symlink_to(dead)
        answered = ask(*args)
        link.unlink()
        link.symlink_to(living)
        return answered

    monkeypatch.setattr(unix, "answers", ask_elsewhere)
    with bind(parse_listen(f"unix:{living}/s")):
        listeners.remove_stale(link / "s")
        assert (living / "s").is_socket()


def test_socket_of_a_living_server_is_left_without_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that cannot be looked up is no socket on which no server answers."""
    monkeypatch.setattr(unix, "FOLDERS", tmp_path / "proc")
    listen = parse_listen(f"unix:{tmp_path}/s")
    with bind(listen):
        with pytest.raises(BusyError, match="socket in use"):
            bind(listen)
        listeners.remove_stale(tmp_path / "s")
        assert (tmp_path / "s").is_socket()
    bind(listen).close()


def test_bind_over_a_file_is_refused_and_leaves_it(tmp_path: Path) -> None:
    """A path that holds data is never removed."""
    (tmp_path / "s").write_text("precious")
    with pytest.raises(BusyError, match="is no socket"):
        bind(parse_listen(f"unix:{tmp_path}/s"))
    assert (tmp_path / "s").read_text() == "precious"


def test_bind_without_the_folder_is_told(tmp_path: Path) -> None:
    """A missing folder is named."""
    with pytest.raises(MissingError, match="cannot listen on"):
        bind(parse_listen(f"unix:{tmp_path}/none/s"))


def test_bind_to_a_port_in_use_is_refused() -> None:
    """A TCP port in use is refused like a socket in use."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BusyError, match="socket in use"):
            bind(parse_listen(f"tcp:127.0.0.1:{port}"))


def test_bind_to_an_address_of_another_host_is_refused() -> None:
    """An address this host does not have is a wrong configuration."""
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind(parse_listen("tcp:192.0.2.1:10809"))


@pytest.mark.parametrize("host", NO_HOSTS)
def test_bind_to_a_name_that_can_be_none_is_refused(host: str) -> None:
    """The standard library has another error for those, and each is ours."""
    listen = Listen(host=host, port=10809)
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind(listen)
    assert own_address("nbd://127.0.0.1", listen) == ""


@pytest.mark.parametrize("host", NO_HOSTS)
def test_attach_to_a_name_that_can_be_none_is_refused(
    tmp_path: Path, host: str
) -> None:
    """There is no server at such an address."""
    listen = Listen(host=host, port=10809)
    volume = load(make_file(tmp_path)).model_copy(update={"listen": listen})
    with pytest.raises(NotRunningError, match="no server answers at"):
        Connection(volume)


def _families(listeners: Listeners) -> set[int]:
    return {int(sock.family) for sock in listeners.sockets}


@pytest.mark.parametrize("host", ["localhost", ""])
def test_bind_to_a_name_takes_all_its_addresses(host: str) -> None:
    """IPv4 and IPv6, as a client may try either first; and the URI leads there."""
    port = _free_port()
    listen = parse_listen(f"tcp:{host}:{port}")
    found = socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
    with bind(listen) as listeners:
        assert {socket.AF_INET} <= _families(listeners)
        assert {one[0] for one in found} <= _families(listeners)
        for _, _, _, _, (address, *_) in found:
            with socket.create_connection((str(address), port)):
                pass
        with pytest.raises(BusyError, match="socket in use"):
            bind(listen)
    assert listen.uri == f"nbd://localhost:{port}"
    with bind(listen):
        pass


def test_bind_to_all_of_ipv6_takes_ipv4_too() -> None:
    """One socket for both, whatever this host's default is."""
    port = _free_port()
    with bind(parse_listen(f"tcp:[::]:{port}")) as listeners:
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
    with bind(parse_listen(f"tcp:somewhere:{port}")) as listeners:
        assert [one.getsockname()[0] for one in listeners.sockets] == ["127.0.0.1"]


def test_bind_by_two_at_once_leaves_one_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they interleave, exactly one gets a stale socket's place."""
    monkeypatch.setattr(listeners, "BUSY_PATIENCE_S", 0)
    listen = parse_listen(f"unix:{tmp_path}/s")
    for _ in range(20):
        results: list[object] = []

        def attempt(results: list[object] = results) -> None:
            try:
                results.append(bind(listen))
            except BusyError as error:
                results.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sockets = [one for one in results if isinstance(one, Listeners)]
        assert len(sockets) == 1
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")
        sockets[0].close()


# --- a node ---


def node_volume(folder: Path, listen: str, address: str) -> VolumeConfig:
    """Read the file of two nodes, as on alpha."""
    (folder / "pg.toml").write_text(
        f'name = "pg"\nsize = "1MiB"\nlocal = "d"\nstate = "st"\ntls = "off"\n'
        f'listen = "{listen}"\n'
        f'[[node]]\nname = "alpha"\naddress = "{address}"\n'
        '[[node]]\nname = "beta"\naddress = "127.0.0.9:1"\n'
    )
    return load(folder / "pg.toml", "alpha")


def test_node_listens_for_clients_and_at_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is told by names which socket is which, whatever their number."""
    ports = _free_port(), _free_port()
    for listen, clients in (
        (f"unix:{tmp_path}/s", 1),
        (f"tcp:127.0.0.1:{ports[0]}", 1),
        (f"tcp::{ports[0]}", 2),
    ):
        volume = node_volume(tmp_path, listen, f"127.0.0.2:{ports[1]}")
        with bind_all(volume) as listeners:
            for name, value in listeners.environment().items():
                monkeypatch.setenv(name, value)
            names = direct.listening()
            assert names == ["clients"] * (len(names) - 1) + ["nodes"]
            assert len(names) <= clients + 1
            last = listeners.sockets[-1]
            assert last.getsockname() == ("127.0.0.2", ports[1])
    monkeypatch.delenv("LISTEN_FDNAMES")
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert direct.listening() == ["clients", "clients"]
    monkeypatch.setenv("LISTEN_FDNAMES", "pg.socket:nodes:other")
    assert direct.listening() == ["clients", "nodes"]


def test_address_of_another_host_is_one_clear_line(tmp_path: Path) -> None:
    """And the client's socket is free again."""
    volume = node_volume(tmp_path, f"unix:{tmp_path}/s", "192.0.2.1:10810")
    with pytest.raises(ConfigError) as caught:
        bind_all(volume)
    assert caught.value.message == (
        'cannot listen on the address of node "alpha", 192.0.2.1:10810: '
        "Cannot assign requested address"
    )
    assert "correct `address` of node alpha; or, if this host" in caught.value.hint
    with bind(volume.listen):
        pass


def test_address_in_use_is_told_apart_from_listen(tmp_path: Path) -> None:
    """The line names the address of the node."""
    port = _free_port()
    volume = node_volume(tmp_path, f"unix:{tmp_path}/s", f"127.0.0.1:{port}")
    with bind(parse_listen(f"tcp:127.0.0.1:{port}")), pytest.raises(BusyError) as busy:
        bind_all(volume)
    assert f'listens on the address of node "alpha", 127.0.0.1:{port}' in str(
        busy.value
    )


def test_addresses_of_listen_and_node_share_the_servers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names may stand for many addresses; too many are refused, and none is kept."""
    ports = _free_port(), _free_port()

    def many(host: str, port: int, **_: object) -> list[Any]:
        count = 12 if host == "many" else 5
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (f"127.0.0.{10 + i}", port)) for i in range(count)]

    volume = node_volume(tmp_path, f"tcp:many:{ports[0]}", f"some:{ports[1]}")
    monkeypatch.setattr(socket, "getaddrinfo", many)
    with pytest.raises(ConfigError, match="together stand for 17 addresses"):
        bind_all(volume)
    with bind(volume.listen):
        pass
