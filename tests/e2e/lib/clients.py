# SPDX-License-Identifier: BSD-3-Clause
"""
Clients of a volume: libnbd handles, a load that remembers, and images to compare.

The load is what makes an outage test worth something: it knows for every block the
last content that was answered and the one under way, so that after any crash each
block can be judged. Blocks belong to one thread each: no other's write excuses a
wrong content.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import support

from nbd_mirror.volume.mapview import open_map

__all__ = [
    "Load",
    "checksum",
    "connect",
    "differing_regions",
    "dirty_set",
    "error_of",
    "nbd",
    "regions_of",
]

DIST_PACKAGES = "/usr/lib/python3/dist-packages"


def _import_from(name: str, folder: str) -> ModuleType:
    """Import one module of Debian's, without making all the others importable."""
    spec = importlib.machinery.PathFinder.find_spec(name, [folder])
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}: python3-libnbd is not installed (scripts/setup)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_import_from("libnbdmod", DIST_PACKAGES)
# The module is known only at run time: Any, not ModuleType.
nbd: Any = _import_from("nbd", DIST_PACKAGES)


def connect(uri: str, *, strict: bool = True) -> Any:
    """
    Return a connected libnbd handle.

    Args:
        uri: of the server.
        strict: False sends what libnbd knows to be wrong, to see the server's answer.
    """
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    if not strict:
        handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return handle


def error_of(call: Callable[..., object], *args: object) -> int:
    """Return the errno a request is answered with; it must be an error."""
    with pytest.raises(nbd.Error) as caught:
        call(*args)
    return int(caught.value.errnum)


class Load:
    """
    Threads that write random blocks until stopped, and remember what was answered.

    Args:
        uri: of the volume.
        size: bytes from the start of the volume that are written to.
        block: bytes a write.
        threads: connections, each with blocks of its own.
        flush_every: a flush after so many writes of a thread; 0: none.
    """

    def __init__(
        self,
        uri: str,
        size: int,
        *,
        block: int = 16384,
        threads: int = 2,
        flush_every: int = 0,
    ) -> None:
        self._uri = uri
        self._block = block
        self._nr_blocks = size // block
        self._flush_every = flush_every
        self._ending = threading.Event()
        self.count = 0  # answered writes; only grows
        self.errors: list[Any] = []
        self.answered: dict[int, int] = {}  # block -> stamp
        self.pending: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(i, threads), daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _content(self, stamp: int) -> bytes:
        return stamp.to_bytes(8, "little") * (self._block // 8)

    def _run(self, mine: int, step: int) -> None:
        choose = random.Random(mine)
        stamp = mine + 1
        try:
            handle = connect(self._uri)
            while not self._ending.is_set():
                block = choose.randrange(mine, self._nr_blocks, step)
                stamp += step
                self.pending[block] = stamp
                handle.pwrite(self._content(stamp), block * self._block)
                self.answered[block] = stamp
                del self.pending[block]
                self.count += 1
                if self._flush_every and stamp // step % self._flush_every == 0:
                    handle.flush()
            handle.shutdown()
        except nbd.Error as error:
            self.errors.append(error)

    def wait_for(self, count: int, what: str = "the load to run") -> None:
        """Wait until more than *count* writes are answered, however slow each is."""
        support.wait_until(
            lambda: self.count > count, what, progress=lambda: self.count
        )

    def stop(self) -> None:
        """End the threads; the errors they met are in *errors*."""
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a write was not answered for 60 s"

    def join(self) -> None:
        """Wait until the threads have ended by errors of their own."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client was not told that the server ended"

    @property
    def ended(self) -> bool:
        """Whether every thread has ended."""
        return not any(thread.is_alive() for thread in self._threads)

    def check(self, read: Callable[[int, int], bytes]) -> None:
        """
        Fail unless every answered block holds what was answered or was under way.

        Args:
            read: gives the bytes at (offset, length).
        """
        assert self.answered, "the load wrote nothing"
        for block, stamp in self.answered.items():
            content = read(block * self._block, self._block)
            allowed = {stamp, self.pending.get(block, stamp)}
            assert content in map(self._content, allowed), (
                f"block {block} holds {content[:8].hex()}..., "
                f"answered was {stamp}, under way {self.pending.get(block)}"
            )

    def check_file(self, path: Path) -> None:
        """Fail unless the image at *path* holds every answered block."""
        with path.open("rb") as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            self.check(read)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing_regions(
    left: Path, right: Path, region_size: int, size: int
) -> Iterable[int]:
    """Return the regions in which two images differ, up to *size* bytes."""
    found = []
    with left.open("rb") as one, right.open("rb") as other:
        for region in range(-(-size // region_size)):
            length = min(region_size, size - region * region_size)
            if one.read(length) != other.read(length):
                found.append(region)
    return found


def dirty_set(path: Path) -> set[int]:
    """Return the regions a `dirty.<remote>` file says are dirty: the tests' oracle."""
    with open_map(path) as maps:
        return set(regions_of(maps.dirty))


def regions_of(bits: Any) -> Iterable[int]:
    """Return the indexes of the 1 bits of a bitarray."""
    return [int(index) for index in bits.search(1)]
