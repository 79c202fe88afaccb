# SPDX-License-Identifier: BSD-3-Clause
"""
Run a script in a virtual machine that has the kernel's own NBD client.

virtme-ng boots Debian's kernel on this machine's root file system, seen read-only, so
the guest has every program that is installed here. The kernel package is only
downloaded and unpacked, into .cache/kernel, never installed. No KVM: where CI runs
there is none, and one way for all is one way to debug.

virtme-ng mounts that root without a cache, and on an emulated CPU a Python program
then takes ten seconds and more to start. So it is mounted once more, cached (nothing
can change it from inside, and a change outside need not be seen), and the script runs
with that as its root.

Input and output go through a folder shared with the guest and not through its
console: virtme-ng's own channels need udev in the guest, and a file also shows how
far a guest came that had to be killed.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
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

__all__ = ["kernel_image", "run_in_vm", "unpacked"]

CACHE = ROOT / ".cache" / "kernel"
# Depends on the package of the kernel that Debian has now.
META_PACKAGE = "linux-image-amd64"
MEMORY = "1536M"
TAG = "hostroot"
NEW_ROOT = "/run/hostroot"
# As on any machine that is not emulated. Left to itself the guest trusts its HPET
# more, which costs a system call and an exit to the emulator each time it is asked.
CLOCK = "tsc=reliable"
# The emulator runs `rep movsb` a byte a step. A kernel that is told of fast string
# copies uses it for all of them, and copying costs what it costs on no machine.
CPU = "max,erms=off,fsrm=off"
MOUNT_OPTIONS = "ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000"


def run_tool(
    *command: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool that should take seconds, and return its output."""
    return subprocess.run(
        command, cwd=cwd, check=False, capture_output=True, text=True, timeout=300
    )


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


def kernel_image() -> Path:
    """
    Return the kernel to boot, fetched once for every checkout.

    An older one that is cached is good enough: the test is of the mirror.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        images = sorted(CACHE.glob("linux-image-*/boot/vmlinuz-*"))
        if not images:
            fetch(kernel_package())
            images = sorted(CACHE.glob("linux-image-*/boot/vmlinuz-*"))
    return images[-1]


def unpacked(package: str) -> Path:
    """
    Return the folder with what *package* of Debian's holds, fetched once.

    For programs that only the guest needs: nothing is installed, so no service is
    started here and no configuration written.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / package).exists():
            fetch(package)
    return CACHE / package


# What the guest runs first: the cached root, with the guest's own file systems in it.
PREPARE = f"""
mkdir {NEW_ROOT} &&
mount -t 9p -o {MOUNT_OPTIONS} {TAG} {NEW_ROOT}
for fs in dev proc sys run; do mount --rbind /$fs {NEW_ROOT}/$fs; done
"""


def interpreter(script: Path) -> list[str]:
    """Return what runs *script* in the guest."""
    if script.suffix != ".py":
        return ["bash"]
    # As pytest has it: the checkout's package, and tests/ for what they share; -P
    # keeps the script's folder out. The checkout is read-only there.
    path = f"PYTHONPATH={ROOT}:{ROOT / 'tests'}"
    return ["env", path, "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-P"]


def disk_options(disks: Sequence[Path]) -> str:
    """Return qemu's options for disks, which the guest sees as /dev/vda, vdb, ..."""
    # One queue: what is asked for first is done first, as dm-log-writes takes for
    # granted. Unsafe: nothing is proved by making this machine sync.
    drives = (
        f"-drive id=disk{i},file={disk},if=none,format=raw,cache=unsafe "
        f"-device virtio-blk-pci,drive=disk{i},num-queues=1,discard=off"
        for i, disk in enumerate(disks)
    )
    return " ".join(drives)


def vng_command(
    shared: Path,
    script: Path,
    arguments: Sequence[str],
    modules: Sequence[str],
    disks: Sequence[Path],
) -> list[str]:
    """Return the command that boots, runs *script* and powers off."""
    words = [*interpreter(script), str(script), *arguments]
    inside = shlex.join(["chroot", NEW_ROOT, *words])
    folder = shlex.quote(str(shared))
    begin = shared / "begin.sh"
    begin.write_text(
        f"exec >{folder}/output 2>&1 </dev/null\n"
        f"{PREPARE}"
        # Here and not in the script: its root has no modules of this kernel.
        + "".join(f"modprobe {name}\n" for name in modules)
        + f"export TMPDIR=/run\n{inside}\n"
        f"echo $? >{folder}/status\n"
        f"dmesg >{folder}/dmesg\n"
        "sync\n"
    )
    vng = Path(sys.executable).with_name("vng")
    host_root = (
        f"-fsdev local,id={TAG},path=/,security_model=none,readonly=on,multidevs=remap "
        f"-device virtio-9p-pci,fsdev={TAG},mount_tag={TAG}"
    )
    return [
        *(str(vng), "--disable-kvm", "--force-9p", "--busybox", "/bin/busybox"),
        *("--run", str(kernel_image()), "--cpus", "2", "--memory", MEMORY),
        f"--rwdir={shared}={shared}",
        f"--qemu-opts=-cpu {CPU} {host_root} {disk_options(disks)}".rstrip(),
        *("--append", CLOCK, "--cwd", "/", "--exec", f"bash {folder}/begin.sh"),
    ]


def run_in_vm(
    script: Path,
    timeout_s: float,
    arguments: Sequence[str] = (),
    modules: Sequence[str] = (),
    disks: Sequence[Path] = (),
) -> subprocess.CompletedProcess[str]:
    """
    Boot a guest, run *script* as root in it, and return what it printed.

    Skips the test where the tools or the kernel cannot be had. Boots in about 8 s;
    the guest's CPU is emulated, some ten times slower.

    Args:
        script: a file of this machine, not below /run: the guest sees it at the same
            path, and can write below /run only. For this Python if its name ends in
            .py, else for bash.
        timeout_s: seconds; then the guest is killed, and the exit code is 124.
        arguments: of the script.
        modules: of the kernel, loaded before.
        disks: raw images, which the guest gets as /dev/vda, /dev/vdb, ...

    Returns:
        the script's exit code (125: it did not come to its end, 124: killed at the
        deadline), its output, and the guest kernel's log in place of stderr.
    """
    requires(os.uname().machine == "x86_64", "the virtual machine is made for x86-64")
    requires_program("qemu-system-x86_64", "busybox", "apt-get", "dpkg-deb", "modprobe")
    # The guest cannot keep compiled modules, and is slow at compiling.
    for folder in (ROOT / "nbd_mirror", ROOT / "tests" / "vm"):
        compileall.compile_dir(folder, quiet=1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    shared = Path(tempfile.mkdtemp(prefix="nbdm-vm-"))
    try:
        command = vng_command(shared, script, arguments, modules, disks)
        code = boot(command, path, timeout_s)
        texts = [
            file.read_text(errors="replace") if file.exists() else ""
            for file in (shared / "output", shared / "dmesg", shared / "status")
        ]
        if code != 124:
            code = int(texts[2]) if texts[2].strip() else 125
        return subprocess.CompletedProcess([str(script)], code, texts[0], texts[1])
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def boot(command: list[str], path: str, timeout_s: float) -> int:
    """Run vng and return its exit code; at the deadline kill it and return 124."""
    # Pipes: qemu opens its output anew by name, and would truncate a file.
    guest = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        guest.communicate(timeout=timeout_s)
        return guest.returncode
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guest.pid, signal.SIGKILL)
        guest.communicate()
