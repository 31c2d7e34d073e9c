"""What packing leaves in the page cache: asked of the kernel (cachestat), on the file system that tests run on."""

from __future__ import annotations

import ctypes
import io
import os
from pathlib import Path
from typing import get_args

import pytest

from fastship import pagecache
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
from fastship.pagecache import LARGE_BYTES, Care, cached_bytes, give_back, to_be_given_back

SIZE = 3 * LARGE_BYTES


class Episode:
    """One with a large file and a small one, which a test can make cold."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.large, self.small = path / "large", path / "small"
        self.large.write_bytes(os.urandom(SIZE))
        self.small.write_bytes(os.urandom(20_000))

    def make_cold(self) -> None:
        for file in (self.large, self.small):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)  # a dirty page is not given back
            give_back(fd, 0, 0)
            os.close(fd)

    def cached(self, file: Path) -> int:
        fd = os.open(file, os.O_RDONLY)
        try:
            return cached_bytes(fd) or 0
        finally:
            os.close(fd)

    def pack(self, care: Care) -> None:
        with FramePool(1) as pool:
            pack(self.path, io.BytesIO(), PackOptions(level=1, frame_bytes=1 << 20, page_cache=care), pool)


@pytest.fixture
def episode(tmp_path: Path) -> Episode:
    made = Episode(tmp_path / "ep")
    if not made.cached(made.large):
        pytest.skip("the kernel has no cachestat(2), or this file system no page cache")
    made.make_cold()
    if made.cached(made.large):
        pytest.skip("this file system gives nothing back (tmpfs)")
    return made


def test_a_file_that_was_not_cached_is_not_left_cached(episode: Episode) -> None:
    episode.pack("as-found")
    assert episode.cached(episode.large) == 0
    assert episode.cached(episode.small)


def test_a_file_that_was_cached_stays_so(episode: Episode) -> None:
    episode.large.read_bytes()
    episode.pack("as-found")
    assert episode.cached(episode.large) >= SIZE


def test_keep_leaves_and_drop_takes_whatever_was_before(episode: Episode) -> None:
    episode.pack("keep")
    assert episode.cached(episode.large) >= SIZE
    episode.pack("drop")
    assert episode.cached(episode.large) == 0


def test_dirty_pages_are_not_lost(episode: Episode) -> None:
    data = os.urandom(SIZE)
    episode.large.write_bytes(data)
    episode.pack("drop")
    assert episode.large.read_bytes() == data


@pytest.mark.parametrize("care", get_args(Care))
def test_small_files_are_not_asked_about(tmp_path: Path, care: Care) -> None:
    assert not to_be_given_back(-1, LARGE_BYTES - 1, care)


def test_a_kernel_that_cannot_say_makes_nothing_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "_CACHESTAT", 9999)  # ENOSYS
    with open(tmp_path / "file", "wb") as file:
        assert cached_bytes(file.fileno()) is None
        assert not to_be_given_back(file.fileno(), SIZE, "as-found")


def test_what_cannot_be_given_back_is_no_fault() -> None:
    reading, writing = os.pipe()
    give_back(reading, 0, 0)  # ESPIPE
    assert cached_bytes(reading) in (None, 0)
    os.close(reading)
    os.close(writing)
    assert ctypes.sizeof(pagecache._Pages) == 40
