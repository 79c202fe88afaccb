# SPDX-License-Identifier: BSD-3-Clause
"""
usage: vm_guest.py OPTIONS-AS-JSON        (inside the virtual machine, as root)

Ours over the kernel's nbd, md RAID1, DRBD, one copy and a relay, in turn, in one boot.

All are set up at the same time and exist side by side. In each round every depth is
measured on each of them, in a rotating order. vm.py reads lines of the word `measured`
and JSON. An emulated CPU makes every figure small, so they compare only with each
other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vm.inside import (
    Mirror,
    note,
    run,
    wait_until,
)

from benchmarks.usage import cpu_us, switches

WORK = Path("/run/vm-bench")
MIB = 1 << 20
RAMP_S = 0.5


# --- set-ups -------------------------------------------------------------------


def attach(socket: Path, device: str) -> None:
    """Attach the kernel's nbd to a server, as nbd-mirror attach does."""
    run("nbd-client", "-unix", socket, device, "-b", "4096", "-t", "60", "-C", "1")


def serve_copy(folder: Path, size: int) -> tuple[Path, subprocess.Popen[bytes]]:
    """Serve a new image by nbdkit's file plugin; return its socket."""
    folder.mkdir(parents=True)
    image, socket = folder / "disk.img", folder / "disk.sock"
    listens = folder / "nbdkit.pid"  # written once it accepts connections
    with image.open("wb") as file:
        file.truncate(size)
    with (folder / "nbdkit.log").open("wb") as log:
        server = subprocess.Popen(
            ["nbdkit", "-f", "-P", listens, "-U", socket, "file", image],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    wait_until(listens.exists, f"a server on {socket}")
    return socket, server


class SetUp:
    """A target for writes: *device*, and the *processes* that serve it."""

    def __init__(self, key: str, device: str, processes: dict[str, int]) -> None:
        self.key = key
        self.device = device
        self.processes = processes

    def check(self) -> None:
        """Raise RuntimeError unless both copies still get writes."""

    def finish(self) -> None:
        """End it; raise RuntimeError if it was no mirror."""


class Ours(SetUp):
    """nbd_mirror's direct door; local and state on a tmpfs, the remote an nbdkit."""

    def __init__(self, options: dict[str, Any]) -> None:
        folder = WORK / "ours"
        folder.mkdir(parents=True)
        for name in ("local.img", "far.img"):
            with (folder / name).open("wb") as file:
                file.truncate(options["size"])
        self.mirror = Mirror(
            folder, folder / "local.img", folder / "far.img", "/dev/nbd0"
        )
        self.mirror.start_secondary()
        self.mirror.create("far")
        self.mirror.serve()
        self.mirror.wait_served()
        self.mirror.attach()
        self.mirror.wait_for("in_sync")
        self._since = self.mirror.remote()["since"]
        processes = self.mirror.pids()
        super().__init__("ours", "/dev/nbd0", processes)

    def check(self) -> None:
        """Raise RuntimeError unless the remote was in sync throughout."""
        found = self.mirror.remote()
        if (found["state"], found["since"]) != ("in_sync", self._since):
            raise RuntimeError(f"the remote is {found['state']} since {found['since']}")

    def finish(self) -> None:
        """Stop it, and compare the disks byte for byte."""
        self.mirror.detach()
        self.mirror.stop()
        run("cmp", self.mirror.local, self.mirror.far)


class Md(SetUp):
    """md RAID1 of a RAM disk and /dev/nbd1, with a write-intent bitmap inside."""

    def __init__(self, options: dict[str, Any]) -> None:
        socket, server = serve_copy(WORK / "md", options["size"])
        attach(socket, "/dev/nbd1")
        create = (
            f"{options['tools']['mdadm']}/sbin/mdadm",
            "--create",
            "/dev/md0",
            "--run",
        )
        kind = ("--assume-clean", "--level=1", "--raid-devices=2", "--bitmap=internal")
        run(*create, *kind, "/dev/ram0", "/dev/nbd1")
        super().__init__("md", "/dev/md0", {"remote": server.pid})

    def check(self) -> None:
        """Raise RuntimeError unless both members are up."""
        text = Path("/proc/mdstat").read_text()
        if "[UU]" not in text:
            raise RuntimeError(f"the array is not whole: {text}")


class Drbd(SetUp):
    """DRBD 8.4, protocol C: two RAM disks of this host, over the loopback device."""

    def __init__(self, options: dict[str, Any]) -> None:
        tools = options["tools"]["drbd-utils"]
        self._setup = f"{tools}/lib/drbd/drbdsetup-84"
        meta = f"{tools}/sbin/drbdmeta"
        run("ip", "link", "set", "lo", "up")
        for minor in (0, 1):
            disk = f"/dev/ram{1 + minor}"
            run(meta, "--force", str(minor), "v08", disk, "internal", "create-md")
            self._drbd("new-resource", f"r{minor}")
            self._drbd("new-minor", f"r{minor}", str(minor), "0")
            self._drbd("attach", str(minor), disk, disk, "internal")
        ends = ("ipv4:127.0.0.1:7788", "ipv4:127.0.0.1:7789")
        self._drbd("connect", "r0", *ends, "--protocol=C")
        self._drbd("connect", "r1", *reversed(ends), "--protocol=C")
        wait_until(lambda: self._state("cs") == "Connected", "DRBD to connect")
        self._drbd("new-current-uuid", "--clear-bitmap", "0")
        self._drbd("primary", "0", "--force")
        super().__init__("drbd", "/dev/drbd0", {})
        self.check()

    def _drbd(self, *words: str) -> str:
        return str(run(self._setup, *words))

    def _state(self, what: str) -> str:
        """Return the first minor's "cs", "ro" or "ds"."""
        found = re.search(
            rf"^ 0: .*\b{what}:(\S+)", Path("/proc/drbd").read_text(), re.MULTILINE
        )
        return found[1] if found else ""

    def check(self) -> None:
        """Raise RuntimeError unless both sides are connected and equal."""
        if self._state("ds") != "UpToDate/UpToDate":
            raise RuntimeError(f"the disks are {self._state('ds')}")


class OneCopy(SetUp):
    """One nbdkit file over /dev/nbd2: the minimum of any mirror over nbd."""

    def __init__(self, options: dict[str, Any]) -> None:
        socket, server = serve_copy(WORK / "one_copy", options["size"])
        attach(socket, "/dev/nbd2")
        super().__init__("one_copy", "/dev/nbd2", {"remote": server.pid})


class Relay(SetUp):
    """One nbdkit file over socat over /dev/nbd3: only a process in between."""

    def __init__(self, options: dict[str, Any]) -> None:
        folder = WORK / "relay"
        socket, server = serve_copy(folder, options["size"])
        near = folder / "near.sock"
        relay = subprocess.Popen(
            ["socat", f"UNIX-LISTEN:{near}", f"UNIX-CONNECT:{socket}"],
            stdin=subprocess.DEVNULL,
        )
        wait_until(near.exists, f"{near} to be there")
        attach(near, "/dev/nbd3")
        super().__init__(
            "relay", "/dev/nbd3", {"relay": relay.pid, "remote": server.pid}
        )


SET_UPS: dict[str, Callable[[dict[str, Any]], SetUp]] = {
    "ours": Ours,
    "md": Md,
    "drbd": Drbd,
    "one_copy": OneCopy,
    "relay": Relay,
}

# --- what a measurement used ------------------------------------------------------


def machine_cpu_us() -> float:
    """Return the time that all CPUs have worked so far, with interrupts, in µs."""
    cpu = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = cpu[:7]
    return (user + nice + system + irq + softirq) * 1e6 / os.sysconf("SC_CLK_TCK")


def snapshot(set_up: SetUp) -> dict[str, float]:
    """Return the usage of the guest and of each of the set-up's processes so far."""
    found = {name: cpu_us([pid]) for name, pid in set_up.processes.items()}
    return {"machine": machine_cpu_us(), "switches": float(switches()), **found}


# --- measuring -------------------------------------------------------------------


def fio(device: str, *options: str) -> dict[str, Any]:
    """Run fio on a device and return its only job's answer."""
    command = ("fio", "--name=vm", f"--filename={device}", "--ioengine=libaio")
    text = run(*command, "--direct=1", "--output-format=json", *options)
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio on {device} got error {job['error']}")
    return job


def measure(set_up: SetUp, depth: int, seconds: float) -> dict[str, Any]:
    """Write 4 KiB at random for *seconds*, and return the figures."""
    before = snapshot(set_up)
    job = fio(
        set_up.device,
        *("--rw=randwrite", "--bs=4k", f"--iodepth={depth}", "--time_based"),
        *(f"--runtime={round(seconds * 1000)}ms", "--norandommap", "--randrepeat=0"),
        f"--ramp_time={round(RAMP_S * 1000)}ms",
    )
    after = snapshot(set_up)
    set_up.check()
    side = job["write"]
    # The ramp's requests cost as much and are not counted: scale up for them.
    requests = side["iops"] * (seconds + RAMP_S)
    return {
        "set_up": set_up.key,
        "depth": depth,
        "iops": side["iops"],
        "p50_us": side["clat_ns"]["percentile"]["50.000000"] / 1000,
        "p99_us": side["clat_ns"]["percentile"]["99.000000"] / 1000,
        "used": {name: (now - before[name]) / requests for name, now in after.items()},
    }


def rotated(things: list[SetUp], by: int) -> list[SetUp]:
    """Return *things* in a rotated order."""
    by %= len(things)
    return things[by:] + things[:by]


@contextlib.contextmanager
def logs_if_it_fails() -> Iterator[None]:
    """Print the ends of all logs if something goes wrong."""
    try:
        yield
    except BaseException:
        for log in sorted(WORK.glob("**/*.log")):
            lines = log.read_text(errors="replace").splitlines()[-20:]
            print("\n".join([f"--- {log}", *lines]))
        raise


def check_machine() -> None:
    """Fail unless copies and clock cost about as much as on a real machine."""
    clock = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    flags = Path("/proc/cpuinfo").read_text().split()
    if clock.read_text().strip() != "tsc" or {"erms", "fsrm"} & set(flags):
        raise RuntimeError("the machine's clock or CPU is not what tests/vm/vm.py sets")


def main() -> None:
    """Set up, measure, and report it."""
    check_machine()
    options = json.loads(sys.argv[1])
    WORK.mkdir(parents=True)
    set_ups: list[SetUp] = []
    for key in options["set_ups"]:
        note(f"setting up {key}")
        set_ups.append(SET_UPS[key](options))
        fio(set_ups[-1].device, "--rw=write", "--bs=256k", "--iodepth=4")
    for number in range(options["rounds"]):
        for depth in options["depths"]:
            for one in rotated(set_ups, number):
                figures = measure(one, depth, options["seconds"])
                print("measured", json.dumps({"round": number, **figures}), flush=True)
        note(f"round {number + 1} of {options['rounds']} is done")
    for one in set_ups:
        one.finish()
    note("done")


if __name__ == "__main__":
    with logs_if_it_fails():
        try:
            main()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            raise
