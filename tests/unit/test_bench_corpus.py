"""The corpus is what it says: the same bytes each time, of the shapes' sizes, without long repetitions."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from bench.corpus import SHAPES, Corpus, Shape

POOL_BYTES = 1 << 18
SEEN_BYTES = 64


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(pool_bytes=POOL_BYTES)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_has_the_episodes_and_bytes_it_declares(corpus: Corpus, tmp_path: Path, name: str) -> None:
    shape = SHAPES[name].scaled(0.001)
    episodes = corpus.write_shape(tmp_path, name, 0.001)
    assert len(episodes) == shape.episodes
    for episode in episodes:
        sizes = [path.stat().st_size for path in episode.iterdir() if path.name != "done.marker"]
        assert sum(sizes) == shape.episode_bytes
        assert max(sizes) == shape.file_bytes
        assert (episode / "done.marker").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    shape = Shape(2, 200_000, 50_000)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        Corpus(seed, POOL_BYTES).write_episodes(tmp_path / name, shape, "e")
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert all(first[name] != other.get(name) for name in first if not name.endswith("done.marker"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "f64", "log"])
def test_no_long_piece_comes_twice_however_often_the_pool_is_used(corpus: Corpus, tmp_path: Path, kind: str) -> None:
    """Else a deduplicating program would be measured on what no telemetry gives it."""
    corpus.write_episode(tmp_path / "e", 4 * POOL_BYTES, 4 * POOL_BYTES, kind=kind)
    data = (tmp_path / "e" / f"000000.{kind}").read_bytes()
    period = [data[at : at + POOL_BYTES] for at in range(0, len(data), POOL_BYTES)]
    for later in period[1:]:
        same = sum(
            period[0][at : at + SEEN_BYTES] == later[at : at + SEEN_BYTES] for at in range(0, POOL_BYTES, SEEN_BYTES)
        )
        assert same < POOL_BYTES // SEEN_BYTES // 100


def test_a_permuted_pool_compresses_as_the_first_use_of_it(corpus: Corpus, tmp_path: Path) -> None:
    corpus.write_episode(tmp_path / "e", 4 * POOL_BYTES, 4 * POOL_BYTES, kind="jsonl")
    data = (tmp_path / "e" / "000000.jsonl").read_bytes()
    sizes = [len(zlib.compress(data[at : at + POOL_BYTES])) for at in range(0, len(data), POOL_BYTES)]
    assert max(sizes) < 1.05 * min(sizes)
