# SPDX-License-Identifier: BSD-3-Clause
"""
The kernel of the virtual machine: Debian's, and what boots it.

The package is only downloaded and unpacked, into .cache/kernel, never installed. The
image in it is compressed, and an emulated CPU takes seconds to unpack it, so that is
done here, once: qemu starts the ELF file inside by its PVH entry. The initial RAM disk
holds busybox, the modules that lead to the host's root, and a script that mounts it.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import shlex
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support import ROOT, requires

__all__ = ["Kernel", "initial_disk", "kernel", "unpacked"]

CACHE = ROOT / ".cache" / "kernel"
# Depends on the package of the kernel that Debian has now.
META_PACKAGE = "linux-image-amd64"
BUSYBOX = Path("/bin/busybox")
# Where the header of a compressed image says what is in it: the kernel's
# Documentation/arch/x86/boot.rst.
SETUP_SECTORS = 0x1F1
PAYLOAD = struct.Struct("<II")  # offset behind the set-up code, length
PAYLOAD_AT = 0x248
XZ_MAGIC = b"\xfd7zXZ\0"


class Kernel(NamedTuple):
    """An *image* to boot, and the folder that `modprobe -d` takes its modules from."""

    image: Path
    folder: Path
    version: str


def run_tool(
    *command: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool that should take seconds, and return its output."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return subprocess.run(
        command,
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path},
    )


@contextmanager
def cache_lock() -> Iterator[None]:
    """Let one at a time into the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel_package() -> str:
    """Return the name of Debian's current kernel package, or skip the test."""
    listed = run_tool("apt-cache", "depends", META_PACKAGE).stdout.split()
    names = [word for word in listed if word.startswith("linux-image-")]
    names = [name for name in names if name != META_PACKAGE]
    requires(bool(names), f"apt knows no {META_PACKAGE} (apt-get update?)")
    return names[0]


def fetch(package: str) -> None:
    """Download and unpack *package* into the cache; skip the test if apt cannot."""
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        done = run_tool("apt-get", "-q", "download", package, cwd=folder)
        files = list(folder.glob("*.deb"))
        words = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        requires(bool(files), f"apt-get download {package}: {' '.join(words)[:200]}")
        unpacked = folder / "unpacked"
        run_tool("dpkg-deb", "-x", str(files[0]), str(unpacked)).check_returncode()
        # Renamed when whole: a broken-off download must not be used next time.
        unpacked.rename(CACHE / package)


def unpacked(package: str) -> Path:
    """
    Return the folder with what *package* of Debian's holds, fetched once.

    For programs that only the guest needs: nothing is installed, so no service is
    started here and no configuration written.
    """
    with cache_lock():
        if not (CACHE / package).exists():
            fetch(package)
    return CACHE / package


def replace(path: Path, content: bytes) -> None:
    """Put a file in place when it is whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def decompress(image: bytes) -> bytes:
    """Return the ELF file in a kernel image that xz made, or *image* as it is."""
    begin = (image[SETUP_SECTORS] + 1) * 512
    offset, length = PAYLOAD.unpack_from(image, PAYLOAD_AT)
    payload = image[begin + offset : begin + offset + length]
    if not payload.startswith(XZ_MAGIC):
        return image  # another compression: it boots as well, some seconds later
    return lzma.LZMADecompressor().decompress(payload)


def kernel() -> Kernel:
    """
    Return the kernel to boot, fetched once for every checkout.

    An older one that is cached is good enough: the test is of the mirror.
    """
    with cache_lock():
        images = sorted(CACHE.glob("linux-image-*/boot/vmlinuz-*"))
        if not images:
            fetch(kernel_package())
            images = sorted(CACHE.glob("linux-image-*/boot/vmlinuz-*"))
        version = images[-1].name.removeprefix("vmlinuz-")
        folder = images[-1].parents[1]
        plain = images[-1].with_name(f"vmlinux-{version}")
        if not plain.exists():
            replace(plain, decompress(images[-1].read_bytes()))
        if not (folder / "lib" / "modules" / version / "modules.dep").exists():
            done = run_tool("depmod", "-b", str(folder), version)
            assert done.returncode == 0, done.stderr
    return Kernel(plain, folder, version)


# --- the initial RAM disk ------------------------------------------------


def files_of(kernel: Kernel, modules: Sequence[str]) -> list[Path]:
    """Return the files of modules and of what they need, in the order to load them."""
    found: list[Path] = []
    for module in modules:
        words = ("-d", str(kernel.folder), "-S", kernel.version, "--show-depends")
        done = run_tool("modprobe", *words, module)
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            how, _, path = line.strip().partition(" ")
            if how == "insmod" and Path(path) not in found:
                found.append(Path(path))
    return found


def entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    """Return one file of a cpio archive, as the kernel unpacks it."""
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields)
    head += name.encode() + b"\0"
    parts = (head, content)
    return b"".join(part + b"\0" * (-len(part) % 4) for part in parts)


def initial_disk(kernel: Kernel, modules: Sequence[str], then: str) -> bytes:
    """
    Return an initial RAM disk: it loads *modules*, and does what *then* says.

    Args:
        kernel: the kernel.
        modules: of it, that *then* needs.
        then: lines for busybox's shell. It is the first process, and must not end.
    """
    paths = files_of(kernel, modules)
    script = ["#!/bin/busybox sh", "export PATH=/bin"]
    script += ["/bin/busybox --install -s /bin"]
    script += [f"insmod /{shlex.quote(path.name)}" for path in paths]
    files = {
        "init": "\n".join([*script, then]).encode(),
        "bin/busybox": BUSYBOX.resolve().read_bytes(),
        **{path.name: path.read_bytes() for path in paths},
    }
    parts = [
        entry(number, name, stat.S_IFDIR | 0o755, b"")
        for number, name in enumerate(("bin", "dev", "proc", "sys", "run", "root"), 1)
    ]
    parts += [
        entry(number, name, stat.S_IFREG | 0o755, content)
        for number, (name, content) in enumerate(files.items(), len(parts) + 1)
    ]
    return b"".join([*parts, entry(0, "TRAILER!!!", 0, b"")])
