# SPDX-License-Identifier: BSD-3-Clause
"""
Run a script in a virtual machine that has the kernel's own NBD client.

qemu boots Debian's kernel on this machine's root file system, seen read-only, so the
guest has every program that is installed here. No KVM: where CI runs there is none, and
one way for all is one way to debug.

The CPU is emulated, some ten times slower than this one's, and all that the guest does
is paid for there. So it is told little at the start (kernel.py): no service, no device
manager, no compressed kernel. The root is cached (nothing can change it from inside,
and a change outside need not be seen), or a Python program would take ten seconds and
more to start.

Input and output go through a folder shared with the guest and not through a console:
a file also shows how far a guest came that had to be killed.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support import ROOT, requires, requires_program
from vm.kernel import Kernel, initial_disk, kernel

__all__ = ["run_in_vm"]

MEMORY = "1536M"
ROOT_TAG = "hostroot"
SHARED_TAG = "shared"
MODULES = ("virtio_pci", "9pnet_virtio", "9p")
CACHED = "trans=virtio,version=9p2000.L,cache=loose,msize=512000"
SHARED = "trans=virtio,version=9p2000.L,msize=512000"
# The emulator runs `rep movsb` a byte a step. A kernel that is told of fast string
# copies uses it for all of them, and copying costs what it costs on no machine.
CPU = "max,erms=off,fsrm=off"
COMMAND_LINE = (
    # As on any machine that is not emulated. Left to itself the guest trusts its HPET
    # more, which costs a system call and an exit to the emulator each time it is asked.
    "tsc=reliable "
    # A panic ends the machine.
    "panic=-1 loglevel=1"
)


def boot_script(shared: Path, kernel: Kernel) -> str:
    """Return what the first process does: the roots, then begin.sh in their place."""
    shared_there = shlex.quote(f"/root{shared}")
    return f"""
mount -t proc proc /proc
mount -t 9p -o ro,{CACHED} {ROOT_TAG} /root
mount -t devtmpfs dev /root/dev
mkdir /root/dev/pts /root/dev/shm
mount -t devpts devpts /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
for fd in fd fd/0 fd/1 fd/2; do ln -s /proc/self/$fd /root/dev; done
cd /root/dev && mv 0 stdin && mv 1 stdout && mv 2 stderr
mount -t sysfs sys /root/sys
mount -t tmpfs -o mode=755 run /root/run
mount -t 9p -o rw,{SHARED} {SHARED_TAG} {shared_there}
printf '#!/bin/sh\nexec /sbin/modprobe -d %s "$@"\n' {shlex.quote(str(kernel.folder))} \
  >/root/run/modprobe
chmod +x /root/run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
ifconfig lo up
mount --move /proc /root/proc
cd /
exec switch_root /root /bin/bash {shlex.quote(str(shared))}/begin.sh
"""


def interpreter(script: Path) -> list[str]:
    """Return what runs *script* in the guest."""
    if script.suffix != ".py":
        return ["bash"]
    # As pytest has it: the checkout's package, and tests/ for what they share; -P
    # keeps the script's folder out. The checkout is read-only there.
    path = f"PYTHONPATH={ROOT}:{ROOT / 'tests'}"
    return ["env", path, "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-P"]


def disk_options(disks: Sequence[Path]) -> list[str]:
    """Return qemu's options for disks, which the guest sees as /dev/vda, vdb, ..."""
    # One queue: what is asked for first is done first, as dm-log-writes takes for
    # granted. Unsafe: nothing is proved by making this machine sync.
    words = []
    for i, disk in enumerate(disks):
        drive = f"id=disk{i},file={disk},if=none,format=raw,cache=unsafe"
        device = f"virtio-blk-pci,drive=disk{i},num-queues=1,discard=off"
        words += ["-drive", drive, "-device", device]
    return words


