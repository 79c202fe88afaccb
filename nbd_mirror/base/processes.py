# SPDX-License-Identifier: BSD-3-Clause
"""What the kernel says of a process, which may be another user's."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from pathlib import Path

__all__ = ["START_TIME", "STATE", "real_user", "stat_fields", "tcp_listener"]

STATE, START_TIME = 0, 19  # fields, counted from the one behind the name
_LISTENS = "0A"  # TCP_LISTEN, in /proc/net/tcp
_LOCAL, _TCP_STATE, _INODE = 1, 3, 9  # fields of it


def stat_fields(pid: int) -> list[str]:
    """
    Return the fields of /proc/PID/stat behind the process's name.

    A process gives itself a name of any bytes, so it is cut off before they are read.

    Raises:
        OSError: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat.rpartition(b")")[2].decode().split()


def real_user(pid: int) -> int:
    """
    Return the user that started a process.

    Not the owner of its folder in /proc, which is root once the process hides its
    memory: any may do so.

    Raises:
        OSError: there is no such process.
    """
    lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
    return int(next(line for line in lines if line.startswith(b"Uid:")).split()[1])


def tcp_listener(host: str, port: int) -> int:
    """
    Return the process that listens at an address of this host.

    0: none, or it is another user's, or of another namespace. The kernel names only the
    number of the socket, so the processes are searched for it.
    """
    host = host.partition("%")[0]
    links = {f"socket:[{inode}]" for inode in _listening_sockets(host, port)}
    for process in Path("/proc").iterdir() if links else ():
        if process.name.isdecimal() and _has_link(process, links):
            return int(process.name)
    return 0


def _listening_sockets(host: str, port: int) -> set[str]:
    """Return the inodes of the sockets that listen there, or at every address."""
    wanted = ipaddress.ip_address(host)
    mapped = getattr(wanted, "ipv4_mapped", None)
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, number = fields[_LOCAL].partition(":")
                at = _address(address)
                if (
                    fields[_TCP_STATE] == _LISTENS
                    and int(number, 16) == port
                    and (at in {wanted, mapped} or at.is_unspecified)
                ):
                    found.add(fields[_INODE])
    return found


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address as the kernel prints it: words in this host's byte order."""
    words = (text[i : i + 8] for i in range(0, len(text), 8))
    data = b"".join(socket.htonl(int(word, 16)).to_bytes(4, "big") for word in words)
    return ipaddress.ip_address(data)


def _has_link(process: Path, links: set[str]) -> bool:
    with contextlib.suppress(OSError):  # another user's, or it has ended
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(fd.readlink()) in links:
                    return True
    return False
