# SPDX-License-Identifier: BSD-3-Clause
"""
`listen = "tls:HOST:PORT"` before the clients of others: libnbd's and qemu's.

Who gets in with a shared key and with certificates, and who does not. After each
refusal a client with the right secret is served.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import errors_of
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site, free_port
from e2e.lib.secrets import make_ca, make_key, sign

KEY = "5f" * 32
HOST = "127.0.0.1"


class Secured:
    """A volume that listens with TLS, and the secrets of its clients in *folder*."""

    def __init__(self, site: Site, port: int, folder: Path) -> None:
        self.site = site
        self.port = port
        self.folder = folder

    def uri(self, secret: str, *, user: str = "", host: str = HOST) -> str:
        """Return the URI for libnbd, with the parameter *secret*."""
        return f"nbds://{user and user + '@'}{host}:{self.port}/?{secret}"

    def info(self, uri: str, code: int = 0) -> str:
        """Run nbdinfo, which must end with that code; return what it said."""
        done = self.site.processes.run(["nbdinfo", "--size", uri], check=False)
        assert code == done.returncode, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    def refuses(self, uri: str, *words: str) -> None:
        """Fail unless a client gets nothing, and the server's log says why."""
        before = len(self.site.log)
        self.info(uri, 1)
        support.wait_until(
            lambda: all(word in self.site.log[before:] for word in words),
            f"the log to say {words}, not {self.site.log[before:]}",
        )


def _site(**keys: str) -> Iterator[Secured]:
    support.requires_program("certtool", "nbdinfo", "nbdcopy", "qemu-img")
    folder = Path(tempfile.mkdtemp(prefix="nbdm-"))
    (folder / "logs").mkdir()
    processes = support.Processes(folder / "logs")
    port = free_port()
    try:
        secrets = folder / "secrets"
        secrets.mkdir()
        paths = {f"tls.{key}": str(secrets / name) for key, name in keys.items()}
        site = Site(
            folder, processes, size=16 * MIB, listen=f"tls:{HOST}:{port}", **paths
        )
        make_key(secrets / "keys.psk", "v", KEY)
        _make_certificates(site, secrets)
        site.fill(site.local, 4 * MIB)
        site.bring_up("direct")
        yield Secured(site, port, secrets)
        site.stop()
        site.assert_equal()
    finally:
        processes.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def by_key() -> Iterator[Secured]:
    """Give a volume whose clients need its key."""
    yield from _site(key="keys.psk")


@pytest.fixture(scope="module")
def by_certificate() -> Iterator[Secured]:
    """Give a volume whose clients need a certificate."""
    yield from _site(
        certificate="server-cert.pem", private_key="server-key.pem", ca="ca-cert.pem"
    )


# --- secrets ---


def _make_certificates(site: Site, folder: Path) -> None:
    make_ca(site, folder)
    valid = "expiration_days = 2"
    sign(site, folder, folder, "server", valid, f"ip_address = {HOST}")
    sign(site, folder, folder, "client", valid)


# --- a shared key ---


def test_key_libnbd_and_qemu_are_served(by_key: Secured) -> None:
    """An image goes in by nbdcopy, and comes out by qemu-img the same."""
    site = by_key.site
    uri = by_key.uri(f"tls-psk-file={by_key.folder}/keys.psk", user="v")
    assert str(site.size) in by_key.info(uri)
    image, out = site.folder / "in.img", site.folder / "out.img"
    with image.open("wb") as file:
        file.truncate(site.size)
    site.fill(image, 9 * MIB, offset=3 * MIB, seed=5)
    site.processes.run(["nbdcopy", "--flush", str(image), uri])
    credentials = f"tls-creds-psk,id=t,dir={by_key.folder},username=v,endpoint=client"
    source = f"driver=nbd,host={HOST},port={by_key.port},tls-creds=t"
    site.processes.run(
        ["qemu-img", "convert", "--object", credentials, "--image-opts", source, out]
    )
    assert image.read_bytes() == out.read_bytes() == site.local.read_bytes()
    site.assert_equal()


