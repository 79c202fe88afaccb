# SPDX-License-Identifier: BSD-3-Clause
"""What attaching needs: root, the kernel's nbd; and what works without them."""

from __future__ import annotations

import contextlib
import os
import re

from ..base.errors import AccessError, UnsupportedError
from ..base.hints import quote
from ..base.programs import find_program, run
from ..volume.config import VolumeConfig
from . import devices

__all__ = ["again", "check_kernel", "check_root", "other_ways"]


def again(device: str, option: str = "") -> str:
    """Return the command that attaches to the same device."""
    return " ".join(
        filter(None, ["nbd-mirror attach CONFIG", option, device and quote(device)])
    )


def check_kernel(config: VolumeConfig, device: str = "") -> None:
    """
    Load the kernel's nbd driver if it is not there.

    Args:
        config: of the volume to attach.
        device: to attach it as, or "".
    Raises:
        UnsupportedError: the kernel has none; the hint shows other ways.
        AccessError: not root.
    """
    check_root("attach", again(device))
    if (devices.SYS_BLOCK / "nbd0").exists():
        return
    said = "modprobe is not installed"
    with contextlib.suppress(UnsupportedError):
        said = run(find_program("modprobe", "kmod"), "nbd").said
    if not (devices.SYS_BLOCK / "nbd0").exists():
        raise UnsupportedError(
            f"this kernel has no nbd driver ({said or 'modprobe nbd made no device'}); "
            "the volume can be used without it",
            other_ways(config),
        )


def check_root(verb: str, command: str) -> None:
    """
    Check that root runs the command.

    Only root may look at what `attach` noted: to another user no volume is attached.

    Raises:
        AccessError: another user does.
    """
    if os.geteuid() != 0:
        raise AccessError(f"only root may {verb} a device", f"sudo {command}")


def other_ways(config: VolumeConfig) -> str:
    """Return the commands that use a volume without the kernel's nbd."""
    uri, folder = config.listen.uri, f"/run/nbd-mirror/{config.name}.fuse"
    if config.listen.path is not None:
        path = config.listen.path.replace(",", ",,")  # as QEMU parses it
        server = f"server.type=unix,server.path={path}"
    else:
        server = (
            f"server.type=inet,server.host={config.listen.client_host},"
            f"server.port={config.listen.port}"
        )
    # QEMU requires a letter first.
    node = re.sub(r"^(?![A-Za-z])", "v", re.sub(r"[^A-Za-z0-9-]", "-", config.name))
    node = node[:31]
    drive = f"file={uri},format=raw,if=virtio,cache=none"
    blockdev = f"driver=nbd,node-name={node},{server}"
    return "\n".join(
        [
            "with FUSE and a loop device (packages libnbd-bin, fuse3):",
            f"  mkdir -p {folder}",
            f"  nbdfuse {folder} {quote(uri)} &",
            f"  until [ -e {folder}/nbd ]; do sleep 0.1; done",
            f"  mount -o loop {folder}/nbd /mnt    # undo: umount /mnt {folder}",
            "or give it to QEMU as a disk:",
            f"  -drive {quote(drive)}",
            f"  -blockdev {quote(blockdev)} -device virtio-blk-pci,drive={node}",
        ]
    )
