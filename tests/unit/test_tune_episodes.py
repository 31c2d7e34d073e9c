"""Which episodes are measured on, and which pieces of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lab import tree

from fastship.errors import UsageError
from fastship.pack import EpisodeSize, PackOptions
from fastship.spool.removal import remove_tree
from fastship.tune.episodes import Chosen, choose, cut, generate, read_pieces, regular_files

OPTIONS = PackOptions(frame_bytes=4096)
LIMIT_BYTES = 1_000_000


def make(path: Path, *, age_s: int = 0, size: int = 20_000, marked: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "data").write_bytes(os.urandom(size))
    if marked:
        (path / "done.marker").touch()
        os.utime(path / "done.marker", (1_700_000_000 - age_s,) * 2)
    return path


def names(*sources: Path, spool: Path | None = None, limit: int = LIMIT_BYTES) -> list[str]:
    chosen = choose(sources, spool, limit)
    assert chosen is not None
    return [path.name for path in chosen.paths]


def test_of_a_spool_the_newest_finished_ones_shipped_or_not(tmp_path: Path) -> None:
    make(tmp_path / "shipped" / "old", age_s=30)
    make(tmp_path / "episodes" / "new", age_s=10)
    make(tmp_path / "shipped" / "between", age_s=20)
    make(tmp_path / "episodes" / "recording", marked=False)
    assert names(spool=tmp_path) == ["new", "between", "old"]
    assert names(tmp_path) == ["new", "between", "old"]
    assert names(tmp_path / "shipped") == ["between", "old"]
    assert names(spool=tmp_path, limit=30_000) == ["new", "between"]


def test_an_episode_itself_with_a_marker_or_without(tmp_path: Path) -> None:
    make(tmp_path / "marked" / "sub" / "x")
    (tmp_path / "marked" / "done.marker").touch()
    assert names(tmp_path / "marked") == ["marked"]
    make(tmp_path / "plain", marked=False)
    assert names(tmp_path / "plain") == ["plain"]


def test_directories_that_nobody_marked_are_episodes_of_their_own(tmp_path: Path) -> None:
    make(tmp_path / "a", marked=False)
    make(tmp_path / "b", marked=False)
    assert sorted(names(tmp_path)) == ["a", "b"]


def test_a_spool_without_episodes_is_none_and_a_source_without_any_is_told(tmp_path: Path) -> None:
    assert choose((), None, LIMIT_BYTES) is None
    assert choose((), tmp_path, LIMIT_BYTES) is None
    with pytest.raises(UsageError, match="is empty"):
        choose((tmp_path,), None, LIMIT_BYTES)
    with pytest.raises(UsageError, match="No such file"):
        choose((tmp_path / "gone",), None, LIMIT_BYTES)
    make(tmp_path / "only-marker", size=0)
    with pytest.raises(UsageError, match="no file with anything in it"):
        choose((tmp_path,), None, LIMIT_BYTES)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        choose((tmp_path / "file",), None, LIMIT_BYTES)


def test_pieces_are_frames_spread_over_all_episodes(tmp_path: Path) -> None:
    for number in range(4):
        path = make(tmp_path / f"e{number}", age_s=number, size=0)
        (path / "data").write_bytes(bytes([number + 1]) * 400_000)
    chosen = choose((tmp_path,), None, 10 * LIMIT_BYTES)
    assert chosen is not None
    before = tree(tmp_path)
    pieces = read_pieces(chosen, OPTIONS, 160_000)
    assert tree(tmp_path) == before
    assert abs(sum(map(len, pieces)) - 160_000) < 20_000
    assert all(len(piece) <= OPTIONS.frame_bytes for piece in pieces)
    assert len({piece[-1] for piece in pieces[:4]}) == 4  # any beginning is of all of them


def test_of_many_small_episodes_some_are_taken_whole(tmp_path: Path) -> None:
    for number in range(20):
        make(tmp_path / f"e{number}", age_s=number, size=2_000)
    chosen = choose((tmp_path,), None, LIMIT_BYTES)
    assert chosen is not None
    pieces = read_pieces(chosen, PackOptions(), chosen.bytes // 2)
    assert 8 <= len(pieces) <= 12
    assert len(read_pieces(chosen, PackOptions(), chosen.bytes)) == 20


def test_generated_episodes_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (generate(tmp_path / name, 400_000) for name in "ab")
    assert first.generated
    assert first.bytes == second.bytes > 400_000
    contents = [[Path(path).read_bytes() for path in regular_files(one)] for one in (first, second)]
    assert contents[0] == contents[1]


def test_files_of_a_directory_deeper_than_pythons_stack(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        chosen = Chosen((tmp_path,), (EpisodeSize(0, 0, complete=True),), "here", generated=False)
        assert sum(1 for _ in regular_files(chosen)) == 1200
    finally:
        remove_tree(tmp_path / "d")


def test_pieces_are_cut_into_smaller_frames() -> None:
    assert cut([b"abcde", b"fg"], 2) == [b"ab", b"cd", b"e", b"fg"]
