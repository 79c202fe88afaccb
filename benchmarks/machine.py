# SPDX-License-Identifier: BSD-3-Clause
"""The machine of a measurement: a figure without it means nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import nbd_mirror

from .model import MIB, BenchError
from .servers import ROOT

__all__ = ["SHM", "check_machine", "disk_folder", "file_system", "machine"]

SHM = Path("/dev/shm")
DISKS = (Path("/var/tmp"), ROOT / "build")  # where a real file system may be
MEMORY = ("tmpfs", "ramfs")
PROGRAMS = {
    "nbdkit": "nbdkit",
    "fio": "fio",
    "nbdcopy": "libnbd-bin",
    "qemu-storage-daemon": "qemu-utils",
}
IMAGES = 6  # of --size, the largest number in one row: python_door


def check_machine(size: int) -> None:
    """Raise BenchError if a program or the room for the images is missing."""
    for name, package in PROGRAMS.items():
        if shutil.which(name) is None:
            raise BenchError(f"{name} is not installed: apt-get install {package}")
    kind = file_system(SHM)
    if kind not in MEMORY:
        raise BenchError(f"{SHM} is {kind}, and the images shall lie in memory")
    # Room for logs too. Memory counts as well, because tmpfs uses it.
    needed = IMAGES * size + 512 * MIB
    free = min(shutil.disk_usage(SHM).free, _available_memory())
    if free < needed:
        raise BenchError(
            f"the images need {needed // MIB} MiB in {SHM}, and memory for them; "
            "use a smaller --size"
        )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def file_system(path: Path) -> str:
    """Return the type of the file system that holds *path*, as the kernel calls it."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    # Read bytes, because other users' names are there too.
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        fields = line.split(b" ")
        if len(fields) > 2 and fields[2] == wanted.encode():
            return fields[fields.index(b"-") + 1].decode()
    return "unknown"


def disk_folder(stack: contextlib.ExitStack) -> tuple[Path, str]:
    """
    Make a folder on a real disk, which *stack* removes; return it and its type.

    Raises:
        BenchError: there is none; a log in memory is durable at no cost.
    """
    kinds = []
    for parent in DISKS:
        if not parent.is_dir():
            continue
        kind = file_system(parent)
        kinds.append(f"{parent} is {kind}")
        if kind not in (*MEMORY, "unknown"):
            folder = Path(tempfile.mkdtemp(prefix="nbd-mirror-bench.", dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder, kind
    raise BenchError(f"no real file system for the logs: {', '.join(kinds)}")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unknown: {error.strerror}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


def _commit() -> str:
    """Return the commit, if this is a checkout."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of all programs involved."""
    disk = next((one for one in DISKS if one.is_dir()), ROOT)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        "kernel": platform.release(),
        "images_on": file_system(SHM),
        "disk": file_system(disk),
        "load_average": os.getloadavg(),
        "nbd_mirror": nbd_mirror.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "nbdkit": _first_line("nbdkit", "--version"),
        "libnbd": _first_line("nbdinfo", "--version"),
        "qemu": _first_line("qemu-storage-daemon", "--version"),
        "fio": _first_line("fio", "--version"),
        "matplotlib": metadata.version("matplotlib"),
    }
