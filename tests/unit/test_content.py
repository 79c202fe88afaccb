# SPDX-License-Identifier: BSD-3-Clause
"""Which block size some content needs: disks as the real programs make them."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import support

from nbd_mirror.rules.content import Choice, Need, Read, choose, need_of

SIZE = 64 << 20
Make = Callable[..., Path]


def reader(data: bytes) -> Read:
    """Return a reader of *data*, as of a disk with that content."""
    return lambda at, count: data[at : at + count]


def file_reader(path: Path) -> Read:
    """Return a reader of an image."""

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    return read


def need(path: Path) -> Need | None:
    """Return what the image needs."""
    return need_of(file_reader(path), path.stat().st_size)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Give what makes a sparse image and runs a program on it."""

    def made(command: str, size: int = SIZE, said: str = "") -> Path:
        image = tmp_path / "image"
        if not image.exists():
            image.touch()
            os.truncate(image, size)
        program, *words = command.split()
        support.requires_program(program)
        subprocess.run(
            [program, *words, str(image)],
            input=said,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        return image

    return made


@pytest.mark.parametrize(
    ("command", "block", "word"),
    [
        ("mkfs.xfs -q -s size=512", 512, "XFS"),
        ("mkfs.xfs -q -s size=4096", 4096, "XFS"),
        ("mkfs.ext4 -q -b 1024", 1024, "ext"),
        ("mkfs.ext4 -q -b 2048", 2048, "ext"),
        ("mkfs.ext4 -q -b 4096", 4096, "ext"),
        ("mkfs.btrfs -q", 4096, "btrfs"),
        ("mkfs.fat -S 512", 512, "FAT"),
        ("mkfs.fat -S 4096", 4096, "FAT"),
        ("mkswap", 4096, "swap"),
    ],
)
def test_file_system_needs_its_own_sectors_or_smaller(
    make: Make, command: str, block: int, word: str
) -> None:
    """Each file system of each sector size is recognised."""
    found = need(make(command, 320 << 20))
    assert found is not None
    assert found.known
    assert (found.block, found.exact) == (block, False)
    assert word in found.what


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("label", ["g", "o"])
def test_partition_table_needs_exactly_its_sectors(
    make: Make, label: str, sector: int, tmp_path: Path
) -> None:
    """A GPT says its sectors; of an MBR the file systems in it do."""
    kind = "p\n" if label == "o" else ""
    image = make(f"fdisk -b {sector}", said=f"{label}\nn\n{kind}1\n\n+32M\nw\n")
    inner = tmp_path / "inner"
    subprocess.run(
        ["/usr/sbin/mkfs.ext4", "-q", "-b", "4096", str(inner), "32M"], check=True
    )
    with image.open("r+b") as file:  # fdisk aligns the first partition to 1 MiB
        os.pwrite(file.fileno(), inner.read_bytes(), 1 << 20)
    found = need(image)
    assert found == Need(
        sector,
        f"{'a GPT' if label == 'g' else 'an MBR'} of {sector}-byte sectors",
        exact=True,
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sfdisk -q", "label: gpt\n,16M\n,\n"),
        ("sfdisk -q", "label: dos\n,16M\n,16M,E\n,\n"),
        ("parted -s", ""),
    ],
)
def test_partition_table_of_an_image_is_of_512(
    make: Make, command: str, said: str, tmp_path: Path
) -> None:
    """Tables that a program made on a file, where nothing is in the partitions yet."""
    if command.startswith("parted"):
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, SIZE)
        support.requires_program("parted")
        words = ["mklabel", "gpt", "mkpart", "x", "1MiB", "32MiB"]
        subprocess.run(["/usr/sbin/parted", "-s", str(image), *words], check=True)
    else:
        image = make(command, said=said)
    found = need(image)
    assert found is not None
    assert (found.block, found.exact) == (512, True)


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt_is_known_by_its_copy(make: Make, sector: int) -> None:
    """A damaged first header leaves the one at the disk's end."""
    image = make(f"fdisk -b {sector}", said="g\nn\n1\n\n\nw\n")
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 8, sector + 40)
    found = need(image)
    assert found is not None
    assert (found.block, found.exact) == (sector, True)


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt_that_was_made_over_another_is_the_one(make: Make, sector: int) -> None:
    """The header that a table of other sectors left does not mislead."""
    old = 512 if sector == 4096 else 4096
    first = make(f"fdisk -b {old}", said="g\nn\n1\n\n\nw\n")
    with first.open("rb") as file:
        left = os.pread(file.fileno(), 92, old)
    image = make(f"fdisk -b {sector}", said="g\nn\n1\n\n\nw\n")
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), left, old)
    found = need(image)
    assert found is not None
    assert (found.block, found.exact) == (sector, True)


