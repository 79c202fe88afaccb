# SPDX-License-Identifier: BSD-3-Clause
"""
Attaching: which device, which time-out, and when it is refused.

The kernel's own nbd is tried in the virtual machine; here the choices are
tested on a tree of files in the form of /sys/block.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import support

from nbd_mirror.base.errors import (
    BusyError,
    MirrorIOError,
    MissingError,
    NotRunningError,
    UnsupportedError,
)
from nbd_mirror.commands import stop
from nbd_mirror.device import attach, attached, devices
from nbd_mirror.rules.content import Choice
from nbd_mirror.volume.config import VolumeConfig, load


@pytest.fixture
def config(tmp_path: Path) -> VolumeConfig:
    """Give a volume with a state directory."""
    (tmp_path / "st").mkdir()
    path = tmp_path / "v.toml"
    path.write_text(
        'name="v"\nsize="1GiB"\nlocal="d"\nstate="st"\nhold="3s"\n'
        f'listen="unix:{tmp_path}/v.sock"\n'
        '[[remote]]\nname="a"\nuri="nbd://h"\ndeadline="5s"\n'
        '[[remote]]\nname="b"\nuri="nbd://h"\ndeadline="20s"\n'
    )
    return load(path)


@pytest.fixture
def sys_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a tree like /sys/block: nbd0 in use, nbd1 being connected, two free."""
    root = tmp_path / "block"
    for name, size, pid in (
        ("nbd0", 8, 1),
        ("nbd1", 0, 7),
        ("nbd10", 0, 0),
        ("nbd2", 0, 0),
    ):
        (root / name / "holders").mkdir(parents=True)
        (root / name / "size").write_text(f"{size}\n")
        (root / name / "dev").write_text(f"43:{int(name[3:]) * 32}\n")
        if pid:
            (root / name / "pid").write_text(f"{pid}\n")
    monkeypatch.setattr(devices, "SYS_BLOCK", root)
    mounts, swaps = tmp_path / "mountinfo", tmp_path / "swaps"
    mounts.write_text("22 1 254:0 / / rw - ext4 /dev/root rw\n")
    swaps.write_text("Filename Type Size Used Priority\n")
    monkeypatch.setattr(devices, "MOUNTINFO", mounts)
    monkeypatch.setattr(devices, "SWAPS", swaps)
    return root


def test_timeout_is_finite_and_above_what_a_request_may_wait(
    config: VolumeConfig,
) -> None:
    """The hold and a command that starves for 8 deadlines of 20 s fit into it."""
    assert attach.timeout_s(config) > config.hold + 8 * 20
    assert math.isfinite(attach.timeout_s(config))


@pytest.mark.parametrize(
    ("size", "block"),
    [(1 << 30, 4096), ((1 << 30) + 512, 512), ((1 << 30) + 2048, 2048), (1000, 512)],
)
def test_block_size_never_cuts_off_the_end(size: int, block: int) -> None:
    """4096-byte blocks, unless the size is no multiple of them."""
    assert block == attach.block_size(size)


def test_device_free_is_the_first_without_size_and_pid(sys_block: Path) -> None:
    """A device that is just being connected has a pid and no size: not free."""
    assert devices.first_free() == "nbd2"


def test_device_free_none_says_how_to_get_more(sys_block: Path) -> None:
    """When all are in use the message says how many there are."""
    for name in ("nbd2", "nbd10"):
        (sys_block / name / "size").write_text("8\n")
    with pytest.raises(BusyError, match="all 4 nbd devices are in use"):
        devices.first_free()


@pytest.mark.parametrize("device", ["/dev/nbd0", "nbd1"])
def test_device_in_use_is_refused(sys_block: Path, device: str) -> None:
    """A named device must be free."""
    with pytest.raises(BusyError, match="is in use"):
        devices.check_free(device)


@pytest.mark.parametrize("device", ["/dev/nbd99", "/dev/sda", "/dev/nbd0p1", "../nbd0"])
def test_device_that_is_none_is_refused(sys_block: Path, device: str) -> None:
    """Only whole nbd devices that exist are taken."""
    with pytest.raises(MissingError):
        devices.check_free(device)


