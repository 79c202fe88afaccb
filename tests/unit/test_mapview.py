# SPDX-License-Identifier: BSD-3-Clause
"""Looking at a dirty map, against files written here byte by byte."""

from __future__ import annotations

import mmap
import os
import resource
import stat
import struct
import subprocess
import sys
from collections.abc import Set
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nbd_mirror.base.errors import FormatError, MissingError, UnsupportedError
from nbd_mirror.commands.picture import picture, save_png
from nbd_mirror.volume import mapview
from nbd_mirror.volume.mapview import Run, open_map

KIB64 = 1 << 16


def write_map(
    path: Path,
    nr_regions: int,
    dirty: set[int],
    *,
    unflushed: tuple[Set[int], Set[int]] = (frozenset(), frozenset()),
    late: Set[int] = frozenset(),
    magic: bytes = b"NBDMDRTY",
    version: int = 1,
    flags: int = 0,
) -> None:
    """Write a `dirty.<remote>` file as csrc/logs/layout.h describes it."""
    header = struct.pack("<8sII16s64s", magic, version, 0, b"u" * 16, b"dr")
    header += struct.pack("<QQQII", 1, nr_regions, KIB64, flags, 0)
    data = bytearray(header.ljust(4096, b"\0"))
    step = -(-nr_regions // 32768) * 4096
    for regions in (dirty, *unflushed, late):
        bits = bytearray(step)
        for region in regions:
            bits[region // 8] |= 1 << region % 8
        data += bits
    path.write_bytes(data)


@given(
    nr_regions=st.integers(1, 70_000),
    seeds=st.lists(st.integers(0, 1 << 20), max_size=60),
    piece=st.sampled_from([61, 512, mapview._PIECE]),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=40,
)
def test_map_counts_and_runs_agree_with_a_set(
    tmp_path: Path, nr_regions: int, seeds: list[int], piece: int
) -> None:
    """Counts, runs and shares are those of a plain set, whatever is read at a time."""
    dirty = {seed % nr_regions for seed in seeds}
    dirty |= {region + 1 for region in dirty if region + 1 < nr_regions}
    path = tmp_path / "dirty.dr"
    write_map(path, nr_regions, dirty)
    with pytest.MonkeyPatch.context() as patch, open_map(path) as maps:
        patch.setattr(mapview, "_PIECE", piece)
        assert len(dirty) == maps.dirty_regions
        covered = {
            region
            for run in maps.runs()
            for region in range(run.offset // KIB64, (run.offset + run.length) // KIB64)
        }
        assert dirty == covered
        starts = [region for region in sorted(dirty) if region - 1 not in dirty]
        assert starts == [run.offset // KIB64 for run in maps.runs()]
        runs, total, all_seen = maps.longest_runs(3)
        assert (len(starts), True) == (total, all_seen)
        lengths = sorted((run.length for run in maps.runs()), reverse=True)
        assert lengths[:3] == [run.length for run in runs]
        shares = maps.shares(64)
        cells = min(64, nr_regions)
        edges = [nr_regions * i // cells for i in range(cells + 1)]
        assert shares == [
            len(dirty & set(range(low, high))) / (high - low)
            for low, high in pairwise(edges)
        ]


def test_map_header_is_read(tmp_path: Path) -> None:
    """Name, sizes and the clean flag come from the header; four maps are apart."""
    path = tmp_path / "dirty.dr"
    write_map(path, 100, {1}, unflushed=({2, 3}, {3, 4}), late={1, 99}, flags=1)
    with open_map(path) as maps:
        assert ("dr", 100, KIB64) == (maps.remote, maps.nr_regions, maps.region_size)
        assert maps.clean_stop
        assert (1, 3, 2) == (
            maps.dirty_regions,
            maps.unflushed_regions,
            maps.late_regions,
        )
        assert 100 * KIB64 - 5 == maps.bytes_of(100, 100 * KIB64 - 5)


def test_map_in_use_is_seen_as_it_changes(tmp_path: Path) -> None:
    """No copy is made: a bit set by the server's mapping shows at once."""
    path = tmp_path / "dirty.dr"
    write_map(path, 100, set())
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as server,
        open_map(path) as maps,
    ):
        assert maps.dirty_regions == 0
        server[4096] = 0b101
        assert [Run(0, KIB64), Run(2 * KIB64, KIB64)] == list(maps.runs())


def test_map_is_read_only(tmp_path: Path) -> None:
    """No caller can change the file through what is returned."""
    path = tmp_path / "dirty.dr"
    write_map(path, 100, set())
    with open_map(path) as maps, pytest.raises(TypeError):
        maps.dirty[0] = 1


def test_map_missing_is_told(tmp_path: Path) -> None:
    """No file: no such volume."""
    with pytest.raises(MissingError, match="there is no dirty map"):
        open_map(tmp_path / "dirty.dr")


@pytest.mark.parametrize("size", [0, 100, 4096, 4096 * 5 - 1])
def test_map_truncated_is_told(tmp_path: Path, size: int) -> None:
    """A short file is never read past its end."""
    path = tmp_path / "dirty.dr"
    write_map(path, 100, {1})
    os.truncate(path, size)
    with pytest.raises(FormatError, match="truncated"):
        open_map(path)


LOOKS = ("dirty_regions", "unflushed_regions", "late_regions", "dirty")
LOOK = """
import os, sys
from nbd_mirror.commands.picture import picture
from nbd_mirror.volume.mapview import open_map
path, look = sys.argv[1:]
with open_map(path) as maps:
    os.truncate(path, 4096)
    try:
        match look:
            case "runs":
                maps.longest_runs(3)
            case "picture":
                picture(maps, 16)
            case _:
                getattr(maps, look)
    except Exception as error:
        print(error)
"""


@pytest.mark.parametrize("look", [*LOOKS, "runs", "picture"])
def test_map_cut_short_while_it_is_read_is_told(tmp_path: Path, look: str) -> None:
    """Its owner may truncate it under root's command: an error, and no SIGBUS."""
    path = tmp_path / "dirty.dr"
    write_map(path, 70_000, {1})
    done = subprocess.run(
        [sys.executable, "-c", LOOK, path, look],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "was cut short while it was read" in done.stdout


def test_map_of_more_regions_than_a_volume_has_is_told(tmp_path: Path) -> None:
    """A file of holes costs its owner nothing: its length alone proves nothing."""
    path = tmp_path / "dirty.dr"
    write_map(path, 100, {1})
    with path.open("r+b") as file:
        file.seek(104)
        file.write(struct.pack("<Q", 1 << 44))
        file.truncate(4096 + 4 * (1 << 41))
    with pytest.raises(FormatError, match="garbled"):
        open_map(path)


@pytest.mark.parametrize(
    ("magic", "version", "regions", "words"),
    [
        (b"NBDMRING", 1, 10, "no dirty map"),
        (b"NBDMDRTY", 2, 10, "version 2"),
        (b"NBDMDRTY", 1, 0, "no regions"),
    ],
)
def test_map_of_another_kind_is_told(
    tmp_path: Path, magic: bytes, version: int, regions: int, words: str
) -> None:
    """A foreign or garbled header is not believed."""
    path = tmp_path / "dirty.dr"
    write_map(path, regions, set(), magic=magic, version=version)
    with pytest.raises(FormatError, match=words):
        open_map(path)


def test_picture_shows_a_single_dirty_region(tmp_path: Path) -> None:
    """One dirty region in a million is not rounded away."""
    path = tmp_path / "dirty.dr"
    write_map(path, 1_000_000, {999_999})
    with open_map(path) as maps:
        *rows, legend = picture(maps, 40, height=4)
    assert [42] * 4 == [len(row) for row in rows]
    assert rows[3].endswith("░│")
    assert "".join(rows).count("░") == 1
    assert "one cell is" in legend


def test_picture_of_few_regions_has_a_cell_each(tmp_path: Path) -> None:
    """A small volume is drawn region by region, in ASCII where asked."""
    path = tmp_path / "dirty.dr"
    write_map(path, 10, {0, 9})
    with open_map(path) as maps:
        rows = picture(maps, 40, plain=True)
    assert rows[0] == "|#........#|"
    assert len(rows) == 2


def test_png_shows_dirty_and_clean_in_different_colours(tmp_path: Path) -> None:
    """The file is a PNG with a square a remote."""
    path, png = tmp_path / "dirty.dr", tmp_path / "map.png"
    write_map(path, 4096, set(range(2048)))
    with open_map(path) as maps:
        save_png([maps, maps], png, "volume pg")
    with Image.open(png) as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.getcolors(1 << 20) or ()}
        assert {(214, 48, 40), (36, 58, 48)} <= colours
        assert image.height > 2 * 512


def test_png_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    """One that cannot be written, or drawn, leaves the old picture and no other."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    link, png = tmp_path / "link.png", folder / "map.png"
    link.symlink_to(png)
    png.write_bytes(b"the old one")
    png.chmod(0o640)
    path = tmp_path / "dirty.dr"
    write_map(path, 70_000, {1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_map(path) as maps:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_png([maps], link, "volume pg")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert png.read_bytes() == b"the old one"
        assert list(folder.iterdir()) == [png]
        save_png([maps], link, "volume pg")
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.stat().st_mode & 0o777 == 0o640
        save_png([maps], "/dev/null", "volume pg")
        os.truncate(path, 4096)
        before = png.read_bytes()
        with pytest.raises(FormatError, match="cut short"):
            save_png([maps], png, "volume pg")
    assert before == png.read_bytes()
    assert link.is_symlink()
    assert list(folder.iterdir()) == [png]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_png_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has no use for pictures, so what draws them is an extra."""
    write_map(tmp_path / "dirty.dr", 16, {1})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with (
        open_map(tmp_path / "dirty.dr") as maps,
        pytest.raises(UnsupportedError, match="needs Pillow") as caught,
    ):
        save_png([maps], tmp_path / "map.png", "volume pg")
    assert "nbd-mirror[png]" in caught.value.hint
    assert not (tmp_path / "map.png").exists()