def test_nothing_and_unknown_content(tmp_path: Path) -> None:
    """An empty disk needs nothing; what is not recognised gets the smallest blocks."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    assert need(image) is None
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"mine", SIZE - 512)
    found = need(image)
    assert found is not None
    assert (found.block, found.exact, found.known) == (512, False, False)


@pytest.mark.parametrize("length", [0, 1, 100, 511, 512, 1024, 4096, 65600])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\x55\xaa"])
def test_no_content_is_an_error(length: int, fill: bytes) -> None:
    """A disk shorter than any superblock, and garbage, are judged as well."""
    data = (fill * length)[:length]
    found = need_of(reader(data), length)
    assert (found is None) == (not any(data))


@pytest.mark.parametrize("sector", [512, 1024, 2048, 4096])
def test_gpt_header_that_the_disk_ends_in_is_none(sector: int) -> None:
    """A table was put on a larger disk; of this one only its guard is believed."""
    guard = bytes(446) + bytes([0, 0, 2, 0, 0xEE, 0, 0, 0]) + struct.pack("<II", 1, 9)
    head = guard.ljust(510, b"\0") + b"\x55\xaa"
    whole = head.ljust(sector, b"\0") + b"EFI PART" + bytes(sector - 8)
    for end in range(sector, len(whole) + 1):
        data = whole[:end]
        found = need_of(reader(data), len(data))
        assert found == Need(512, "a GPT of 512-byte sectors", exact=True)


def test_lvm_and_luks_may_hold_anything() -> None:
    """Their content cannot be seen, or is not looked for."""
    lvm = bytearray(SIZE >> 6)
    lvm[512:520], lvm[536:544] = b"LABELONE", b"LVM2 001"
    luks1 = bytearray(SIZE >> 6)
    luks1[:8] = b"LUKS\xba\xbe" + struct.pack(">H", 1)
    luks2 = bytearray(SIZE >> 6)
    luks2[:8] = b"LUKS\xba\xbe" + struct.pack(">H", 2)
    luks2[4096:4200] = b'{"segments":{"0":{"sector_size":4096}}}'.ljust(104, b"\0")
    for content, block in ((lvm, 512), (luks1, 512), (luks2, 4096)):
        data = bytes(content)
        found = need_of(reader(data), len(data))
        assert found is not None
        assert found.known
        assert found.block == block


XFS = Need(512, "an XFS of 512-byte sectors")
GPT_4096 = Need(4096, "a GPT of 4096-byte sectors", exact=True)
UNKNOWN = Need(512, "content of an unknown kind", known=False)


@pytest.mark.parametrize(
    ("size", "smallest", "found", "options", "block"),
    [
        (SIZE, 512, None, {}, 4096),
        (SIZE + 2048, 512, None, {}, 2048),
        (SIZE + 512, 1, None, {}, 512),
        (1000, 1, None, {}, 512),
        (SIZE, 512, XFS, {}, 512),
        (SIZE, 512, XFS, {"before": 4096}, 512),
        (SIZE, 512, Need(1024, "ext"), {}, 1024),
        (SIZE + 512, 512, Need(1024, "ext"), {}, 512),
        (SIZE, 512, GPT_4096, {}, 4096),
        (SIZE + 512, 512, GPT_4096, {}, 4096),
        (SIZE + 512, 512, GPT_4096, {"asked": 4096}, 4096),
        (SIZE, 512, UNKNOWN, {}, 512),
        (SIZE, 512, UNKNOWN, {"before": 4096}, 4096),
        (SIZE + 512, 512, UNKNOWN, {"before": 4096}, 512),
        (SIZE, 512, UNKNOWN, {"before": 256}, 512),
        (SIZE, 4096, None, {}, 4096),
        (SIZE, 512, XFS, {"asked": 4096}, 4096),
        (SIZE, 512, None, {"asked": 512}, 512),
    ],
)
def test_choice(
    size: int, smallest: int, found: Need, options: dict[str, int], block: int
) -> None:
    """The largest blocks that suit the content, the size, the server, the operator."""
    choice = choose(size, smallest, found, **options)
    assert choice.block == block
    assert choice.why


@pytest.mark.parametrize(
    ("size", "smallest", "found", "asked", "words"),
    [
        (SIZE, 512, None, 8192, "no blocks of 8192 bytes, only 512, 1024, 2048, 4096"),
        (SIZE, 512, None, 0, "no blocks of 0 bytes"),
        (SIZE + 512, 512, None, 4096, "would cut off the volume's last 512 bytes"),
        (SIZE, 4096, None, 512, "takes no blocks smaller than 4096"),
        (SIZE, 4096, XFS, None, "needs blocks of 512 bytes, and its server takes"),
        (SIZE, 4096, UNKNOWN, None, "needs blocks of 512 bytes, and its server takes"),
        (SIZE + 512, 512, GPT_4096, 2048, "would cut off"),
    ],
)
def test_choice_that_cannot_be_is_said(
    size: int, smallest: int, found: Need, asked: int | None, words: str
) -> None:
    """One line names what is wrong with it."""
    with pytest.raises(ValueError, match=words) as caught:
        choose(size, smallest, found, asked=asked, before=512)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "asked", "words"),
    [
        (XFS, 4096, "XFS of 512-byte sectors, which 4096-byte blocks cannot be"),
        (XFS, 512, ""),
        (GPT_4096, 512, "its partitions are wrong in 512-byte blocks"),
        (GPT_4096, 4096, ""),
        (None, 512, ""),
        (UNKNOWN, 4096, ""),
    ],
)
def test_choice_against_the_content_is_warned_of(
    found: Need, asked: int, words: str
) -> None:
    """The operator decides, because the disk may be about to be formatted."""
    choice: Choice = choose(SIZE, 512, found, asked=asked)
    assert choice.block == asked
    assert words in choice.warning
    assert bool(choice.warning) == bool(words)
