# SPDX-License-Identifier: BSD-3-Clause
"""
The keep file: what was saved is read back, and a garbled file never gives other bytes.

Each region of a garbled file is as it was saved, or is reported as broken or lost.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.base.errors import FormatError, MirrorError
from nbd_mirror.volume.keep_file import (
    FOLDER,
    HEADER_BYTES,
    RECORD_BYTES,
    KeepHeader,
    KeepReader,
    KeepWriter,
    keep_names,
    remove_leftovers,
)
from nbd_mirror.volume.keep_image import KeepImage

SMALL = 512
HEADER = KeepHeader(
    volume="v",
    uuid="0" * 36,
    node="alpha",
    kept="beta",
    generation="0" * 15 + "2",
    base="0" * 15 + "1",
    epoch=3,
    time=1_700_000_000,
    size=7 * SMALL + 100,  # the last region is short
    region_size=SMALL,
    regions=4,
    claim="2.beta.7",
    reason="12 common base",
)
SAVED = {
    1: b"x" * SMALL,
    2: bytes(SMALL),
    5: bytes(range(256)) * 2,
    7: b"the end".ljust(100, b"."),
}


def save(state: Path, name: str = "20261130-101112-abcd") -> Path:
    """Make a keep file."""
    with KeepWriter(state, name, HEADER) as keeper:
        for region, content in SAVED.items():
            keeper.add(region, content)
        size = keeper.finish()
    path = state / FOLDER / name
    assert path.stat().st_size == size
    return path


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    """Content, zeroes, and a last region that is shorter."""
    path = save(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700
    with KeepReader(path) as reader:
        assert reader.header == HEADER
        assert (reader.broken_index, reader.lost) == (False, 0)
        assert reader.regions == list(SAVED)
        assert {one: reader.read(one) for one in reader.regions} == SAVED


def test_zeroes_take_a_record_alone(tmp_path: Path) -> None:
    """The file has 16 bytes for them, and 16 in the index."""
    with KeepWriter(tmp_path, "a", replace(HEADER, regions=3)) as keeper:
        for region in range(3):
            keeper.add(region, bytes(SMALL))
        assert keeper.finish() == HEADER_BYTES + 3 * (RECORD_BYTES + 16) + 48


def test_no_name_without_the_whole_file(tmp_path: Path) -> None:
    """What ends before its end leaves nothing, or a leftover that the next removes."""
    with KeepWriter(tmp_path, "a", HEADER) as keeper:
        keeper.add(1, b"x" * SMALL)
        assert keep_names(tmp_path) == []
    assert list((tmp_path / FOLDER).iterdir()) == []
    (tmp_path / FOLDER / "b~new").write_bytes(b"killed")
    save(tmp_path)
    remove_leftovers(tmp_path)
    assert [one.name for one in (tmp_path / FOLDER).iterdir()] == keep_names(tmp_path)
    assert len(keep_names(tmp_path)) == 1


def test_another_version_is_refused(tmp_path: Path) -> None:
    """It says which one is known."""
    path = save(tmp_path)
    words = bytearray(path.read_bytes())
    words[8] = 2
    path.write_bytes(words)
    with pytest.raises(FormatError, match="version 2, known is 1"):
        KeepReader(path)


def test_a_link_is_no_keep_file(tmp_path: Path) -> None:
    """Another user may have put it there."""
    path = save(tmp_path)
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(MirrorError):
        KeepReader(link)


def judged(path: Path, state: Path) -> None:
    """Read all of a garbled file: each region is right, or is told to be wrong."""
    local = state / "disk"
    local.write_bytes(b"L" * HEADER.size)
    try:
        reader = KeepReader(path)
    except FormatError:
        return
    with reader:
        image = KeepImage(reader, os.fspath(local), lambda _: None)
        assert reader.header == HEADER
        for region in range(8):
            length = reader.length_of(region)
            found = image.read(length, region * SMALL)
            if region in SAVED:
                assert found in (None, SAVED[region])
            else:
                assert found in (None, b"L" * length)
        image.close()


@given(data=st.data())
def test_a_garbled_file_gives_no_other_bytes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes that change, runs of zeroes, a file that is cut or goes on."""
    state = tmp_path_factory.mktemp("state")
    path = save(state)
    words = bytearray(path.read_bytes())
    body = st.integers(HEADER_BYTES, len(words) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, len(words) - 1), body))
        new = data.draw(st.binary(min_size=1, max_size=40))
        words[at : at + len(new)] = new
    cut = data.draw(st.one_of(st.none(), body))
    path.write_bytes(bytes(words[:cut]) + data.draw(st.binary(max_size=40)))
    judged(path, state)


@given(words=st.binary(max_size=200))
def test_any_bytes_are_a_keep_file_or_one_error(
    words: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No other exception comes out of any file."""
    state = tmp_path_factory.mktemp("state")
    path = state / "file"
    path.write_bytes(b"NBDMKEEP" + words.ljust(HEADER_BYTES, b"\0"))
    with pytest.raises(FormatError):
        KeepReader(path)


def test_two_records_exchanged(tmp_path: Path) -> None:
    """A record of one region is not taken for another's, with or without an index."""
    path = save(tmp_path)
    words = path.read_bytes()
    first = HEADER_BYTES
    other = first + RECORD_BYTES + SMALL + RECORD_BYTES
    size = RECORD_BYTES + SMALL
    swapped = bytearray(words)
    swapped[first : first + size], swapped[other : other + size] = (
        words[other : other + size],
        words[first : first + size],
    )
    path.write_bytes(swapped)
    with KeepReader(path) as reader:
        assert reader.broken() == [1, 5]
    judged(path, tmp_path)
    path.write_bytes(swapped[:-1])  # the records say themselves which region they are
    with KeepReader(path) as reader:
        assert reader.broken_index
        assert {one: reader.read(one) for one in reader.regions} == SAVED


def test_behind_a_broken_record_all_is_lost_without_an_index(tmp_path: Path) -> None:
    """A region without a record may be one of the lost ones: it reads as an error."""
    path = save(tmp_path)
    words = bytearray(path.read_bytes()[:-1])
    words[HEADER_BYTES + RECORD_BYTES + SMALL] ^= 1  # of the second record
    path.write_bytes(words)
    local = tmp_path / "disk"
    local.write_bytes(b"L" * HEADER.size)
    said: list[str] = []
    with KeepReader(path) as reader:
        assert (reader.regions, reader.lost) == ([1], 3)
        image = KeepImage(reader, os.fspath(local), said.append)
        assert image.read(SMALL, SMALL) == SAVED[1]
        assert image.read(SMALL, 0) is None
        assert image.read(2 * SMALL, SMALL) is None
        image.close()
    assert any("lost" in line for line in said)
