# SPDX-License-Identifier: BSD-3-Clause
"""
The demonstration of a failover: two hosts, a database, and the first host dies.

The two hosts are network namespaces of this one, with a link between them. Each has an
image, a state and a server of its own. It is also a test: it checks each claim that it
prints. Exit status: 0 all checks passed; 1 one failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stage import DemoError, Stage, interruptible

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.volume import control

STEPS = 9
HOSTS = ("alpha", "beta")
NETWORK = "10.78.41"  # addresses that exist in the namespaces alone
PORT = 10810
ENOUGH = 300  # transactions before the first host dies
PROGRAMS = ("ip", "nsenter", "nbdfuse", "mkfs.ext4", "e2fsck", "cmp")

CONFIG = """\
name = "pg"
size = "256MiB"

[[node]]
name = "alpha"
address = "{network}.1:{port}"
local = "{folder}/alpha/pg.img"
state = "{folder}/alpha/state"
listen = "unix:{folder}/alpha/pg.sock"

[[node]]
name = "beta"
address = "{network}.2:{port}"
local = "{folder}/beta/pg.img"
state = "{folder}/beta/state"
listen = "unix:{folder}/beta/pg.sock"

[tls]
key = "{folder}/pg.key"
"""

# A command on a host: in its namespace, and as the node of its name.
ON_HOST = """\
#!/bin/sh
export NBD_MIRROR_NODE={host}
exec nsenter --net=/run/netns/{space} "$@"
"""


class Failover:
    """The steps of the demonstration."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._folder = stage.folder
        self._spaces = {host: f"nbdm-demo-{os.getpid()}-{host}" for host in HOSTS}
        self._load: subprocess.Popen[bytes] | None = None

    def play(self) -> None:
        """Run all steps."""
        self.make_hosts()
        self.configure()
        self.serve()
        self.promote()
        self.use("alpha")
        self.lose_alpha()
        self.fail_over()
        self.return_alpha()
        self.fail_back()

    # --- two hosts ---

    def make_hosts(self) -> None:
        """Step: two network namespaces and a link."""
        stage = self._stage
        stage.step("Two hosts, alpha and beta, with a link between them")
        for space in self._spaces.values():
            stage.on_exit(lambda space=space: stage.quietly(f"ip netns del {space}"))
            stage.run(f"ip netns add {space}")
        alpha, beta = self._spaces.values()
        stage.run(f"ip link add eth netns {alpha} type veth peer name eth netns {beta}")
        for number, space in enumerate((alpha, beta), 1):
            stage.run(f"ip -n {space} addr add {NETWORK}.{number}/24 dev eth")
            stage.run(f"ip -n {space} link set eth up")
        for host, space in self._spaces.items():
            (self._folder / host).mkdir()
            script = self._folder / f"on-{host}"
            script.write_text(ON_HOST.format(host=host, space=space))
            script.chmod(0o755)

    def configure(self) -> None:
        """Step: one file and one key for both hosts."""
        stage = self._stage
        stage.step("A volume: one file and one key, the same on both hosts")
        config = self._folder / "pg.toml"
        config.write_text(
            CONFIG.format(folder=self._folder, network=NETWORK, port=PORT)
        )
        stage.show_file(config)
        stage.run("./on-alpha nbd-mirror key pg.toml")
        for host in HOSTS:
            stage.run(f"truncate -s 256M {host}/pg.img")
            stage.run(f"./on-{host} nbd-mirror create pg.toml")

    def serve(self) -> None:
        """Step: a server on each host; both are secondaries."""
        self._stage.step("A server on each host; neither serves clients yet")
        for host in HOSTS:
            self._serve(host)

    def _serve(self, host: str) -> None:
        self._stage.on_exit(lambda: self._stop(host))
        self._stage.run(f"./on-{host} nbd-mirror serve pg.toml")

    def promote(self) -> None:
        """Step: alpha's data counts; beta is filled."""
        stage = self._stage
        stage.step("An operator says once which copy counts: alpha's")
        stage.run("./on-alpha nbd-mirror promote pg.toml")
        stage.run("./on-alpha nbd-mirror wait pg.toml --for in_sync --timeout 30s")
        stage.run("./on-beta nbd-mirror status pg.toml")

    # --- the disk and the database ---

    def use(self, host: str) -> None:
        """Step: ext4, and a database that commits as fast as it can."""
        stage = self._stage
        stage.step("ext4 on alpha's disk, and a database that commits")
        self._show_disk(host)
        stage.run(f"mkfs.ext4 -q -F {host}/disk/nbd")
        self._mount(host)
        self._begin_load(host)
        stage.wait_until(
            lambda: committed(self._folder) >= ENOUGH,
            f"{ENOUGH} transactions",
            timeout_s=30,
        )
        stage.proven(f"{committed(self._folder)} transactions are committed")

    def _show_disk(self, host: str) -> None:
        """Show the volume as the file HOST/disk/nbd."""
        stage = self._stage
        socket = quote(str(self._folder / host / "pg.sock"))
        where = self._folder / host / "disk"
        where.mkdir(exist_ok=True)
        stage.on_exit(lambda: stage.unmount(f"{host}/disk"))
        process = stage.start(f"nbdfuse {host}/disk 'nbd+unix:///?socket={socket}'")
        stage.wait_until(
            lambda: process.poll() is not None or (where / "nbd").exists(), "nbdfuse"
        )
        if process.poll() is not None:
            raise DemoError("nbdfuse ended: without FUSE there is no disk to mount")

    def _mount(self, host: str) -> None:
        stage = self._stage
        (self._folder / host / "mnt").mkdir(exist_ok=True)
        stage.on_exit(lambda: stage.unmount(f"{host}/mnt"))
        stage.run(f"mount -o loop {host}/disk/nbd {host}/mnt")

    def _begin_load(self, host: str) -> None:
        script = Path(__file__).with_name("demo_load.py")
        self._load = self._stage.start(
            f"{sys.executable} {script} {host}/mnt/db committed", log="load.log"
        )

    def _end_load(self) -> None:
        assert self._load is not None
        self._load.kill()
        self._load.wait()

    def _check_database(self, host: str) -> None:
        """Check that each transaction that was told to be committed is there."""
        told = committed(self._folder)
        with contextlib.closing(sqlite3.connect(self._folder / host / "mnt/db")) as db:
            (sound,) = db.execute("PRAGMA integrity_check").fetchone()
            (rows,) = db.execute("SELECT count(*) FROM told").fetchone()
        self._stage.check(
            sound == "ok" and rows >= told,
            f"every committed transaction is there: {told}",
            f"{told} transactions were committed, {rows} are there: {sound}",
        )

    # --- the failover ---

    def lose_alpha(self) -> None:
        """Step: alpha dies: its server is killed, its cable pulled."""
        stage = self._stage
        stage.step("alpha dies, in the middle of its transactions")
        pid = self._pid("alpha")
        stage.run(f"ip -n {self._spaces['alpha']} link set eth down")
        stage.run(f"kill -9 {pid}")
        self._end_load()
        for what in ("mnt", "disk"):
            stage.quietly(f"umount -l alpha/{what}")
        stage.say("A silent connection is asked every 5 s, and given up within 10 s.")
        stage.wait_until(self._beta_is_alone, "beta to notice", timeout_s=30)
        stage.run("./on-beta nbd-mirror status pg.toml")

    def fail_over(self) -> None:
        """Step: one command on beta; the database goes on there."""
        stage = self._stage
        stage.step("Fail over: one command on beta")
        stage.say(
            "beta cannot know whether alpha went on alone, so an operator says that it "
            "did not."
        )
        stage.run("./on-beta nbd-mirror promote pg.toml --force")
        self._show_disk("beta")
        self._mount("beta")
        self._check_database("beta")
        before = committed(self._folder)
        self._begin_load("beta")
        stage.wait_until(
            lambda: committed(self._folder) >= before + ENOUGH,
            f"{ENOUGH} more transactions",
            timeout_s=30,
        )
        stage.proven(f"the database goes on: {committed(self._folder)} transactions")

    def return_alpha(self) -> None:
        """Step: alpha is back, and is made equal while beta works."""
        stage = self._stage
        stage.step("alpha comes back: it is made equal, without a command")
        stage.run(f"ip -n {self._spaces['alpha']} link set eth up")
        self._serve("alpha")
        stage.run("./on-beta nbd-mirror wait pg.toml --for in_sync --timeout 60s")
        stage.run("./on-alpha nbd-mirror status pg.toml")

    def fail_back(self) -> None:
        """Step: switch over to alpha; both images are equal."""
        stage = self._stage
        stage.step("Fail back: a switchover, and nothing is copied")
        self._end_load()
        stage.run("umount beta/mnt")
        stage.run("umount beta/disk   # ends nbdfuse")
        stage.run("./on-beta nbd-mirror switchover pg.toml alpha")
        self._show_disk("alpha")
        self._mount("alpha")
        self._check_database("alpha")
        stage.run("umount alpha/mnt")
        stage.run("umount alpha/disk   # ends nbdfuse")
        for host in HOSTS:
            stage.run(f"./on-{host} nbd-mirror stop pg.toml")
        stage.run("cmp alpha/pg.img beta/pg.img")
        stage.proven("both images are equal, byte for byte")
        stage.run("e2fsck -fn alpha/pg.img")

    # --- helpers ---

    def _beta_is_alone(self) -> bool:
        status: dict[str, Any] = control.call(self._folder / "beta/state", "status")
        return not any(peer["connected"] for peer in status["node"]["peers"])

    def _pid(self, host: str) -> int:
        answer: dict[str, Any] = control.call(self._folder / host / "state", "ping")
        return int(answer["pid"])

    def _stop(self, host: str) -> None:
        """End the server of *host*, if it still runs."""
        with contextlib.suppress(MirrorError, OSError):
            pid = self._pid(host)
            if not self._stage.quietly(f"./on-{host} nbd-mirror stop pg.toml"):
                os.kill(pid, 9)


def committed(folder: Path) -> int:
    """Return how many transactions the load was told to be committed."""
    path = folder / "committed"
    return path.stat().st_size if path.exists() else 0


def check_programs() -> None:
    """Raise DemoError if a program is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise DemoError(f"not installed: {', '.join(missing)}; scripts/setup says why")
    if os.geteuid() != 0:
        raise DemoError("network namespaces and mounts need root")


def main() -> int:
    """Play the demonstration."""
    argparse.ArgumentParser(
        prog="scripts/demo-failover", description=__doc__
    ).parse_args()
    interruptible()
    try:
        check_programs()
        with Stage(STEPS) as stage:
            stage.say("A database that survives the loss of its host.")
            stage.say(f"All happens in {stage.folder}, which is removed at the end.")
            Failover(stage).play()
            stage.say("")
            stage.proven(f"all as it should be, in {stage.elapsed_s:.0f} s")
    except (DemoError, MirrorError, OSError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; all is cleaned up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
