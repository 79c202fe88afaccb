# SPDX-License-Identifier: BSD-3-Clause
"""The direct door before the clients of others: qemu, libnbd, fio."""

from __future__ import annotations

import support
from e2e.direct.checks import (
    KIB,
    SIZE,
)
from e2e.lib.harness import MIB, Site


def qemu_io(site: Site, *commands: str) -> str:
    """Run qemu-io's commands on the volume."""
    words = [word for one in commands for word in ("-c", one)]
    done = site.processes.run(["qemu-io", "-f", "raw", *words, site.uri])
    # It reports a pattern that differs, and exits with 0 in some releases.
    assert "Pattern verification failed" not in done.stdout
    assert "error" not in done.stdout.lower()
    return done.stdout


def test_interop_qemu_io_and_nbdcopy(served: Site) -> None:
    """What qemu-io writes, nbdcopy copies out, and qemu-img finds the same."""
    support.requires_program("qemu-io", "qemu-img", "nbdcopy")
    qemu_io(
        served,
        "write -P 0xa5 16M 3M",
        "write -f -P 0x5a 17M 64k",
        "write -z -u 18M 64k",
        "discard 18880k 64k",
        "flush",
    )
    out = served.folder / "qemu.img"
    served.processes.run(["nbdcopy", served.uri, str(out)])
    content = out.read_bytes()
    assert content == served.local.read_bytes()
    assert content[16 * MIB : 17 * MIB] == b"\xa5" * MIB
    assert content[17 * MIB : 17 * MIB + 64 * KIB] == b"\x5a" * 64 * KIB
    assert content[18 * MIB : 18 * MIB + 64 * KIB] == bytes(64 * KIB)
    words = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(out), served.uri]
    assert "identical" in served.processes.run(words).stdout
    served.assert_equal()


def test_interop_nbdcopy_in_and_qemu_img_out(served: Site) -> None:
    """An image copied in by nbdcopy comes out of qemu-img the same."""
    support.requires_program("qemu-img", "nbdcopy")
    image, out = served.folder / "in.img", served.folder / "out.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    served.fill(image, 5 * MIB, offset=2 * MIB, seed=7)
    served.processes.run(["nbdcopy", "--flush", str(image), served.uri])
    words = ["qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, str(out)]
    served.processes.run(words)
    assert image.read_bytes() == out.read_bytes() == served.local.read_bytes()
    served.assert_equal()


def test_interop_nbdsh_and_qemu_io(served: Site) -> None:
    """What libnbd's shell writes, qemu-io reads, and the other way."""
    support.requires_program("nbdsh", "qemu-io")
    # It calls python3, which must be the one that has the module nbd.
    system = {"PATH": "/usr/bin:/bin"}
    program = "h.pwrite(b'\\x3c' * 65536, 20 << 20, nbd.CMD_FLAG_FUA)"
    served.processes.run(["nbdsh", "-u", served.uri, "-c", program], env=system)
    qemu_io(served, "read -P 0x3c 20M 64k", "write -P 0xc3 20M 64k")
    program = "assert h.pread(65536, 20 << 20) == b'\\xc3' * 65536"
    served.processes.run(["nbdsh", "-u", served.uri, "-c", program], env=system)
    served.assert_equal()


def test_interop_fio_writes_and_nbdcopy_reads(served: Site) -> None:
    """What fio writes from two jobs at once it verifies, and nbdcopy reads."""
    support.requires_program("fio", "nbdcopy")
    job = served.folder / "direct.fio"
    job.write_text(
        f"[global]\nioengine=nbd\nuri={served.uri}\nrw=randwrite\nbs=4k\n"
        "iodepth=16\nsize=4m\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\n"
        "[one]\noffset=24m\n[two]\noffset=28m\nbsrange=512-128k\n"
    )
    served.processes.run(["fio", f"--output={served.folder}/direct.out", str(job)])
    out = served.folder / "fio.img"
    served.processes.run(["nbdcopy", served.uri, str(out)])
    content = out.read_bytes()
    assert content == served.local.read_bytes()
    assert bytes(4096) not in (content[24 * MIB :][:4096], content[28 * MIB :][:4096])
    served.assert_equal()