def test_arguments_have_finite_timeout_and_no_persist(config: VolumeConfig) -> None:
    """nbd-client gets the socket, the block size and the time-out."""
    arguments = attach._arguments(config, "nbd2", 512, 4)
    assert ["-unix", str(config.listen.path), "/dev/nbd2"] == arguments[:3]
    assert ["-b", "512", "-t", str(attach.timeout_s(config)), "-C", "4"] == arguments[
        3:
    ]


def test_a_request_fails_once_it_timed_out_on_every_connection(
    config: VolumeConfig,
) -> None:
    """The kernel tries the next one, and at last waits for a new server."""
    one, wait = attach.timeout_s(config), attach.RECONNECT_S
    assert attach.fails_after_s(config, 1) == one + wait
    assert attach.fails_after_s(config, 3) == 3 * one + wait


def test_attached_device_is_remembered_until_it_is_anothers(
    config: VolumeConfig, sys_block: Path
) -> None:
    """The note holds for this boot and this connection only."""
    assert attach.attached_device(config) == ""
    attach._note(config, "nbd0")
    assert attach.attached_device(config) == "/dev/nbd0"
    (sys_block / "nbd0" / "pid").write_text("999\n")
    assert attach.attached_device(config) == ""
    (sys_block / "nbd0" / "pid").write_text("1\n")
    note = config.state_dir / "attached"
    note.write_text(json.dumps({**json.loads(note.read_text()), "boot_id": "other"}))
    assert attach.attached_device(config) == ""
    for garbage in ("garbage", "[]", "{}", '{"device": 7}', "[" * 4000):
        note.write_text(garbage)
        assert attach.attached_device(config) == ""


def test_block_size_outlives_a_detach_and_the_device_does_not(
    config: VolumeConfig, sys_block: Path
) -> None:
    """What an operator asked for holds for the next attach, by a unit too."""
    attach._note(config, "nbd0", 512, asked=True, connections=2)
    noted = attached.load(config.state_dir)
    assert (noted.block_size, noted.asked, noted.connections) == (512, True, 2)
    attached.save(config.state_dir, noted.detached())
    assert attach.attached_device(config) == ""
    noted = attached.load(config.state_dir)
    assert (noted.block_size, noted.asked, noted.device) == (512, True, "")


def test_note_follows_no_link(config: VolumeConfig, tmp_path: Path) -> None:
    """A link planted at the file's name is replaced, its target left alone."""
    target = tmp_path / "precious"
    target.write_text("keep")
    (config.state_dir / "attached").symlink_to(target)
    attached.save(config.state_dir, attached.Attached(512, asked=True))
    assert target.read_text() == "keep"
    assert attached.load(config.state_dir).block_size == 512
    assert [path.name for path in config.state_dir.iterdir()] == ["attached"]


def test_device_of_this_very_server_is_not_taken_back(
    config: VolumeConfig, sys_block: Path
) -> None:
    """Without another server than the one noted nothing is sent again."""
    assert attach.take_back(config) is False
    attach._note(config, "nbd0")
    assert attach.take_back(config) is False


def test_limits_bound_what_the_kernel_sends(sys_block: Path) -> None:
    """Reads, writes and trims are cut to what the time-out allows."""
    queue = sys_block / "nbd2" / "queue"
    queue.mkdir()
    for name, most in (
        ("max_hw_sectors_kb", 32767),
        ("max_sectors_kb", 1280),
        ("discard_max_hw_bytes", 1 << 32),
        ("discard_max_bytes", 1 << 32),
    ):
        (queue / name).write_text(f"{most}\n")
    devices.set_limits("nbd2")
    assert (queue / "max_sectors_kb").read_text() == "1024"
    assert int((queue / "discard_max_bytes").read_text()) == 32 << 20


