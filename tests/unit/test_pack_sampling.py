"""Pieces of the tar stream are what packing would make there, and nothing else is read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.errors import EpisodeChanged, EpisodeUnreadable
from fastship.frames import ArtifactReader, FramePool
from fastship.pack import PackOptions, pack, read_windows


def tar_stream(episode: Path) -> bytes:
    sink = io.BytesIO()
    with FramePool() as pool:
        pack(episode, sink, PackOptions(), pool)
    data = sink.getvalue()
    artifact = episode.with_name("artifact")
    artifact.write_bytes(data)
    with ArtifactReader.open(artifact) as reader:
        return b"".join(reader.stream())


@pytest.fixture(scope="module")
def episode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "ep"
    (path / "sub").mkdir(parents=True)
    for name, size in (("a", 5000), ("empty", 0), ("sub/b", 513), ("z" * 150, 20_000)):
        (path / name).write_bytes(os.urandom(size))
    (path / "link").symlink_to("a")
    os.link(path / "a", path / "hard")
    return path


@pytest.fixture(scope="module")
def stream(episode: Path) -> bytes:
    return tar_stream(episode)


def test_one_window_over_all_of_it_is_the_tar_stream_but_for_its_end(episode: Path, stream: bytes) -> None:
    (found,) = read_windows(episode, "keep", [(0, 1 << 20)])
    assert found + bytes(1024) == stream


@given(bounds=st.lists(st.integers(0, 40_000), max_size=8, unique=True))
def test_windows_are_cut_from_the_tar_stream(episode: Path, stream: bytes, bounds: list[int]) -> None:
    bounds.sort()
    windows = list(zip(bounds[::2], bounds[1::2], strict=False))
    expected = [stream[first : min(last, len(stream) - 1024)] for first, last in windows]
    assert read_windows(episode, "keep", windows) == [piece for piece in expected if piece]


def test_nothing_beside_the_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    with open(tmp_path / "ep" / "huge", "wb") as file:
        file.truncate(1 << 42)
    pieces = read_windows(tmp_path / "ep", "keep", [(1 << 40, (1 << 40) + 1000), (1 << 41, (1 << 41) + 10)])
    assert [len(piece) for piece in pieces] == [1000, 10]


def test_what_cannot_be_read_is_an_error_of_the_episode(tmp_path: Path) -> None:
    with pytest.raises(EpisodeChanged):
        read_windows(tmp_path / "gone", "keep", [(0, 10)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "secret").write_bytes(b"x" * 1000)
    (tmp_path / "ep" / "secret").chmod(0)
    with pytest.raises(EpisodeUnreadable, match="secret"):
        read_windows(tmp_path / "ep", "keep", [(0, 10_000)])
