# SPDX-License-Identifier: BSD-3-Clause
"""What is used, as the benchmark reads it from /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.usage import cpu_us, switches

WORKER = """
import sys, threading, time
def work():
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("worked", flush=True)
sys.stdin.readline()
"""


def test_time_of_ended_threads_counts() -> None:
    """Nbdkit's threads end with their connection, and their time must not."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"worked\n"
        used = cpu_us([process.pid])
        assert used > 250_000
        assert cpu_us([process.pid, os.getpid()]) > used
    finally:
        process.kill()
        process.communicate()


def test_switches_are_seen() -> None:
    """A thread that waits for an answer switches at least once, whatever else runs."""
    echo = ["sed", "--unbuffered", "p"]
    with subprocess.Popen(
        echo, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        before = switches()
        for _ in range(20):
            process.stdin.write(b"x\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"x\n"
            assert process.stdout.readline() == b"x\n"
        assert switches() - before >= 20


def test_a_process_that_is_gone_is_an_error() -> None:
    """A server that died has no figure."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError, match=os.strerror(2)):
        cpu_us([process.pid])
