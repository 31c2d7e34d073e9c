"""What packing costs beside its parts: `pack` and the floor (``bench.floor``) in turn, each round's digest compared.

Efficiency is floor over actual CPU. With both cores the wall is also set beside the floor's CPU divided by the threads:
how much of the machine was at work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, Compared, beside, note, pack_into
from bench.corpus import SHAPES, Corpus
from bench.floor import Floor
from bench.measure import Cost
from bench.recordings import SETS, NotFetched, write_recordings
from fastship.frames import FramePool
from fastship.pack import PackOptions, fingerprint

pytestmark = pytest.mark.timeout(0)


def compare(benchmark: Any, episodes: list[Path], work: Path, level: int, threads: int) -> Compared:
    outbox = work / "outbox"
    outbox.mkdir(exist_ok=True)
    floor = Floor(level, threads, work / "scratch")
    options = PackOptions(level=level)
    with FramePool(threads) as pool:
        # Also warms the page cache and makes the pool's buffers.
        artifacts = [pack_into(outbox, path, pool, options) for path in episodes]

        def least_possible() -> Cost:
            cost = floor.cost(episodes, [artifact.path for artifact in artifacts])
            assert cost.contents == [artifact.manifest.content_blake3 for artifact in artifacts]
            parts.append(cost.parts)
            return Cost(cost.cpu_s / threads, cost.cpu_s, 0)

        def actual() -> Cost:
            cost, made = measure.metered(lambda: [pack_into(outbox, path, pool, options) for path in episodes])
            assert [one.manifest.artifact_sha256 for one in made] == [one.manifest.artifact_sha256 for one in artifacts]
            return cost

        parts: list[dict[str, float]] = []
        raw_bytes = sum(artifact.manifest.content_bytes for artifact in artifacts)
        compared = beside(
            benchmark,
            actual,
            {"floor": least_possible},
            raw_bytes=raw_bytes,
            ratio=raw_bytes / sum(artifact.manifest.artifact_bytes for artifact in artifacts),
        )
    assert artifacts[0].manifest.fingerprint == fingerprint(episodes[0], "keep")
    note(
        benchmark,
        efficiency=1 / compared.cpu_ratio("floor"),
        floor_parts={k: round(v, 3) for k, v in parts[-1].items()},
    )
    print("efficiency", benchmark.extra_info["efficiency"], "of the floor's", benchmark.extra_info["floor_parts"])
    return compared


@pytest.mark.parametrize(("level", "threads"), [(1, 2), (3, 1), (3, 2)])
def test_large(benchmark: Any, corpus: Corpus, work: Path, level: int, threads: int) -> None:
    path = work / "large"
    if not path.exists():
        # At least 100 MB in one episode: one of a few frames measures the start and the end of the pool.
        shape = SHAPES["large"].scaled(max(SCALE, 0.4))
        corpus.write_episode(path, shape.episode_bytes, shape.file_bytes)
    compared = compare(benchmark, [path], work, level, threads)
    if threads == 1:
        assert compared.cpu_ratio("floor") <= 1.25


@pytest.mark.parametrize("shape", ["small", "tiny", "video", "logs", "arrays"])
def test_shape(benchmark: Any, corpus: Corpus, work: Path, shape: str) -> None:
    episodes = corpus.write_shape(work / shape, shape, SCALE)
    compare(benchmark, episodes, work, 3, 1)


@pytest.mark.parametrize("name", sorted(SETS))
def test_recordings(benchmark: Any, work: Path, name: str) -> None:
    try:
        episodes = write_recordings(work / name, name)
    except NotFetched as why:
        pytest.skip(str(why))
    for path in episodes:  # the floor reads flat episodes
        for file in [*path.rglob("*")]:
            if file.is_file() and file.parent != path:
                file.rename(path / str(file.relative_to(path)).replace("/", "_"))
        for folder in sorted((each for each in path.rglob("*") if each.is_dir()), reverse=True):
            folder.rmdir()
    compare(benchmark, episodes, work, 3, 1)
