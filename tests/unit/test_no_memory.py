# SPDX-License-Identifier: BSD-3-Clause
"""
A thread that comes to the engine for the first time when there is no memory.

The C library would allocate the engine's thread-local variables then, and end the
process where it cannot.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import support

from nbd_mirror import _build

SOURCE = Path(__file__).with_name("no_memory.c")
SCRIPT = """
import ctypes, threading
from nbd_mirror._core import ffi, lib

refuse = ctypes.CDLL(None).refuse_memory
found = []

def come():
    # CFFI and ctypes have variables of their own.
    lib.nbdm_log_flush(0)
    refuse(1)
    words = lib.nbdm_last_error()
    refuse(0)
    found.append(ffi.string(words))

thread = threading.Thread(target=come)
thread.start()
thread.join()
print(found)
"""


def test_thread_without_memory_does_not_end_the_process(tmp_path: Path) -> None:
    """Its variables came with its stack."""
    preloaded = tmp_path / "no_memory.so"
    words = ["-shared", "-fPIC", "-O1", "-ftls-model=initial-exec"]
    subprocess.run(
        [*_build.compiler(), *words, str(SOURCE), "-o", str(preloaded)], check=True
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env={
            **os.environ,
            "LD_PRELOAD": str(preloaded),
            "PYTHONPATH": str(support.ROOT),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[b'']\n", done.stderr
