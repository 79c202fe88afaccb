# SPDX-License-Identifier: BSD-3-Clause
"""
Hooks of two real nodes: when they run, and that a role changes only if they allow it.

All hooks are one shell script. It notes its call, and then does what the file beside it
has for that node and hook.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import support
from e2e.lib.clients import connect
from e2e.lib.harness import MIB
from e2e.lib.node_site import Node, Pair

from nbd_mirror.base.errors import RoleError
from nbd_mirror.volume import control

CONTENT = b"answered" * 512
SCRIPT = """\
#!/bin/sh
who="$NBD_MIRROR_NODE $NBD_MIRROR_HOOK"
echo "$who $NBD_MIRROR_ROLE $NBD_MIRROR_EPOCH" >>{folder}/calls
act={folder}/$NBD_MIRROR_NODE.$NBD_MIRROR_HOOK
[ ! -e $act ] || . $act
"""
HOOKS = ("promoting", "promoted", "demoting", "demoted")


class Hooked(Pair):
    """A pair with all four hooks on both nodes."""

    def __init__(self, folder: Path, processes: support.Processes) -> None:
        super().__init__(folder, processes)
        self.script = folder / "hook"
        self.script.write_text(SCRIPT.format(folder=folder))
        self.script.chmod(0o755)
        lines = [f'{hook} = "{self.script}"' for hook in HOOKS]
        with self.config.open("a") as file:
            file.write("[hooks]\ntimeout = 5\n" + "\n".join(lines) + "\n")

    def calls(self, node: Node | None = None) -> list[str]:
        """Return the hooks that ran so far, in order; of a node, or "NODE HOOK"."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        words = [line.split() for line in lines]
        if node is None:
            return [f"{one[0]} {one[1]}" for one in words]
        return [one[1] for one in words if one[0] == node.name]

    def act(self, node: Node, hook: str, script: str) -> None:
        """Have a hook do something; nothing: as before."""
        (self.folder / f"{node.name}.{hook}").write_text(script + "\n")

    def wait_calls(self, node: Node, *last: str) -> None:
        """Wait until these hooks are the last that ran on a node."""
        support.wait_until(
            lambda: self.calls(node)[-len(last) :] == list(last),
            f"{last} on {node.name}",
            timeout_s=30,
        )


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Hooked:
    """Give two nodes with hooks, in sync; alpha is primary."""
    pair = Hooked(run_dir, processes)
    pair.bring_up()
    pair.wait_calls(pair.alpha, "demoted", "promoting", "promoted")
    pair.wait_calls(pair.beta, "demoted")
    return pair


def test_the_hooks_of_a_switchover_run_in_order(pair: Hooked) -> None:
    """The old primary stops its services first; the new one starts them last."""
    before = len(pair.calls())
    pair.act(pair.alpha, "demoting", "echo 'the door is' ${NBD_MIRROR_URI%%:*}")
    pair.alpha.cli("switchover", str(pair.config))
    pair.wait_calls(pair.beta, "promoting", "promoted")
    pair.wait_calls(pair.alpha, "demoting", "demoted")
    calls = pair.calls()[before:]
    assert calls[:2] == ["alpha demoting", "alpha demoted"] or calls[:2] == [
        "alpha demoting",
        "beta promoting",
    ]
    assert calls.index("beta promoting") < calls.index("beta promoted")
    assert "hook demoting: the door is nbd+unix" in pair.alpha.log
    lines = (pair.folder / "calls").read_text().splitlines()
    assert "alpha demoting primary 1" in lines
    assert "beta promoting secondary 1" in lines
    assert "beta promoted primary 2" in lines
    assert "alpha demoted secondary 1" in lines or "alpha demoted secondary 2" in lines
    pair.wait_in_sync()
    pair.assert_equal()


def test_a_hook_that_fails_stops_a_demotion(pair: Hooked) -> None:
    """Clients are served on, and the reason is shown; force goes on."""
    pair.act(pair.alpha, "demoting", "echo target is busy; exit 32")
    client = connect(pair.alpha.uri)
    for word in ("demote", "switchover"):
        failed = pair.alpha.cli(word, str(pair.config), check=False)
        assert failed.returncode == RoleError.exit_code
        assert "demoting ended with exit status 32: target is busy" in failed.stderr
        assert "this node stays primary" in failed.stderr
        assert f"nbd-mirror {word} " in failed.stderr
        client.pwrite(CONTENT, MIB)
        # What the hook stopped before it failed starts again.
        pair.wait_calls(pair.alpha, "demoting", "promoted")
    assert pair.primaries == ["alpha"]
    assert pair.alpha.status()["epoch"] == 1
    pair.alpha.cli("switchover", str(pair.config), "--force")
    pair.beta.wait_role("primary")
    pair.wait_in_sync()
    assert pair.beta.read(MIB, len(CONTENT)) == CONTENT