def share(tag: str, folder: Path, options: str) -> list[str]:
    """Return qemu's options for a folder that the guest mounts by its tag."""
    return [
        *("-fsdev", f"local,id={tag},path={folder},security_model=none{options}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def write_begin(shared: Path, words: Sequence[str], modules: Sequence[str]) -> None:
    """Write what the guest does once its roots are there: *words*, and an end."""
    (shared / "begin.sh").write_text(
        f"cd {shlex.quote(str(shared))}\n"
        "exec >output 2>&1 </dev/null\n"
        "export HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n"
        + "".join(f"/run/modprobe {name}\n" for name in modules)
        + f"(cd / && TMPDIR=/run {shlex.join(words)})\n"
        "echo $? >status\n"
        "dmesg >dmesg\n"
        "sync\n"
        "exec /bin/busybox reboot -f\n"
    )


def qemu_command(shared: Path, disks: Sequence[Path], cpus: int) -> list[str]:
    """Return the command that boots, runs begin.sh and ends."""
    booted = kernel()
    initrd = shared / "initrd"
    initrd.write_bytes(initial_disk(booted, MODULES, boot_script(shared, booted)))
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-machine", "pc,usb=off", "-accel", "tcg,thread=multi", "-cpu", CPU),
        *("-smp", str(cpus), "-m", MEMORY, "-display", "none"),
        *("-serial", f"file:{shared}/console"),
        *("-kernel", str(booted.image), "-initrd", str(initrd)),
        *("-append", f"{COMMAND_LINE} console=ttyS0"),
        *share(ROOT_TAG, Path("/"), ",readonly=on,multidevs=remap"),
        *share(SHARED_TAG, shared, ""),
        *disk_options(disks),
    ]


def run_in_vm(
    script: Path,
    timeout_s: float,
    arguments: Sequence[str] = (),
    *,
    modules: Sequence[str] = (),
    disks: Sequence[Path] = (),
    cpus: int = 1,
) -> subprocess.CompletedProcess[str]:
    """
    Boot a guest, run *script* as root in it, and return what it printed.

    Skips the test where the tools or the kernel cannot be had.

    Args:
        script: a file of this machine, not below /run: the guest sees it at the same
            path, and can write below /run only. For this Python if its name ends in
            .py, else for bash.
        timeout_s: seconds; then the guest is killed, and the exit code is 124.
        arguments: of the script.
        modules: of the kernel, loaded before.
        disks: raw images, which the guest gets as /dev/vda, /dev/vdb, ...
        cpus: of the guest. A second one costs half as much again for the same work, and
            is worth it where the test is of instants that nothing in the guest chose.

    Returns:
        the script's exit code (125: it did not come to its end, 124: killed at the
        deadline), its output, and the guest kernel's log in place of stderr.
    """
    requires(os.uname().machine == "x86_64", "the virtual machine is made for x86-64")
    requires_program("qemu-system-x86_64", "busybox", "apt-get", "dpkg-deb", "modprobe")
    # The guest cannot keep compiled modules, and is slow at compiling.
    for folder in (ROOT / "nbd_mirror", ROOT / "tests" / "vm"):
        compileall.compile_dir(folder, quiet=1)
    shared = Path(tempfile.mkdtemp(prefix="nbdm-vm-"))
    try:
        words = [*interpreter(script), str(script), *arguments]
        write_begin(shared, words, modules)
        command = qemu_command(shared, disks, cpus)
        code, said = boot(command, timeout_s)
        texts = [
            file.read_text(errors="replace") if file.exists() else ""
            for file in (shared / "output", shared / "dmesg", shared / "status")
        ]
        if not texts[1]:
            console = (shared / "console").read_bytes().decode(errors="replace")
            texts[1] = f"{said}\n{console}"
        if code != 124:
            code = int(texts[2]) if texts[2].strip() else 125
        return subprocess.CompletedProcess([str(script)], code, texts[0], texts[1])
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def boot(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Run qemu; return its exit code, 124 if it was killed, and what it printed."""
    guest = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = guest.communicate(timeout=timeout_s)
        return guest.returncode, said
    except subprocess.TimeoutExpired:
        return 124, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guest.pid, signal.SIGKILL)
        guest.communicate()