def test_detach_of_a_mounted_device_names_the_mount_point(
    config: VolumeConfig, sys_block: Path
) -> None:
    """A mount, of a partition too, is never pulled away."""
    attach._note(config, "nbd0")
    line = "30 22 43:{} / /mnt/my\\040disk rw - ext4 /dev/nbd0 rw\n"
    devices.MOUNTINFO.write_text(line.format(0))
    with pytest.raises(BusyError, match="it is mounted on /mnt/my disk"):
        attach.detach(config)
    (sys_block / "nbd0" / "nbd0p1").mkdir()
    (sys_block / "nbd0" / "nbd0p1" / "dev").write_text("43:1\n")
    devices.MOUNTINFO.write_text(line.format(1))
    with pytest.raises(BusyError, match="it is mounted on /mnt/my disk"):
        attach.detach(None, "/dev/nbd0")


# Any user may mount by FUSE, on a folder with a name like these. The first blank
# ends a line, or a field, of text alone.
ODD_NAMES = ("a\x0bb", "\udcff", "\u2028", "\x85 x", "a b\tc\nd\\e", "\r")

# In a mount namespace of its own: says what uses the device that is mounted there,
# and what the demonstration takes for mounted.
LOOK = """
import os, sys
from pathlib import Path
root, where = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, sys.argv[3])
from nbd_mirror.device import devices
import stage
devices.SYS_BLOCK = root
device = os.stat(where).st_dev
number = f"{os.major(device)}:{os.minor(device)}"
(root / "nbd0" / "dev").write_text(number)
assert devices.user_of("nbd0") == f"it is mounted on {where}", devices.user_of("nbd0")
(root / "nbd0" / "dev").write_text("43:0")
assert devices.user_of("nbd0") == ""
assert stage.mounted(where)
assert not stage.mounted(root)
"""


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_mounts_of_any_name_are_looked_at(
    name: str, sys_block: Path, tmp_path: Path
) -> None:
    """Another user's mount point keeps no device from being detached."""
    support.requires(os.geteuid() == 0, "only root mounts")
    where = tmp_path / name
    where.mkdir()
    scripts = support.ROOT / "scripts"
    mount = 'mount -t tmpfs none "$3" && exec "$0" -c "$1" "$2" "$3" "$4"'
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", mount),
            *(sys.executable, LOOK, sys_block, where, scripts),
        ],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def test_process_that_calls_itself_anything_is_known_by_its_start() -> None:
    """The server's name is any bytes: no letters of an encoding, and a ')'."""
    name = 'open("/proc/self/comm", "wb").write(b"\\xff) Z 1\\n")'
    code = f"{name}; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = attached.process_identity(process.pid)
        assert found.startswith(f"{process.pid}/")
        assert found.rpartition("/")[2].isdigit()
        assert not stop._is_kept(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
    assert attached.process_identity(process.pid) == ""


CLIENT = """#!/bin/sh
# It attaches as the real one does, and somebody presses Ctrl-C, which signals all
# processes of the command's group.
echo 8 >{block}/nbd2/size
echo 77 >{block}/nbd2/pid
group() {{ sed 's/.*) //' /proc/$1/stat | cut -d ' ' -f 3; }}
ours=$(group $$) commands=$(group $PPID)
kill -{signal} $PPID
[ $ours != $commands ] || kill -{signal} $$
exec sleep 0.5
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_attach_that_is_interrupted_has_noted_its_device(
    config: VolumeConfig,
    sys_block: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """Else the next one would take a second device for the same disk."""
    client = tmp_path / "nbd-client"
    client.write_text(CLIENT.format(block=sys_block, signal=number.name[3:]))
    client.chmod(0o755)
    monkeypatch.setattr(attach, "check_kernel", lambda *_: None)
    monkeypatch.setattr(attach, "find_program", lambda *_: os.fspath(client))
    monkeypatch.setattr(attach, "_await_servers", lambda _: None)
    choice = Choice(4096, ""), False
    monkeypatch.setattr(attach, "_choose", lambda *_: choice)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            attach.attach(config, 1 << 30)
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert attach.attached_device(config) == "/dev/nbd2"


FAILING_CLIENT = """#!/bin/sh
if [ $1 = -d ]; then
  echo detach >>{calls}
  [ {detaches} = yes ] || exit 1
  echo 0 >{block}/nbd2/size
  exec rm {block}/nbd2/pid
fi
echo 8 >{block}/nbd2/size
echo {pid} >{block}/nbd2/pid
echo cannot >&2
exit 1
"""


@pytest.fixture
def failing(
    sys_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Path]:
    """Give a nbd-client that fails after the kernel has attached, and its calls."""

    def make(pid: str, detaches: str) -> Path:
        client, calls = tmp_path / "nbd-client", tmp_path / "calls"
        text = FAILING_CLIENT.format(
            block=sys_block, pid=pid, detaches=detaches, calls=calls
        )
        client.write_text(text)
        client.chmod(0o755)
        monkeypatch.setattr(attach, "check_kernel", lambda *_: None)
        monkeypatch.setattr(attach, "find_program", lambda *_: os.fspath(client))
        monkeypatch.setattr(attach, "_choose", lambda *_: (Choice(4096, ""), False))
        return calls

    return make


def test_attach_that_fails_leaves_no_device(
    config: VolumeConfig, failing: Callable[[str, str], Path]
) -> None:
    """The kernel has attached it, and nbd-client fails after that."""
    calls = failing("$$", "yes")
    with pytest.raises(MirrorIOError, match=r"could not attach /dev/nbd2: cannot$"):
        attach.attach(config, 1 << 30)
    assert calls.read_text() == "detach\n"
    assert devices.is_free("nbd2")
    assert attach.attached_device(config) == ""


def test_attach_that_fails_and_leaves_its_device_has_noted_it(
    config: VolumeConfig, failing: Callable[[str, str], Path]
) -> None:
    """It cannot be detached now: the next attach takes no second one."""
    failing("$$", "no")
    with pytest.raises(MirrorIOError, match="it is attached all the same") as caught:
        attach.attach(config, 1 << 30)
    assert caught.value.hint == "nbd-mirror detach CONFIG"
    assert attach.attached_device(config) == "/dev/nbd2"


def test_attach_that_fails_leaves_a_strangers_device_alone(
    config: VolumeConfig, failing: Callable[[str, str], Path]
) -> None:
    """Another command has attached it in the same moment."""
    calls = failing("1", "yes")
    with pytest.raises(MirrorIOError, match="perhaps by another program") as caught:
        attach.attach(config, 1 << 30)
    assert "nbd-mirror detach /dev/nbd2" in caught.value.hint
    assert not calls.exists()
    assert attach.attached_device(config) == ""


def test_detach_of_a_device_with_holders_is_refused(sys_block: Path) -> None:
    """A device under md or LVM is in use."""
    (sys_block / "nbd0" / "holders" / "dm-0").mkdir()
    with pytest.raises(BusyError, match="dm-0 is built on it"):
        attach.detach(None, "/dev/nbd0")


def test_detach_of_what_is_not_attached_is_told(
    config: VolumeConfig, sys_block: Path
) -> None:
    """Nothing attached: said, for a volume and for a device."""
    with pytest.raises(NotRunningError, match="volume v is attached to no device"):
        attach.detach(config)
    with pytest.raises(NotRunningError, match="/dev/nbd2 is not attached"):
        attach.detach(None, "/dev/nbd2")


def test_kernel_without_nbd_shows_the_other_ways(config: VolumeConfig) -> None:
    """The message holds the commands for FUSE and QEMU, with this volume's socket."""
    support.requires(os.geteuid() == 0, "only root attaches")
    support.requires(not Path("/sys/block/nbd0").exists(), "the kernel has nbd")
    with pytest.raises(UnsupportedError, match="this kernel has no nbd") as caught:
        attach.check_kernel(config)
    for part in ("nbdfuse ", "mount -o loop", "-drive ", "-blockdev ", "v.sock"):
        assert part in caught.value.hint
