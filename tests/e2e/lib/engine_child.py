# SPDX-License-Identifier: BSD-3-Clause
"""
An engine in a process of its own, driven over a socket: to be killed at any moment.

Fault points are read once a process, so every case wants a new one, and there are many
hundreds. So this file is also a program, the nursery: it imports the engine once and
forks a child for each connection, which takes milliseconds. A call is carried out in a
thread of the child, so that a request that waits does not keep others from coming in.
With policies the child also runs the keepers, as a real server does: they connect,
sample, admit and copy by themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import support

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.server.keeper import Keeper, RemotePolicy
from nbd_mirror.volume import core
from nbd_mirror.volume.model import Disk, disk_of

__all__ = ["Died", "EngineChild", "EngineError", "Nursery"]

CALL_S = 30.0  # nothing the tests ask for may take longer: else it hangs


class Died(Exception):  # noqa: N818  what a crash test waits for is no error
    """The child was killed, as a fault point does."""


class EngineError(Exception):
    """What the engine raised in the child."""

    def __init__(self, number: int, words: str) -> None:
        super().__init__(words)
        self.errno = number


# --- the tests' side ---------------------------------------------------------


class Nursery:
    """The process that forks the children; surely ended with the test's others."""

    def __init__(self, processes: support.Processes, folder: Path) -> None:
        self.address = str(folder / "nursery.sock")
        processes.start(
            [sys.executable, "-m", "e2e.lib.engine_child", self.address],
            env={"PYTHONPATH": f"{support.ROOT}:{support.ROOT / 'tests'}"},
        )
        support.wait_listening(Path(self.address), "the nursery")

    def child(self, fault: str = "") -> EngineChild:
        """Fork a child with NBDM_FAULT set to *fault*."""
        return EngineChild(self.address, fault)


class EngineChild:
    """
    One child. Methods of the engine are called by name.

    Every call has a deadline: what is not answered by then hangs, and fails the test.
    """

    def __init__(self, address: str, fault: str) -> None:
        self._address = address
        self._connection = Client(address)
        self._connection.send(("fork", fault))
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._last = 0
        self.pid: int = self._receive(CALL_S)

    def _receive(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            pytest.fail(f"the engine has not answered for {timeout_s:g} s: it hangs")
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise Died from None

    def submit(self, name: str, *arguments: Any, **options: Any) -> int:
        """Begin a call; returns its number, for `result`."""
        self._last += 1
        try:
            self._connection.send((self._last, name, arguments, options))
        except BrokenPipeError:
            raise Died from None
        return self._last

    def result(self, number: int, timeout_s: float = CALL_S) -> Any:
        """
        Wait for a call's result.

        Raises:
            EngineError: what the engine said. Died: the child was killed.
        """
        until = time.monotonic() + timeout_s
        while number not in self._answers:
            found, good, value = self._receive(max(until - time.monotonic(), 0.0))
            self._answers[found] = good, value
        good, value = self._answers.pop(number)
        if not good:
            raise EngineError(*value)
        return value

    def done(self, number: int) -> bool:
        """Tell whether a call has its result."""
        while number not in self._answers and self._connection.poll(0):
            found, good, value = self._receive(0)
            self._answers[found] = good, value
        return number in self._answers

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Carry out a call."""
        return self.result(self.submit(name, *arguments, **options))

    def kill(self) -> None:
        """Kill it, if it still lives; return once it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.status()

    def status(self) -> int:
        """Wait for its end and return its exit code; minus the signal that ended it."""
        self._connection.close()
        with Client(self._address) as asking:
            asking.send(("wait", self.pid))
            assert asking.poll(CALL_S), "the child does not end"
            return os.waitstatus_to_exitcode(asking.recv())


# --- the child's side --------------------------------------------------------


@dataclass
class Servant:
    """What carries out the calls in the child."""

    connection: Connection
    engine: core.Engine | None = None
    keepers: Sequence[Keeper] = ()

    def __post_init__(self) -> None:
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Take calls until the other end is closed."""
        while True:
            try:
                number, name, arguments, options = self.connection.recv()
            except (EOFError, ConnectionResetError):
                return
            threading.Thread(
                target=self._answer, args=(number, name, arguments, options)
            ).start()

    def _answer(self, number: int, name: str, arguments: Any, options: Any) -> None:
        good, value = True, None
        try:
            value = self._carry_out(name, arguments, options)
        except MirrorError as error:
            good, value = False, (error.errno or 0, str(error))
        except Exception as error:
            good, value = False, (0, f"in the child: {error!r}")
        with self._sending, contextlib.suppress(BrokenPipeError):
            self.connection.send((number, good, value))

    def _carry_out(self, name: str, arguments: Any, options: Any) -> Any:
        if name == "create":
            return core.create(*arguments, **options)
        if name == "open":
            return self._open(*arguments, **options)
        assert self.engine is not None
        if name == "stop":
            return self._stop()
        if name == "view":
            view = self._keeper(*arguments).view()
            return view.facts, view.status
        if name == "resume":
            self._keeper(*arguments).forget_error()
            return self.engine.pause(*arguments, paused=False)
        if name == "read":
            offset, length = arguments
            content = bytearray(length)
            self.engine.pread(content, offset)
            return bytes(content)
        return getattr(self.engine, name)(*arguments, **options)

    def _keeper(self, disk: Disk) -> Keeper:
        return self.keepers[disk - 1]

    def _open(self, params: core.Params, policies: Sequence[RemotePolicy] = ()) -> None:
        self.engine = core.Engine(params)
        self.engine.start()
        self.keepers = [
            Keeper(self.engine, disk_of(i), policy, lambda _level, _line: None)
            for i, policy in enumerate(policies)
        ]
        for keeper in self.keepers:
            keeper.start()

    def _stop(self) -> None:
        assert self.engine is not None
        for keeper in self.keepers:
            keeper.end()
        if self.keepers:
            self.engine.wake()
        try:
            self.engine.stop()
        finally:
            for keeper in self.keepers:
                assert keeper.join(CALL_S), "a keeper does not end"


def nurse(address: str) -> None:
    """Fork a child for each connection that asks for one; wait for those that end."""
    with Listener(address, backlog=16) as listener:
        while True:
            connection = listener.accept()
            what, argument = connection.recv()
            if what == "wait":
                connection.send(os.waitpid(argument, 0)[1])
            elif os.fork() == 0:
                listener.close()
                os.environ["NBDM_FAULT"] = argument
                connection.send(os.getpid())
                Servant(connection).serve()
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    nurse(sys.argv[1])
