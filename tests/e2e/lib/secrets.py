# SPDX-License-Identifier: BSD-3-Clause
"""The files of TLS: shared keys, and certificates that certtool makes."""

from __future__ import annotations

import shutil
from pathlib import Path

from e2e.lib.harness import Site

__all__ = ["make_ca", "make_key", "sign"]


def make_key(path: Path, user: str, key: str) -> Path:
    """Write a file with one user's shared key, and return its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{user}:{key}\n")
    path.chmod(0o600)
    return path


def _certtool(site: Site, template: str, *words: str) -> None:
    path = site.folder / "template"
    path.write_text(template)
    site.processes.run(["certtool", "--template", str(path), *words])


def make_ca(site: Site, folder: Path) -> None:
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
    site: Site, ca: Path, folder: Path, kind: str, *lines: str, purpose: str = ""
) -> None:
    """
    Make *kind*'s key and certificate in *folder*, signed by the CA in *ca*.

    Args:
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
        "\n".join(("cn = v", use, "signing_key", "encryption_key", *lines, "")),
        *("--generate-certificate", "--load-privkey", key),
        *("--load-ca-certificate", str(ca / "ca-cert.pem")),
        *("--load-ca-privkey", str(ca / "ca-key.pem")),
        *("--outfile", str(folder / f"{kind}-cert.pem")),
    )
    if ca != folder:
        shutil.copy(ca / "ca-cert.pem", folder / "ca-cert.pem")
