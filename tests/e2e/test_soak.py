# SPDX-License-Identifier: BSD-3-Clause
"""
Some of the soak: a while of random faults, and proof that it would find a loss.

A fresh seed each run looks where no run has looked; the fixed one is for telling a
new bug from an old one. Both are printed by the tool, with how to repeat them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("timed")]

SOAK = (sys.executable, "-P", "-m", "scripts.soak")
PROGRAMS = ("nbdkit", "qemu-nbd", "nbd-server")


@pytest.fixture
def folders(run_dir: Path) -> Path:
    """Give the folder in which the soak makes its own."""
    support.requires_program(*PROGRAMS)
    folder = run_dir / "s"
    folder.mkdir()
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return what scripts/soak/run would give it, and where its folders go."""
    folders = (support.ROOT, support.ROOT / "tests")
    return {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TMPDIR": str(folder),
    }


def soak(
    processes: support.Processes,
    folder: Path,
    *options: str,
    code: int = 0,
    limit_s: float = 220,
) -> tuple[dict[str, int], str]:
    """
    Run it to its end.

    Args:
        code: its exit status.
        limit_s: for all of it.

    Returns:
        Its totals, and what it said.
    """
    done = processes.run(
        [*SOAK, "--json", *options],
        env=environment(folder),
        check=False,
        timeout_s=limit_s,
    )
    print(done.stderr)
    kept = [path.read_text() for path in folder.glob("*/violation.txt")]
    assert code == done.returncode, "\n".join([done.stderr, *kept])
    return json.loads(done.stdout), done.stderr


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", ["fixed", "fresh"])
def test_random_faults_lose_nothing(
    processes: support.Processes, folders: Path, seed: str
) -> None:
    """Episodes through all doors: no block is wrong, all disks end equal."""
    number = 1 if seed == "fixed" else random.SystemRandom().randrange(1 << 32)
    minutes = "0.4" if seed == "fixed" else "0.6"
    totals, said = soak(
        processes, folders, "--seed", str(number), "--minutes", minutes, "--verbose"
    )
    assert 0 == totals["violations"]
    assert "door direct" in said
    assert "door python" in said
    assert totals["writes_answered"] > 200
    assert totals["blocks_checked"] > 10_000
    assert totals["comparisons"] >= totals["episodes"]
    assert [] == list(folders.iterdir()), "nothing is left of what went well"


@pytest.mark.parametrize("how", ["old-block", "torn-block", "copy", "dirty-map"])
def test_loss_is_found(processes: support.Processes, folders: Path, how: str) -> None:
    """What was spoiled behind the mirror's back ends the run and is kept."""
    totals, said = soak(
        processes, folders, "--seed", "3", "--episode", "0", "--sabotage", how, code=1
    )
    assert 1 == totals["violations"]
    assert "repeat: scripts/soak/run --seed 3 --episode 0" in said
    (folder,) = folders.iterdir()
    report = (folder / "violation.txt").read_text()
    words = {
        "old-block": ("found:   write", "history", "local disk, quiet"),
        "torn-block": ("no whole block", "the primary was killed"),
        "copy": ("dr differs from local", "found:   write", "allowed: write"),
        "dirty-map": ("dr",),
    }
    for word in words[how]:
        assert word in report
    for kept in ("local.img", "dr.img", "state/superblock", "v.toml"):
        assert (folder / kept).exists()


@pytest.fixture
def root_folders(folders: Path) -> Path:
    """Give the folder, if there may be network namespaces."""
    support.requires(os.geteuid() == 0, "network namespaces need root")
    support.requires_program("ip", "nsenter")
    return folders


def left_namespaces() -> set[str]:
    """Return the network namespaces of soaks that have ended."""
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=30
    )
    names = {line.split()[0] for line in listed.stdout.splitlines() if line}
    owners = {name: re.match(r"nbdm-nodes-(\d+)-", name) for name in names}
    return {
        name
        for name, owner in owners.items()
        if owner is not None and not Path(f"/proc/{owner[1]}").exists()
    }


@pytest.mark.timeout(420)
def test_nodes_lose_nothing(processes: support.Processes, root_folders: Path) -> None:
    """Two nodes, faults and an operator, with a fresh seed: each image is right."""
    seed = str(random.SystemRandom().randrange(1 << 32))
    options = ("--nodes", "2", "--seed", seed, "--minutes", "0.7", "--verbose")
    totals, said = soak(processes, root_folders, *options, limit_s=400)
    assert 0 == totals["violations"]
    assert "2 nodes" in said
    assert totals["writes_answered"] > 100
    assert totals["comparisons"] >= 2 * totals["episodes"]
    assert [] == list(root_folders.iterdir()), "nothing is left of what went well"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nodes-old-block", ("found:   write", "allowed: write")),
        ("nodes-copy", ("beta differs from alpha when quiet", "found:   write")),
        ("nodes-failover", ("beta, promoted by force", "allowed: write")),
        ("nodes-two-primaries", ("alpha and beta serve clients at once",)),
    ],
)
def test_broken_nodes_are_found(
    processes: support.Processes, root_folders: Path, how: str, words: tuple[str, ...]
) -> None:
    """What a mirror with a bug would do ends the run, and all hosts are gone."""
    before = left_namespaces()
    options = ("--nodes", "2", "--seed", "3", "--episode", "0", "--sabotage", how)
    totals, said = soak(processes, root_folders, *options, code=1)
    assert 1 == totals["violations"]
    assert "repeat: scripts/soak/run --seed 3 --episode 0 --nodes 2" in said
    (folder,) = root_folders.iterdir()
    report = (folder / "violation.txt").read_text()
    for word in words:
        assert word in report
    assert left_namespaces() <= before


def test_interrupted_soak_leaves_nothing(
    processes: support.Processes, folders: Path
) -> None:
    """Ctrl-C ends every process and removes the folder."""
    before = support.marked_processes()
    running = processes.start(
        [*SOAK, "--seed", "4", "--minutes", "5"],
        env=environment(folders),
    )
    support.wait_until(
        lambda: any("local.img" in str(p) for p in folders.glob("*/*")), "a volume"
    )
    support.wait_until(
        lambda: any("nbdkit" in c for c in support.marked_processes().values()),
        "its servers",
    )
    os.kill(running.pid, signal.SIGINT)
    try:
        assert 130 == running.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail("it did not end within 60 s")
    assert [] == list(folders.iterdir())
    support.wait_until(
        lambda: set(support.marked_processes()) <= set(before), "its processes to end"
    )