def test_key_of_others_opens_nothing(by_key: Secured) -> None:
    """Another key, another name, certificates, and no TLS at all."""
    other = make_key(by_key.folder / "other" / "keys.psk", "v", "a0" * 32)
    named = make_key(by_key.folder / "named" / "keys.psk", "w", KEY)
    right = by_key.uri(f"tls-psk-file={by_key.folder}/keys.psk", user="v")
    words = "turned away: TLS: the other side has another key, or none"
    by_key.refuses(by_key.uri(f"tls-psk-file={other}", user="v"), words)
    by_key.refuses(by_key.uri(f"tls-psk-file={named}", user="w"), words)
    by_key.refuses(by_key.uri(f"tls-certificates={by_key.folder}"), "turned away: TLS")
    by_key.refuses(f"nbd://{HOST}:{by_key.port}")
    assert str(by_key.site.size) in by_key.info(right)


def test_key_that_is_removed_opens_no_new_connection(by_key: Secured) -> None:
    """A client that is connected stays; the next one is turned away."""
    nbd = pytest.importorskip("nbd")
    keys = by_key.folder / "keys.psk"
    mine = make_key(by_key.folder / "mine" / "keys.psk", "v", KEY)
    uri = by_key.uri(f"tls-psk-file={mine}", user="v")
    client = nbd.NBD()
    client.set_uri_allow_local_file(True)
    client.connect_uri(uri)
    try:
        make_key(keys, "v", "17" * 32)
        by_key.refuses(uri, "turned away: TLS: the other side has another key")
        assert len(client.pread(4096, 0)) == 4096
    finally:
        make_key(keys, "v", KEY)
        client.shutdown()
    by_key.info(uri)


def test_plain_client_learns_nothing(by_key: Secured) -> None:
    """Before TLS every option is refused, and the log is not filled."""
    with RawClient((HOST, by_key.port)) as client:
        client.hello()
        for number in (raw.OPT_LIST, raw.OPT_INFO, raw.OPT_GO, 99):
            assert errors_of(client.ask(number, raw.name_and_infos())) == [
                raw.REP_ERR_TLS_REQD
            ]
        assert errors_of(client.ask(raw.OPT_ABORT)) == [raw.REP_ACK]


# --- certificates ---


def test_certificate_libnbd_and_qemu_are_served(by_certificate: Secured) -> None:
    """Both check the server's certificate, and show theirs."""
    site, folder = by_certificate.site, by_certificate.folder
    uri = by_certificate.uri(f"tls-certificates={folder}")
    assert str(site.size) in by_certificate.info(uri)
    out = site.folder / "out.img"
    site.processes.run(["nbdcopy", uri, str(out)])
    assert out.read_bytes() == site.local.read_bytes()
    credentials = f"tls-creds-x509,id=t,dir={folder},endpoint=client,verify-peer=on"
    source = f"driver=nbd,host={HOST},port={by_certificate.port},tls-creds=t"
    site.processes.run(
        ["qemu-img", "convert", "--object", credentials, "--image-opts", source, out]
    )
    assert out.read_bytes() == site.local.read_bytes()


