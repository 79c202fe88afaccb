# SPDX-License-Identifier: BSD-3-Clause
"""
`nbds://` remotes, served by nbdkit: the right secrets, and the others.

A remote whose server cannot prove itself is not connected, and its reason says why:
whatever answers at its address gets no byte of the disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB, Site, free_port
from e2e.lib.secrets import make_ca, make_key, sign

KEY = "5f" * 32
HOST = "127.0.0.1"
VALID = "expiration_days = 2"
# What GnuTLS in a server without TLS 1.3 may use.
NO_TLS13 = "[overrides]\ndisabled-version = tls1.3\n"


def _by_key(site: Site, folder: Path, user: str = "v") -> None:
    """Have the remote's URI name the key in *folder*."""
    dr = site.dr
    dr.uri = (
        f"nbds+unix://{user}@/disk?socket={dr.socket}&tls-psk-file={folder}/keys.psk"
    )
    site.write_config()


def _serve_by_key(site: Site, folder: Path) -> None:
    site.dr.start("--tls=require", f"--tls-psk={folder}/keys.psk")


def _begin(site: Site) -> None:
    site.create()
    site.serve()


def _assert_not_connected(site: Site, *words: str) -> None:
    """Fail unless the remote's reason says so, and its image is as it was."""
    _begin(site)
    site.wait_remote(
        lambda one: any(word in one["reason"] for word in words),
        f"a reason with {words}",
    )
    assert site.remote()["state"] == "out_of_sync"
    assert site.dr.image.read_bytes() == bytes(site.size)
    site.stop()


@pytest.fixture
def site(tmp_path: Path, processes: support.Processes) -> Site:
    """Give a volume with data, and a remote whose image is empty."""
    support.requires_program("certtool")
    found = Site(tmp_path, processes, size=8 * MIB)
    found.fill(found.local, 4 * MIB)
    return found


def test_key_the_remote_is_mirrored_to_and_comes_back(site: Site) -> None:
    """Through a load, the loss of the server, and its return."""
    folder = site.folder / "keys"
    make_key(folder / "keys.psk", "v", KEY)
    _by_key(site, folder)
    _serve_by_key(site, folder)
    _begin(site)
    site.wait_in_sync()
    load = site.load()
    load.wait_for(200)
    site.dr.kill()
    site.wait_state("out_of_sync")
    _serve_by_key(site, folder)
    site.wait_in_sync()
    load.stop()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("kind", ["another key", "another user", "no TLS", "TLS 1.2"])
def test_key_that_is_wrong_connects_nothing(site: Site, kind: str) -> None:
    """Neither does a server that has no TLS, or an old one."""
    mine, theirs = site.folder / "mine", site.folder / "theirs"
    make_key(mine / "keys.psk", "v", KEY)
    make_key(theirs / "keys.psk", "v", "a0" * 32 if kind == "another key" else KEY)
    words = ["TLS"]
    if kind == "another user":
        _by_key(site, mine, "w")
        words = ["it has no key of w"]
    else:
        _by_key(site, mine)
    if kind == "no TLS":
        site.dr.start("--tls=off")
        words = ["the server offers no TLS"]
    elif kind == "TLS 1.2":
        file = site.folder / "priority"
        file.write_text(NO_TLS13)
        _start_old(site, theirs, file)
    else:
        _serve_by_key(site, theirs)
    _assert_not_connected(site, *words)


def _start_old(site: Site, folder: Path, priority: Path) -> None:
    site.processes.start(
        [
            *("nbdkit", "-f", "-U", str(site.dr.socket), "--tls=require"),
            *(f"--tls-psk={folder}/keys.psk", "file", str(site.dr.image)),
        ],
        env={"GNUTLS_SYSTEM_PRIORITY_FILE": str(priority)},
    )
    support.wait_until(site.dr.answers, "nbdkit to listen")


