# SPDX-License-Identifier: BSD-3-Clause
"""
usage: guest_main.py direct|python        (inside the virtual machine, as root)

The main job on the kernel's own /dev/nbd0, by nbd-mirror's commands: attach, mkfs,
mount, write with verify, kill the secondary in the middle, go on, catch up, unmount,
compare. What test_kernel_nbd.py looks at are the result lines.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

from vm.inside import PATH, Mirror, command, note, result, run, wait_until

WORK = Path("/run/vm-main")
DEVICE = "/dev/nbd0"
BLOCK = Path("/sys/block/nbd0")
FIO_S = 300.0
# The kernel's words for an I/O that failed.
BAD = re.compile(r"nbd0.*(timed out|I/O error)|I/O error.*nbd0|EXT4-fs error", re.I)


def fio(mirror: Mirror, file: str, *options: str) -> list[str]:
    """
    Return the command for random writes over all of a file, each block with a checksum.

    Afterwards, with --verify_only, what was written must be read.
    """
    return [
        *("fio", "--name=job", f"--filename={mirror.point}/{file}", "--rw=randwrite"),
        *("--bs=16k", "--ioengine=libaio", "--direct=1", "--iodepth=8"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        *(f"--output={mirror.folder}/fio.{file}.log", *options),
    ]


def written() -> int:
    """Return how many sectors were written to the device."""
    return int((BLOCK / "stat").read_text().split()[6])


def status(mirror: Mirror, name: str) -> None:
    """Print the whole status on one line."""
    said = command("status", "--json", mirror.config.source)
    result(name, json.dumps(json.loads(said)))


def begin(mirror: Mirror, door: str) -> None:
    """Serve a new volume, attach it, and mount a file system of its own."""
    config = mirror.config.source
    run("truncate", "-s", "64M", mirror.local, mirror.far)
    mirror.start_secondary()
    command("create", config)
    # Exit code 11: it goes on starting, for the CPU is slow.
    command("serve", config, "--door", door, ok=(0, 11))
    mirror.wait_served()
    command("attach", config, DEVICE)
    size = (BLOCK / "queue" / "logical_block_size").read_text()
    result("block_size", size.strip())
    command("wait", config, "--for", "in_sync", "--timeout", "120s")
    note("mkfs and mount")
    run("mkfs.ext4", "-q", DEVICE)
    mirror.mount()


def lose_secondary(mirror: Mirror) -> None:
    """Write; the secondary is killed in the middle of it; write without it."""
    config = mirror.config.source
    note("writing; the secondary is killed in the middle of it")
    before = written()
    words = fio(mirror, "during", "--size=24M", "--rate=4m")
    with subprocess.Popen(words, env={"PATH": PATH}) as load:
        # 1 MiB into the load, in sectors.
        wait_until(lambda: written() - before > 2048, "the load to get on")
        mirror.kill_secondary()
        result("load_at_kill", "running" if load.poll() is None else "over")
        command("wait", config, "--for", "out_of_sync", "--timeout", "60s")
        load.wait(FIO_S)
    if load.returncode != 0:
        raise RuntimeError(f"fio: exit code {load.returncode}")
    result("load_survived", "yes")
    status(mirror, "after_kill")

    note("writing without the secondary")
    run(*fio(mirror, "alone", "--size=8M"), timeout_s=FIO_S)
    run("sync")
    status(mirror, "alone")


def read_back(mirror: Mirror) -> None:
    """Read what was written, from the disk and not from the page cache."""
    note("reading back")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    for file, size in (("during", "24M"), ("alone", "8M")):
        words = fio(mirror, file, f"--size={size}", "--verify_only")
        run(*words, timeout_s=FIO_S)
    result("verified", "yes")


def end(mirror: Mirror) -> None:
    """Stop in order and compare the sides."""
    config = mirror.config.source
    mirror.unmount()
    command("detach", config)
    result("device_size", (BLOCK / "size").read_text().strip())
    command("stop", config)
    mirror.kill_secondary()
    note("comparing")
    run("cmp", mirror.local, mirror.far)
    result("images", "equal")
    run("e2fsck", "-fn", mirror.far)
    result("secondary_fsck", "clean")
    result("kernel_errors", "yes" if BAD.search(run("dmesg")) else "no")


def main() -> None:
    """Do it all."""
    WORK.mkdir()
    folder = WORK / "vm"
    mirror = Mirror(
        *(folder, folder / "local.img", folder / "far.img", DEVICE),
        deadline="5s",
        late_write_window="5s",
    )
    try:
        begin(mirror, sys.argv[1])
        lose_secondary(mirror)
        note("the secondary is started again")
        mirror.start_secondary()
        source = mirror.config.source
        command("wait", source, "--for", "in_sync", "--timeout", "120s")
        status(mirror, "caught_up")
        read_back(mirror)
        end(mirror)
        result("done", "yes")
    except Exception as error:
        result("failed", str(error).splitlines()[0])
        traceback.print_exc()
        print(mirror.logs(), flush=True)
        raise SystemExit(1) from None
    note("done")


if __name__ == "__main__":
    main()
