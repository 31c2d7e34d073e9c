"""Measurements are of what they say, and leave nothing behind. No test looks at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastship.errors import PackError
from fastship.pack import PackOptions
from fastship.tune import measure

PIECES = [bytes([number]) * 50_000 for number in range(5)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("a", "b", "empty")]
    for path, size in zip(paths, (100_000, 5000, 0), strict=True):
        path.write_bytes(os.urandom(size))
    return [str(path) for path in paths]


def test_reading_counts_what_was_read_up_to_the_limit(files: list[str]) -> None:
    assert measure.read_files([*files, "gone"], 1 << 30, 60.0).bytes == 105_000
    assert measure.read_files(files, 50_000, 60.0).bytes == 100_000


def test_what_the_kernel_was_told_to_forget_is_still_there(files: list[str]) -> None:
    before = [Path(path).read_bytes() for path in files]
    measure.drop_from_cache([*files, "gone"], 1 << 30)
    assert [Path(path).read_bytes() for path in files] == before


@pytest.mark.parametrize("threads", [1, 2])
def test_compressing_takes_every_piece(threads: int) -> None:
    made = measure.compress(PIECES, 3, threads)
    assert made.cost.bytes == 250_000
    assert 0 < made.artifact_bytes < 5000
    assert made.at(3).ratio == 250_000 / made.artifact_bytes


def test_a_digest_is_of_all_pieces() -> None:
    assert {measure.digest(PIECES, sha256=sha256).bytes for sha256 in (True, False)} == {250_000}


@pytest.mark.parametrize("sync", [True, False])
def test_written_files_have_no_name(tmp_path: Path, sync: bool) -> None:
    assert measure.write_file(tmp_path, bytes(1000), 10_500, sync=sync).bytes == 10_500
    assert os.listdir(tmp_path) == []


def test_packing_counts_whole_episodes_and_leaves_no_artifact(tmp_path: Path) -> None:
    episodes = [tmp_path / "in" / name for name in ("a", "b")]
    for path in episodes:
        path.mkdir(parents=True)
        (path / "data").write_bytes(bytes(100_000))
    (tmp_path / "out").mkdir()
    options = PackOptions(frame_bytes=32_768)
    gone = tmp_path / "gone"
    packed = measure.pack_episodes([gone, *episodes], tmp_path / "out", options, 1, 60.0)
    assert packed.episodes == 2
    assert packed.cost.bytes > 200_000
    assert 0 < packed.artifact_bytes < packed.cost.bytes
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(PackError):
        measure.pack_episodes([gone], tmp_path / "out", options, 1, 60.0)


def test_the_time_ends_the_packing_in_the_middle_of_an_episode(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "data").write_bytes(bytes(1_000_000))
    packed = measure.pack_episodes([tmp_path / "ep"], tmp_path, PackOptions(frame_bytes=4096), 1, 0.0)
    assert 0 < packed.cost.bytes < 1_000_000


def test_the_cheapest_of_the_rounds_counts() -> None:
    costs = [measure.Cost(10, 3.0, 1.0), measure.Cost(10, 2.0, 2.0)]
    assert measure.fastest(lambda: costs.pop(0), 60.0, rounds=2) == measure.Cost(10, 2.0, 1.0)