def test_key_that_others_may_read_is_refused(site: Site) -> None:
    """The reason names the file, and what to do."""
    folder = site.folder / "keys"
    make_key(folder / "keys.psk", "v", KEY).chmod(0o644)
    _by_key(site, folder)
    site.dr.start("--tls=off")
    _assert_not_connected(site, "other users may read this secret")


# --- certificates ---


def _serve_by_certificate(site: Site, folder: Path, *options: str) -> None:
    """Have nbdkit listen on TCP, as only there a name is checked."""
    port = free_port()
    site.processes.start(
        [
            *("nbdkit", "-f", "-i", HOST, "-p", str(port), "--tls=require"),
            *(f"--tls-certificates={folder}", *options),
            *("file", str(site.dr.image)),
        ]
    )
    site.dr.uri = f"nbds://{HOST}:{port}/?tls-certificates={site.folder}/mine"
    site.write_config()


def test_certificate_of_both_sides_is_checked(site: Site) -> None:
    """The server's by its name, and ours if the server asks for one."""
    ca, mine = site.folder / "ca", site.folder / "mine"
    make_ca(site, ca)
    sign(site, ca, site.folder / "theirs", "server", VALID, f"ip_address = {HOST}")
    sign(site, ca, mine, "client", VALID)
    _serve_by_certificate(site, site.folder / "theirs", "--tls-verify-peer")
    _begin(site)
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem"])
def test_certificates_that_others_may_change_are_refused(site: Site, name: str) -> None:
    """A user that can add a CA there could be the remote."""
    ca, mine = site.folder / "ca", site.folder / "mine"
    make_ca(site, ca)
    sign(site, ca, site.folder / "theirs", "server", VALID, f"ip_address = {HOST}")
    sign(site, ca, mine, "client", VALID)
    (mine / name).chmod(0o664)
    _serve_by_certificate(site, site.folder / "theirs")
    _assert_not_connected(site, f"{name}: other users may change this file")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("another name", "name in the certificate does not match"),
        ("another CA's", "issuer is unknown"),
        ("expired", "expired"),
        ("a client's", "does not match the intended purpose"),
        ("none of ours", "certificate"),
    ],
)
def test_certificate_that_is_wrong_connects_nothing(
    site: Site, kind: str, words: str
) -> None:
    """Whatever answers there without the right certificate gets no byte."""
    ca, mine, theirs = (site.folder / name for name in ("ca", "mine", "theirs"))
    make_ca(site, ca)
    sign(site, ca, mine, "client", VALID)
    lines = [VALID, f"ip_address = {HOST}"]
    if kind == "another name":
        lines = [VALID, "ip_address = 127.0.0.9", "dns_name = elsewhere"]
    elif kind == "expired":
        lines = [
            'activation_date = "2020-01-01 00:00:00"',
            'expiration_date = "2020-01-02 00:00:00"',
            f"ip_address = {HOST}",
        ]
    elif kind == "another CA's":
        make_ca(site, site.folder / "other")
        ca = site.folder / "other"
    elif kind == "none of ours":
        (mine / "client-cert.pem").unlink()
    purpose = "tls_www_client" if kind == "a client's" else ""
    sign(site, ca, theirs, "server", *lines, purpose=purpose)
    _serve_by_certificate(site, theirs, "--tls-verify-peer")
    _assert_not_connected(site, words)


def test_certificate_of_any_host_is_not_enough_on_a_unix_socket(site: Site) -> None:
    """The CAs that this host trusts sign every name, and there is none to check."""
    theirs = site.folder / "theirs"
    make_ca(site, site.folder / "ca")
    sign(site, site.folder / "ca", theirs, "server", VALID)
    site.dr.start("--tls=require", f"--tls-certificates={theirs}")
    site.dr.uri = f"nbds+unix:///disk?socket={site.dr.socket}"
    site.write_config()
    _assert_not_connected(site, "the URI must name a folder: tls-certificates=")
