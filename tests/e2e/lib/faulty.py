# SPDX-License-Identifier: BSD-3-Clause
"""
A fault-injecting NBD server: acts at named events of the protocol.

Real servers cannot be made to fail at one exact byte, so this one is the tests' own.
It runs in threads of the test, which says beforehand what happens where (`on()`, with
the events and actions of faults.py), and waits for what did happen; the idea is
qemu's nbd-fault-injector.py. With *volatile* it keeps what it answered in memory
until a flush, and loses it as it crashes.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from e2e.lib.faults import Action, Command, Dropped, Rule
from e2e.lib.image import Image
from e2e.lib.servers import Secondary

__all__ = ["Faulty"]

KIND_NAMES = {0: "read", 1: "write", 3: "flush", 4: "trim", 6: "zero"}
DISCONNECT = 2
FUA = 1
REQUEST_MAGIC = 0x25609513
OPTION_MAGIC, OPTION_REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
EXPORT_NAME, ABORT, INFO, GO = 1, 2, 6, 7
ACK, INFO_REPLY, UNSUPPORTED = 1, 3, 0x80000001
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZERO = 1, 2, 4, 8, 32, 64
MIB = 1 << 20


class Faulty(Secondary):
    """
    A secondary like the others, that fails as it is told.

    Attributes, for a test to set before start() or between connections: *size*, the
    export's, None for the image's; *read_only*; *flags*, what it says it can;
    *volatile*, taken at start(). To read: *lost*, *kept*.
    """

    def __init__(
        self, processes: support.Processes, folder: Path, name: str, kind: str
    ) -> None:
        super().__init__(processes, folder, name, kind)
        self.size: int | None = None
        self.read_only = False
        self.flags = SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_ZERO
        self.volatile = False
        self.lost = 0  # bytes, at the last kill()
        self.kept: list[Command] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self._changed = threading.Condition()  # guards all of these
        self._rules: list[Rule] = []
        self._epoch = 0  # one life of the server
        self._frozen = False
        self._thaws = 0
        self._disk: Image | None = None
        self._listener: socket.socket | None = None
        self._links: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        processes.on_exit(self.kill)

    # --- what a test says ---

    def on(
        self,
        event: str,
        *actions: Action,
        kind: str = "write",
        nth: int = 1,
        times: int = 1 << 30,
        at: int | None = None,
    ) -> None:
        """
        Have *actions* taken, in order, at an event.

        Args:
            event: see above.
            kind: of the command; "connection" for `connect` and `export`.
            nth: the first time they are taken, counted from now on.
            times: how often.
            at: only for commands at this offset.
        """
        rule = Rule(event, kind, actions, nth, times, at)
        with self._changed:
            self._rules.append(rule)

    def off(self) -> None:
        """Forget all rules of on()."""
        with self._changed:
            self._rules.clear()

    def count(self, event: str, kind: str = "write") -> int:
        """Return how often an event was reached."""
        return self.counts[event, kind]

    def wait(self, event: str, kind: str = "write", *, count: int = 1) -> None:
        """Return once an event was reached *count* times since the very beginning."""
        with self._changed:
            if self._changed.wait_for(lambda: self.counts[event, kind] >= count, 20):
                return
            seen = dict(self.counts)
        pytest.fail(f"waited 20 s in vain for {count} {event} of a {kind}: {seen}")

    def late(self, *commands: Command) -> None:
        """Carry out what was kept, all or *commands*, though its connection is dead."""
        with self._changed:
            chosen = commands or tuple(self.kept)
            assert chosen, "nothing was kept"
            for command in chosen:
                self.kept.remove(command)
                self._apply(command)

    @property
    def unflushed(self) -> int:
        """Bytes that a crash now would lose."""
        with self._changed:
            return self._disk.unflushed if self._disk else 0

    def crash(self, choose: random.Random | None = None) -> None:
        """Lose what was not flushed, all or, with *choose*, some; come back at once."""
        self.kill(choose)
        self.start()

    # --- as the other secondaries ---

    def start(self, *options: str | Path) -> None:
        """Listen, with the image as it is in the file."""
        assert not options
        assert self._listener is None
        self.socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(self.socket))
        listener.listen(64)
        with self._changed:
            self._listener = listener
            self._disk = Image(self.image, volatile=self.volatile)
        self._spawn(self._accept, listener, self._epoch)

    def kill(self, choose: random.Random | None = None) -> None:
        """End all connections and threads; what was not flushed is lost."""
        with self._changed:
            self._epoch += 1
            self._frozen = False
            listener, self._listener = self._listener, None
            ends = [*self._links, *([listener] if listener else [])]
            for one in ends:
                with contextlib.suppress(OSError):  # the client was first
                    one.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        if listener is None:
            return
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "a thread of the faulty server hangs"
        self._threads.clear()
        listener.close()
        assert self._disk is not None
        if choose:
            self._disk.keep_some(choose)
        self.lost = self._disk.unflushed
        self._disk.close()
        self._disk = None

    def cut(self) -> None:
        """End all connections; the server and its memory live on."""
        with self._changed:
            for one in self._links:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Take and answer nothing more; connections stay open."""
        with self._changed:
            self._frozen = True

    def thaw(self) -> None:
        """Go on, also where an action froze."""
        with self._changed:
            self._frozen = False
            self._thaws += 1
            self._changed.notify_all()

    def revive(self) -> None:
        """Do nothing: it does not die by itself."""

    def pids(self) -> list[int]:
        """Return none: it has no process of its own."""
        return []

    # --- threads ---

    def _spawn(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        with self._changed:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _accept(self, listener: socket.socket, epoch: int) -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with self._changed:
                if epoch != self._epoch:
                    link.close()
                    return
                self._links.add(link)
            self._spawn(self._serve, link, epoch)

    def _serve(self, link: socket.socket, epoch: int) -> None:
        try:
            self._reach("connect", Command(self, epoch))
            self._handshake(link, epoch)
            while True:
                self._carry_out(link, epoch)
        except (Dropped, OSError):
            pass
        finally:
            with self._changed:
                self._links.discard(link)
            link.close()

    def pause_here(self, command: Command, seconds: float | None) -> None:
        """Wait in the command's thread; for actions."""
        with self._changed:
            thaws = self._thaws
            self._changed.wait_for(
                lambda: (
                    command.epoch != self._epoch
                    or (seconds is None and thaws != self._thaws)
                ),
                seconds,
            )
        if command.epoch != self._epoch:
            raise Dropped

    def _reach(self, event: str, command: Command) -> None:
        with self._changed:
            self.counts[event, command.kind] += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._frozen or command.epoch != self._epoch
            )
            if command.epoch != self._epoch:
                raise Dropped
            found = [one for one in self._rules if one.applies(event, command)]
        for rule in found:
            for action in rule.actions:
                action(command)

    # --- the protocol ---

    def _export(self) -> tuple[int, int]:
        size = self.size if self.size is not None else self.image.stat().st_size
        return size, HAS_FLAGS | self.flags | (READ_ONLY if self.read_only else 0)

    def _handshake(self, link: socket.socket, epoch: int) -> None:
        link.sendall(b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3))
        (client,) = struct.unpack(">I", receive(link, 4))
        while True:
            magic, option, length = struct.unpack(">8sII", receive(link, 16))
            assert magic == OPTION_MAGIC
            receive(link, length)
            size, flags = self._export()
            if option == EXPORT_NAME:
                self._reach("export", Command(self, epoch))
                link.sendall(
                    struct.pack(">QH", size, flags) + bytes(124 * (client < 2))
                )
                return
            if option in (INFO, GO):
                info = struct.pack(">HQH", 0, size, flags)
                link.sendall(option_reply(option, INFO_REPLY, info))
                if option == GO:
                    self._reach("export", Command(self, epoch))
            known = option in (ABORT, INFO, GO)
            link.sendall(option_reply(option, ACK if known else UNSUPPORTED))
            if option == ABORT:
                raise Dropped
            if option == GO:
                return

    def _carry_out(self, link: socket.socket, epoch: int) -> None:
        fields = struct.unpack(">IHHQQ", receive(link, 24))
        magic, flags, number, cookie, offset = fields
        assert magic == REQUEST_MAGIC
        if number == DISCONNECT:
            raise Dropped
        command = Command(self, epoch, KIND_NAMES[number], flags, cookie, offset)
        self._reach("header", command)
        (command.length,) = struct.unpack(">I", receive(link, 4))
        if command.kind == "write":
            first = receive(link, command.length // 2)
            self._reach("payload", command)
            command.payload = first + receive(link, command.length - len(first))
        self._reach("received", command)
        data = b""
        if not command.skip:
            with self._changed:
                if command.epoch != self._epoch:
                    raise Dropped
                data = self._apply(command)
        self._reach("applied", command)
        answer = struct.pack(">IIQ", command.magic, command.error, command.cookie)
        answer += b"" if command.error else data
        link.sendall((answer * command.answers)[: command.cut])
        if command.cut is not None:
            raise Dropped
        self._reach("answered", command)

    def _apply(self, command: Command) -> bytes:
        """Carry a command out, the lock held; returns what a read gives."""
        disk = self._disk
        assert disk is not None
        if command.kind == "read":
            return disk.read(command.offset, command.length)
        if command.kind == "flush":
            disk.flush()
            return b""
        for offset, content in pieces(command):
            disk.write(offset, content)
        if command.flags & FUA:
            disk.flush(command.offset, command.length)
        return b""


def pieces(command: Command) -> Iterator[tuple[int, bytes]]:
    """Give the bytes a command writes; trims and zeroes bit by bit."""
    if command.kind == "write":
        yield command.offset, command.payload
        return
    for done in range(0, command.length, MIB):
        length = min(MIB, command.length - done)
        yield command.offset + done, bytes(length)


def receive(link: socket.socket, length: int) -> bytes:
    """Return exactly *length* bytes."""
    content = bytearray(length)
    view = memoryview(content)
    while view:
        count = link.recv_into(view)
        if count == 0:
            raise Dropped
        view = view[count:]
    return bytes(content)


def option_reply(option: int, kind: int, content: bytes = b"") -> bytes:
    """Return a reply to a handshake's option."""
    head = struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(content))
    return head + content