@pytest.mark.parametrize("purpose", ["tls_www_client\ntls_www_server", "# none"])
def test_certificate_with_other_purposes_too_is_served(
    by_certificate: Secured, purpose: str
) -> None:
    """A host that is server and client may have one; so may one without purposes."""
    site, ca = by_certificate.site, by_certificate.folder
    folder = Path(tempfile.mkdtemp(dir=ca))
    sign(site, ca, folder, "client", "expiration_days = 2", purpose=purpose)
    by_certificate.info(by_certificate.uri(f"tls-certificates={folder}"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "TLS: the other side has no certificate"),
        ("expired", "expired"),
        ("not yet", "not yet valid"),
        ("another CA's", "issuer is unknown"),
        ("a server's", "does not match the intended purpose"),
        ("a key alone", ""),
    ],
)
def test_certificate_that_is_wrong_opens_nothing(
    by_certificate: Secured, kind: str, words: str
) -> None:
    """
    The server's log says what is wrong with the client's certificate.

    A client that has only a key leaves by itself.
    """
    site, ca = by_certificate.site, by_certificate.folder
    folder = Path(tempfile.mkdtemp(dir=ca))
    secret = f"tls-certificates={folder}"
    if kind == "none":
        shutil.copy(ca / "ca-cert.pem", folder)
    elif kind == "expired":
        past = 'expiration_date = "2020-01-02 00:00:00"'
        begin = 'activation_date = "2020-01-01 00:00:00"'
        sign(site, ca, folder, "client", begin, past)
    elif kind == "not yet":
        far = 'activation_date = "2090-01-01 00:00:00"'
        end = 'expiration_date = "2091-01-01 00:00:00"'
        sign(site, ca, folder, "client", far, end)
    elif kind == "a server's":
        valid = "expiration_days = 2"
        sign(site, ca, folder, "client", valid, purpose="tls_www_server")
    elif kind == "another CA's":
        make_ca(site, folder / "other")
        sign(site, folder / "other", folder, "client", "expiration_days = 2")
        shutil.copy(ca / "ca-cert.pem", folder)  # it trusts our server
    else:
        secret = f"tls-psk-file={ca}/keys.psk"
    by_certificate.refuses(by_certificate.uri(secret, user="v"), words)
    by_certificate.info(by_certificate.uri(f"tls-certificates={ca}"))


# --- starts ---


def test_client_of_tls_before_a_plain_port_is_told(by_key: Secured) -> None:
    """It gets no connection without TLS in the place of one with it."""
    site, folder = by_key.site, by_key.folder
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="nbdm-") as name:
        plain = Site(Path(name), site.processes, listen=f"tcp:{HOST}:{port}")
        plain.bring_up("direct")
        uri = f"nbds://v@{HOST}:{port}/?tls-psk-file={folder}/keys.psk"
        assert "TLS" in by_key.info(uri, 1)
        by_key.info(f"nbd://{HOST}:{port}")
        plain.stop()


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        ("missing", 4, "the file is not there"),
        ("readable", 15, "other users may read or change it"),
        ("empty", 3, "must be one line"),
        ("python", 14, "the python door has no TLS"),
    ],
)
def test_serve_without_its_secret_is_refused(
    tmp_path: Path, processes: support.Processes, trouble: str, code: int, words: str
) -> None:
    """One line, and no server."""
    key = make_key(tmp_path / "v.key", "v", KEY)
    listen = f"tls:{HOST}:{free_port()}"
    keys = {"listen": listen, "tls.key": str(key)}
    site = Site(tmp_path, processes, size=MIB, **keys)
    site.create()
    if trouble == "missing":
        key.unlink()
    elif trouble == "readable":
        key.chmod(0o644)
    elif trouble == "empty":
        os.truncate(key, 0)
    door = ["--door", "python"] if trouble == "python" else []
    site.refused(code, words, commands=("serve", str(site.config), *door))


def test_serve_with_a_ca_that_others_may_change_is_refused(
    tmp_path: Path, processes: support.Processes
) -> None:
    """They could let themselves in."""
    support.requires_program("certtool")
    site = Site(
        tmp_path,
        processes,
        size=MIB,
        listen=f"tls:{HOST}:{free_port()}",
        **{
            "tls.certificate": str(tmp_path / "server-cert.pem"),
            "tls.private_key": str(tmp_path / "server-key.pem"),
            "tls.ca": str(tmp_path / "ca-cert.pem"),
        },
    )
    _make_certificates(site, tmp_path)
    site.create()
    (tmp_path / "ca-cert.pem").chmod(0o666)
    words = f"ca = {tmp_path}/ca-cert.pem: other users may change it"
    site.refused(15, words, commands=("serve", str(site.config)))
