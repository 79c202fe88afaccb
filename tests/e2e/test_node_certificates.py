# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes that know each other by certificates: which ones count, and until when.

A node reads its files for each connection. So a wrong certificate is put in the place
of a right one while its node runs: the node's own check at the start cannot hide what
the other node does with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.pair import Node, Pair
from e2e.lib.secrets import make_ca, make_key, sign_node

from nbd_mirror.base.errors import AccessError, MirrorError, MissingError
from nbd_mirror.server.node_others import node_uri
from nbd_mirror.volume import core
from nbd_mirror.volume import node_wire as wire
from nbd_mirror.volume.config import load
from nbd_mirror.volume.tls_files import check_own_certificate, check_tls

PAST = (
    'activation_date = "2020-01-01 00:00:00 UTC"',
    'expiration_date = "2020-01-02 00:00:00 UTC"',
)


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give a pair with right certificates: one of a name, one of an address."""
    pair = Pair(run_dir, processes, certificates=True)
    ca = run_dir / "ca"
    make_ca(pair, ca)
    for node in pair.nodes:
        renew(pair, node)
    return pair


def renew(pair: Pair, node: Node) -> None:
    """Give *node* a right certificate."""
    names = {"alpha": "dns_name = alpha", "beta": "ip_address = 127.0.0.1"}
    sign_node(pair, pair.folder / "ca", node.tls_folder, node.name, names[node.name])


def wrong_ca(pair: Pair, node: Node) -> None:
    """Have it signed by a CA that no node knows; its own `ca` stays the right one."""
    other = pair.folder / "other-ca"
    make_ca(pair, other)
    sign_node(pair, other, node.tls_folder, node.name, "dns_name = beta")
    shutil.copy(pair.folder / "ca/ca-cert.pem", node.tls_folder / "ca-cert.pem")


def signed(*lines: str, purpose: str = "") -> Callable[[Pair, Node], None]:
    """Give a function that has the right CA sign something else."""

    def sign(pair: Pair, node: Node) -> None:
        words = {"purpose": purpose} if purpose else {}
        ca = pair.folder / "ca"
        sign_node(pair, ca, node.tls_folder, node.name, *lines, **words)

    return sign


def removed(_: Pair, node: Node) -> None:
    """Leave it without a certificate."""
    (node.tls_folder / f"{node.name}-cert.pem").unlink()


CLIENT, SERVER = "tls_www_client", "tls_www_server"
# What is wrong with beta's certificate; what alpha says when it calls beta, and beta
# when it calls alpha, "" if the call succeeds; and what beta's own start says.
WRONG = {
    "another CA": (wrong_ca, "certificate is NOT trusted", "", "issuer is unknown"),
    "expired": (signed("dns_name = beta", *PAST), "expired", "", "uses expired"),
    "no server": (
        signed("dns_name = beta", purpose=CLIENT),
        "certificate is NOT trusted",
        None,
        "as a server's certificate",
    ),
    "no client": (
        signed("dns_name = beta", purpose=SERVER),
        None,
        "",
        "as a client's certificate",
    ),
    "another name": (
        signed("dns_name = gamma", "ip_address = 127.0.0.2"),
        "not of node beta: its names are: gamma, an address",
        "its certificate is not of beta: the certificate's names: gamma",
        "it has not the name beta, nor the address 127.0.0.1; its names are: gamma",
    ),
    "any name": (
        signed("dns_name = *"),
        "not of node beta: its names are: *",
        "its certificate is not of beta",
        "it has not the name beta",
    ),
    "a common name alone": (
        signed("cn = beta"),
        "not of node beta: its names are: none",
        "its certificate is not of beta",
        "it has not the name beta",
    ),
    "none": (removed, "the other side left", "beta-cert.pem", "the file is not there"),
}


def meet(caller: Node, called: Node) -> str:
    """Call *called* with the files of *caller*; return why it fails, or ""."""
    config = load(caller.config, caller.name)
    call = wire.Message(
        v=wire.VERSIONS,
        volume="pg",
        sender=caller.name,
        id="0" * 32,
        to=called.name,
        body=wire.Consent(epoch=0),
    )
    uri = node_uri(config, called.name, "pg.meta")
    try:
        answer = wire.decode_answer(core.call(uri, wire.encode(call), 10.0))
    except MirrorError as error:
        return str(error)
    return answer.why if "certificate" in answer.why else ""


def own_check(node: Node) -> str:
    """Return what the node's start says of its own files, or ""."""
    config = load(node.config, node.name)
    try:
        check_tls(config)
        return check_own_certificate(config)
    except MirrorError as error:
        return str(error)


def test_which_certificates_count(pair: Pair) -> None:
    """Each is put in the place of a right one while its node runs, and then renewed."""
    pair.set_up()
    alpha, beta = pair.nodes
    for spoil, by_alpha, by_beta, at_start in WRONG.values():
        spoil(pair, beta)
        said = meet(alpha, beta)
        assert (by_alpha in said and said) if by_alpha is not None else not said, said
        said = meet(beta, alpha)
        assert (by_beta in said and said) if by_beta is not None else not said, said
        assert at_start in own_check(beta)
        renew(pair, beta)
        for one, other in ((alpha, beta), (beta, alpha)):
            assert meet(one, other) == "", own_check(beta)
            assert own_check(one) == ""


