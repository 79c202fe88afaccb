# SPDX-License-Identifier: BSD-3-Clause
"""
The files by which the nodes of a volume know each other: a shared key, or certificates.

The key is a file as GnuTLS' psktool writes it: one line, NAME:HEX, where NAME is the
volume's. A key that other users can read or guess is refused, and so is a file with two
keys, because a server accepts each of them. Certificates are no secret, but they decide
which clients and nodes count, so no other user may change them.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

from ..base.errors import (
    AccessError,
    ConfigError,
    ExistsError,
    MirrorError,
    MissingError,
    from_errno,
)
from ..base.files import place_file, user_name
from ..base.hints import quote
from .config import VolumeConfig
from .model import TlsFiles
from .offline import load_core

__all__ = ["check_own_certificate", "check_tls", "make_key"]

KEY_BYTES = 32
_LEAST_BYTES, _MOST_BYTES = 16, 64
_MAX_FILE = 1 << 20


def check_tls(config: VolumeConfig) -> str:
    """
    Check the files of the [tls] table on this host.

    Returns:
        A key's fingerprint, which is the same on all nodes; "" without a key.
    Raises:
        MissingError: a file is not there. AccessError: it may not be read, or others
        may read a secret or change a certificate. ConfigError: it has another content.
    """
    tls = config.tls
    if tls is None or not tls.on:
        return ""
    if tls.key is not None:
        text = _read("key", tls.key, secret=True, hint=_COPY_KEY)
        return _fingerprint(_parse_key(config.name, tls.key, text))
    files = {
        name: getattr(tls, name) or "" for name in ("certificate", "private_key", "ca")
    }
    for name, path in files.items():
        _read(name, path, secret=name == "private_key")
    _check_certificates(**files)
    return ""


def check_own_certificate(config: VolumeConfig) -> str:
    """
    Check a node's certificate as the other nodes will: its purposes, names and issuer.

    Call it after `check_tls`.

    Returns:
        What to tell the user, or "". A time that is wrong stops no start: the node may
        have to serve all the same, and the host's clock may be the fault.
    Raises:
        AccessError: the other nodes will refuse it.
    """
    tls, own = config.tls, [one for one in config.nodes if one.name == config.node]
    if tls is None or tls.certificate is None or not own:
        return ""
    files = TlsFiles(None, tls.certificate, tls.private_key, tls.ca)
    try:
        late: str = load_core().check_certificate(files, own[0].names)
    except AccessError as error:
        raise AccessError(f"certificate = {error.message.strip()}", _NEEDS) from None
    if not late:
        return ""
    return (
        f"certificate = {late.strip()} The other nodes refuse it until it is renewed."
    )


_NEEDS = (
    "a certificate signed by `ca`, for servers and for clients, with the node's name "
    "or the host of its address as subjectAltName"
)
_COPY_KEY = (
    "copy the file from another node; or, on the first one, nbd-mirror key CONFIG"
)


def _read(name: str, path: str, *, secret: bool, hint: str = "") -> str:
    try:
        # A FIFO is opened without waiting for its other end, and then refused.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{name} = {path}: is no plain file")
            if secret:
                _check_secret(name, path, status)
            else:
                _check_trusted(name, path, status)
            return file.read(_MAX_FILE).decode("utf-8", "replace")
    except FileNotFoundError:
        raise MissingError(f"{name} = {path}: the file is not there", hint) from None
    except OSError as error:
        raise from_errno(
            error.errno or 0, f"{name} = {path}: {error.strerror}"
        ) from None


def _check_secret(name: str, path: str, status: os.stat_result) -> None:
    """Refuse one that others have: any reader could be this host."""
    if _is_foreign(status):
        raise AccessError(
            f"{name} = {path}: user {user_name(status.st_uid)} has it, and may "
            "read and change it, so it is no secret",
            f"chown {_us()} {quote(path)}, and a new one on all nodes if that "
            "user is not to have it",
        )
    if status.st_mode & 0o077:
        raise AccessError(
            f"{name} = {path}: other users may read or change it, so it is no secret",
            f"chmod 600 {quote(path)}, and a new one on all nodes if "
            "others can have read it",
        )


def _check_trusted(name: str, path: str, status: os.stat_result) -> None:
    """Refuse one that others change: by a CA of theirs they could be any node."""
    if _is_foreign(status):
        raise AccessError(
            f"{name} = {path}: user {user_name(status.st_uid)} has it, and may change "
            "it, and so choose which certificates count",
            f"check its content, then chown {_us()} {quote(path)}",
        )
    if status.st_mode & 0o022:
        raise AccessError(
            f"{name} = {path}: other users may change it, and so choose which "
            "certificates count",
            f"check its content, then chmod go-w {quote(path)}",
        )


def _is_foreign(status: os.stat_result) -> bool:
    return status.st_uid not in (0, os.geteuid())


def _us() -> str:
    return user_name(os.geteuid()).removeprefix("#")


def _parse_key(volume: str, path: str, text: str) -> bytes:
    """Return the key of a file's *text*."""
    match = re.fullmatch(r"([^:\n]+):([0-9A-Fa-f]+)\n?", text)
    if match is None:
        raise ConfigError(
            f"key = {path}: must be one line, {volume}:HEX, as `nbd-mirror key` and "
            "psktool write it"
        )
    name, digits = match.groups()
    if name != volume:
        raise ConfigError(f'key = {path}: is a key of "{name}", not of "{volume}"')
    if len(digits) % 2 or not _LEAST_BYTES <= len(digits) // 2 <= _MOST_BYTES:
        raise ConfigError(
            f"key = {path}: has {len(digits)} hexadecimal digits; it must be two a "
            f"byte, for {_LEAST_BYTES} to {_MOST_BYTES} bytes"
        )
    return bytes.fromhex(digits)


