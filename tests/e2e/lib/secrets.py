# SPDX-License-Identifier: BSD-3-Clause
"""The files of TLS: shared keys, and certificates that certtool makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import support

__all__ = ["Place", "make_ca", "make_key", "sign", "sign_node"]


class Place(Protocol):
    """Where certtool works: a Site, or a Pair."""

    folder: Path
    processes: support.Processes


def make_key(path: Path, user: str, key: str) -> Path:
    """Write a file with one user's shared key, and return its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{user}:{key}\n")
    path.chmod(0o600)
    return path


def _certtool(site: Place, template: str, *words: str) -> None:
    path = site.folder / "template"
    path.write_text(template)
    site.processes.run(["certtool", "--template", str(path), *words])


def make_ca(site: Place, folder: Path) -> None:
    """Make the key and the certificate of a CA in *folder*."""
    folder.mkdir(exist_ok=True)
    key = str(folder / "ca-key.pem")
    site.processes.run(
        ["certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", key]
    )
    _certtool(
        site,
        "cn = CA\nca\ncertsigning_key\nexpiration_days = 2\n",
        *("--generate-self-signed", "--load-privkey", key),
        *("--outfile", str(folder / "ca-cert.pem")),
    )


def sign(
    site: Place, ca: Path, folder: Path, kind: str, *lines: str, purpose: str = ""
) -> None:
    """
    Make *kind*'s key and certificate in *folder*, signed by the CA in *ca*.

    Args:
        lines: of the template; one may be another common name.
        purpose: of the key, in the words of certtool; "": that of *kind*.
    """
    folder.mkdir(exist_ok=True)
    key = str(folder / f"{kind}-key.pem")
    site.processes.run(
        ["certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", key]
    )
    use = purpose or f"tls_www_{kind}"
    _certtool(
        site,
        # The first common name of a template counts.
        "\n".join((*lines, "cn = v", use, "signing_key", "encryption_key", "")),
        *("--generate-certificate", "--load-privkey", key),
        *("--load-ca-certificate", str(ca / "ca-cert.pem")),
        *("--load-ca-privkey", str(ca / "ca-key.pem")),
        *("--outfile", str(folder / f"{kind}-cert.pem")),
    )
    if ca != folder:
        shutil.copy(ca / "ca-cert.pem", folder / "ca-cert.pem")


def sign_node(
    site: Place,
    ca: Path,
    folder: Path,
    node: str,
    *lines: str,
    purpose: str = "tls_www_client\ntls_www_server",
) -> None:
    """Make *node*'s key and certificate in *folder*: NAME-key.pem, NAME-cert.pem."""
    sign(site, ca, folder, node, *lines, purpose=purpose)
    (folder / f"{node}-key.pem").chmod(0o600)