def test_wrong_certificate_is_refused_at_a_start(pair: Pair) -> None:
    """One line each; an expired one is only a warning, for the clock may be wrong."""
    beta = pair.beta
    beta.cli("create")
    signed("dns_name = gamma")(pair, beta)
    for word in ("nodes", "serve"):
        said = beta.refused(AccessError.exit_code, word)
        assert "the other nodes refuse it" in said
        assert "a certificate signed by `ca`, for servers and for clients" in said
    removed(pair, beta)
    beta.refused(MissingError.exit_code, "serve")
    signed("dns_name = beta", *PAST)(pair, beta)
    beta.serve()
    said = "warning: certificate = "
    assert said in beta.log
    assert said in beta.cli("nodes").stderr


def test_status_says_why_and_a_renewed_certificate_counts(pair: Pair) -> None:
    """A primary that starts again waits for a node that it cannot trust."""
    pair.bring_up()
    signed("dns_name = gamma")(pair, pair.beta)
    pair.alpha.kill()
    pair.alpha.serve()
    pair.alpha.wait_node(
        lambda node: "is not of node beta: its names are: gamma" in node["why"],
        "alpha to say why it waits",
    )
    renew(pair, pair.beta)
    pair.alpha.wait_node(lambda node: node["role"] == "primary", "alpha to resume")
    pair.alpha.wait_in_sync()


def test_ca_is_removed(pair: Pair) -> None:
    """Alpha trusts another CA from now on, without a restart: beta is out."""
    pair.set_up()
    make_ca(pair, pair.folder / "other-ca")
    assert meet(pair.beta, pair.alpha) == ""
    trusted = pair.alpha.tls_folder / "ca-cert.pem"
    shutil.copy(pair.folder / "other-ca/ca-cert.pem", trusted)
    for one, other in (pair.nodes, pair.nodes[::-1]):
        assert "TLS" in meet(one, other)
    trusted.write_text("no certificate")
    assert "TLS" in meet(pair.beta, pair.alpha)
    support.wait_until(
        lambda: f"turned away: TLS: {trusted}" in pair.alpha.log, "alpha to say so"
    )
    shutil.copy(pair.folder / "ca/ca-cert.pem", trusted)
    assert meet(pair.beta, pair.alpha) == ""


def test_key_against_certificate(pair: Pair) -> None:
    """Neither gets in, and both say that TLS is why."""
    for node in pair.nodes:
        node.cli("create")
    key = make_key(pair.folder / "keys/pg.key", "pg", "5f" * 32)
    text, _, _ = pair.beta.config.read_text().partition("[tls]")
    pair.beta.config.write_text(f'{text}[tls]\nkey = "{key}"\n')
    for node in pair.nodes:
        node.serve()
    for one, other in (pair.nodes, pair.nodes[::-1]):
        assert "TLS" in meet(one, other)
        one.wait_node(lambda said: "TLS" in json.dumps(said), f"{one.name} to say it")


def test_host_of_the_ca_is_no_node(pair: Pair) -> None:
    """A client's certificate of the same CA makes no call, in any node's name."""
    pair.set_up()
    ca, folder = pair.folder / "ca", pair.folder / "client.tls"
    sign_node(pair, ca, folder, "client", "dns_name = client")
    words = f"tls-certificate-file={folder}/client-cert.pem&tls-name=beta"
    words += f"&tls-key-file={folder}/client-key.pem&tls-ca-file={folder}/ca-cert.pem"

    def uri(export: str) -> str:
        return f"nbds://{pair.beta.address}/{export}?{words}"

    call = wire.Message(
        v=wire.VERSIONS,
        volume="pg",
        sender="alpha",
        id="0" * 32,
        to="beta",
        body=wire.Consent(epoch=9),
    )
    answer = wire.decode_answer(core.call(uri("pg.meta"), wire.encode(call), 10.0))
    assert not answer.ok
    assert "its certificate is not of alpha" in answer.why
    assert "the certificate's names: client" in answer.why
    for export in ("pg.dirty", f"pg@99.alpha.1.{'a' * 32}"):
        with pytest.raises(MirrorError, match="its certificate is not of alpha"):
            core.fetch(uri(export), 32, 10.0)
    assert pair.beta.node()["epoch"] == 0


def test_failover_by_certificates(pair: Pair) -> None:
    """Lost, forced, back, and switched over: all over X.509."""
    alpha, beta = pair.nodes
    pair.bring_up()
    content = os.urandom(MIB)
    client = alpha.client()
    client.pwrite(content, MIB)
    client.flush()
    client.shutdown()
    alpha.kill()
    beta.cli("promote", "--force")
    client = beta.client()
    assert content == client.pread(MIB, MIB)
    client.pwrite(content, 4 * MIB)
    client.flush()
    client.shutdown()
    alpha.serve()
    alpha.wait_in_sync()
    beta.cli("switchover")
    client = alpha.client()
    assert content == client.pread(MIB, 4 * MIB)
    client.shutdown()
    beta.wait_in_sync()
    for node in pair.nodes:
        node.stop()
    pair.assert_equal()