def _fingerprint(key: bytes) -> str:
    """Return what tells two keys apart and does not help to guess one."""
    return hashlib.sha256(b"nbd-mirror key fingerprint\n" + key).hexdigest()[:16]


def _check_certificates(certificate: str, private_key: str, ca: str) -> None:
    """Check that TLS can use the files; a peer checks who signed them."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without the password the library would ask the terminal for one.
        context.load_cert_chain(certificate, private_key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"certificate = {certificate} and private_key = {private_key}: cannot be "
            f"used: {_why(error)}"
        ) from None
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"ca = {ca}: has no certificate: {_why(error)}") from None


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else "no certificate in it"


def make_key(config: VolumeConfig, *, force: bool) -> str:
    """
    Make the nodes' shared secret.

    The file appears with its whole content or not at all, and only its owner may ever
    open it.

    Args:
        force: replace the key that is there.
    Returns:
        The fingerprint of the new key.
    Raises:
        ConfigError: the volume uses no key. ExistsError: there is one.
    """
    path = _key_path(config)
    key = secrets.token_bytes(KEY_BYTES)
    try:
        place_file(path, f"{config.name}:{key.hex()}\n".encode(), force=force)
    except FileExistsError:
        raise ExistsError(
            f"{path} is there already: a new key would shut out the nodes that have "
            "this one",
            "nbd-mirror key CONFIG --force, then copy it to all nodes",
        ) from None
    except FileNotFoundError:
        folder = quote(os.fspath(path.parent))
        raise MissingError(
            f"the folder of {path} is not there", f"mkdir -p {folder}"
        ) from None
    except OSError as error:
        raise _cannot_write(path, error) from None
    return _fingerprint(key)


def _key_path(config: VolumeConfig) -> Path:
    tls = config.tls
    if tls is not None and tls.key is not None:
        return Path(tls.key)
    why = "has no [tls] table that says where its key is"
    if tls is not None:
        why = 'has tls = "off": its nodes need no key'
    if tls is not None and tls.on:
        why = "uses certificates, which nbd-mirror does not make"
    raise ConfigError(f"volume {config.name} {why}")


def _cannot_write(path: Path, error: OSError) -> MirrorError:
    return from_errno(
        error.errno or 0, f"the key {path} cannot be written: {error.strerror}"
    )