def test_a_hook_that_hangs_is_killed(pair: Hooked) -> None:
    """With what it has begun; the status and the control socket answer meanwhile."""
    begun = pair.folder / "begun"
    pair.act(pair.alpha, "demoting", f"sleep 300 & echo $! >{begun}; wait")
    failures: list[Exception] = []

    def demote() -> None:
        try:
            pair.alpha.ask("demote", force=False)
        except RoleError as error:
            failures.append(error)

    thread = threading.Thread(target=demote)
    thread.start()
    support.wait_until(lambda: begun.exists() and begun.read_text(), "the hook to run")
    assert pair.alpha.role == "primary"
    pair.alpha.write(MIB, CONTENT)
    thread.join(30)
    assert "did not end within 5s, and was killed" in str(failures[0])
    pid = int(begun.read_text())
    support.wait_until(lambda: not support_alive(pid), "its process to end")
    assert pair.primaries == ["alpha"]


def support_alive(pid: int) -> bool:
    """Tell whether a process runs, and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_a_hook_refuses_a_promotion(pair: Hooked) -> None:
    """Before any node has consented to it, so the primary may resume."""
    pair.act(pair.beta, "promoting", "echo no licence; exit 1")
    pair.alpha.ask("demote", force=False)
    pair.alpha.wait_role("secondary")
    with pytest.raises(RoleError, match="promoting ended with exit status 1: no lic"):
        pair.beta.ask("promote", force=False)
    with pytest.raises(RoleError, match="promoting ended"):
        pair.beta.ask("promote", force=True)
    assert pair.beta.status()["epoch"] == 1
    # A switchover to it does not come about: the role is taken back.
    pair.alpha.ask("promote", force=False)
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    pair.alpha.ask("switchover", node=None)
    support.wait_until(
        lambda: pair.alpha.status().get("epoch") == 3,
        "the role to be taken back",
        timeout_s=60,
    )
    pair.alpha.wait_role("primary")
    pair.wait_calls(pair.alpha, "promoting", "promoted")
    pair.beta.wait_role("secondary")


def test_a_hook_that_is_told_changes_no_role(pair: Hooked) -> None:
    """Its failure is in the log and in the status."""
    pair.act(pair.beta, "promoted", "echo no such unit; exit 5")
    pair.alpha.ask("switchover", node=None)
    pair.beta.wait_role("primary")
    support.wait_until(
        lambda: pair.beta.status().get("hook"), "the failure to be shown"
    )
    text = "promoted ended with exit status 5: no such unit"
    assert pair.beta.status()["hook"] == text
    assert text in pair.beta.cli("status", str(pair.config)).stdout
    pair.wait_in_sync()
    assert pair.primaries == ["beta"]


def test_a_killed_server_tells_its_role_again(pair: Hooked) -> None:
    """It resumes, and services come back; killed in a hook, no role has changed."""
    pair.alpha.kill()
    pair.alpha.serve()
    pair.wait_calls(pair.alpha, "promoting", "promoted")
    pair.wait_in_sync()
    begun = pair.folder / "begun"
    pair.act(pair.alpha, "demoting", f"echo $$ >{begun}; sleep 300")
    thread = threading.Thread(target=ask_and_lose, args=(pair.alpha,))
    thread.start()
    support.wait_until(lambda: begun.exists() and begun.read_text(), "the hook to run")
    pair.alpha.kill()
    thread.join(30)
    os.killpg(int(begun.read_text()), signal.SIGKILL)
    epoch = pair.beta.status()["epoch"]
    assert pair.beta.role == "secondary"
    pair.alpha.serve()
    pair.alpha.wait_role("primary")
    assert pair.alpha.status()["epoch"] == epoch + 1
    pair.wait_calls(pair.alpha, "promoting", "promoted")
    pair.wait_in_sync()


def ask_and_lose(node: Node) -> None:
    """Ask for a demotion whose server is killed."""
    with pytest.raises(Exception):  # noqa: B017, PT011  however the connection ends
        control.call(node.state, "demote", 30.0, force=False)


def test_a_node_that_was_overruled_stops_its_services(pair: Hooked) -> None:
    """Its server was lost; when it is back, another node is primary."""
    pair.alpha.kill()
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    pair.alpha.serve()
    pair.wait_calls(pair.alpha, "promoted", "demoted")
    pair.wait_in_sync()


def test_a_stop_waits_for_no_hook(pair: Hooked) -> None:
    """A server that is to end kills the hook that runs."""
    begun = pair.folder / "begun"
    pair.act(pair.beta, "demoted", f"echo $$ >{begun}; sleep 300")
    pair.beta.stop()
    pair.beta.serve()
    support.wait_until(lambda: begun.exists() and begun.read_text(), "the hook to run")
    pair.beta.stop()
    assert not support_alive(int(begun.read_text()))


def test_a_hook_that_others_may_change_is_not_run(pair: Hooked) -> None:
    """The server would run it with its own rights."""
    pair.script.chmod(0o777)
    with pytest.raises(RoleError, match=r"other users may change .*hook"):
        pair.alpha.ask("demote", force=False)
    pair.script.chmod(0o755)
    pair.config.chmod(0o666)
    with pytest.raises(RoleError, match=r"other users may change .*v\.toml"):
        pair.alpha.ask("demote", force=False)
    pair.config.chmod(0o644)
    assert pair.calls(pair.alpha)[-1] == "promoted"
    assert pair.primaries == ["alpha"]
