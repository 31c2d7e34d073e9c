"""The profiles of ``conf/``, each chosen here: size, speed, CPU and memory beside the original's ``zstd -T0 -19``, and
fastship's own tables (`fastship.frames.levels`) beside libzstd's for the same level.

The original is slow (3 MB/s a core), so it gets one episode of the large shape, and all of the small ones, once. The
archive profile must make no more bytes of them, for less CPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from bench import measure
from bench.compare import SCALE, Compared, beside, note, pack_into, timed
from bench.corpus import SHAPES, Corpus
from bench.measure import MIB, Cost
from bench.peers import backlog, original
from bench.peers.programs import fastship_command
from bench.recordings import SETS, NotFetched, write_recordings
from bench.servers import Nginx
from fastship.frames import ArtifactReader, FramePool
from fastship.frames.levels import parameters
from fastship.pack import PackOptions
from fastship.settings import Settings

pytestmark = pytest.mark.timeout(0)

PROFILES = ["throughput", "balanced", "archive", "lowmem", "ci"]
ORIGINAL_LEVEL = 19
LOWMEM_BYTES = 128 * MIB


@pytest.fixture(scope="module", params=["large", "small"])
def episodes(request: Any, corpus: Corpus, work: Path) -> list[Path]:
    if request.param == "large":
        shape = SHAPES["large"].scaled(SCALE)._replace(episodes=1)
    else:
        shape = SHAPES["small"].scaled(SCALE)
    return corpus.write_episodes(work / request.param, shape, request.param)


@pytest.fixture(scope="module")
def original_packs(episodes: list[Path], work: Path) -> tuple[Cost, int]:
    """What the original needs for the episodes, and the bytes it makes of them."""
    outbox = work / f"original-{episodes[0].name}"
    outbox.mkdir()
    cost, artifacts = measure.metered(lambda: [original.pack(path, outbox, ORIGINAL_LEVEL) for path in episodes])
    return cost, sum(path.stat().st_size for path in artifacts)


@pytest.mark.parametrize("profile", PROFILES)
def test_profile(
    benchmark: Any, episodes: list[Path], original_packs: tuple[Cost, int], work: Path, profile: str
) -> None:
    settings = Settings.load(profile=profile).pack
    # "auto" as on a fast link: what it packs at on a slow one is bench_links' to show.
    level = settings.level_min if settings.level == "auto" else settings.level
    options = PackOptions(level=level, frame_bytes=settings.frame_bytes)
    outbox = work / f"{profile}-{episodes[0].name}"
    outbox.mkdir()
    sizes: list[tuple[int, int]] = []

    def packed() -> Cost:
        def pack_all() -> None:
            with FramePool(settings.threads or measure.host()["cores"]) as pool:  # its memory counts
                made = [pack_into(outbox, path, pool, options).manifest for path in episodes]
            sizes.append((sum(one.content_bytes for one in made), sum(one.artifact_bytes for one in made)))

        return measure.metered(pack_all)[0]

    packed()  # warms the page cache
    raw_bytes, packed_bytes = sizes[0]
    reference, reference_bytes = original_packs
    rounds = 1 if profile == "archive" else 3
    compared = beside(
        benchmark,
        packed,
        {"original": lambda: reference},
        raw_bytes=raw_bytes,
        rounds=rounds,
        ratio=raw_bytes / packed_bytes,
        original_ratio=raw_bytes / reference_bytes,
        size_over_original=packed_bytes / reference_bytes,
    )
    assert len(set(sizes)) == 1
    print(benchmark.extra_info["original"])
    if profile == "archive":
        assert packed_bytes <= reference_bytes
        assert compared.cpu_ratio("original") <= 0.75


@pytest.mark.parametrize("shape", ["large", "small", "tiny", "logs", "arrays", *sorted(SETS)])
@pytest.mark.parametrize("level", [2, 3, 18])
def test_table(benchmark: Any, corpus: Corpus, work: Path, level: int, shape: str) -> None:
    """Frames of the tar stream, at most 2 MiB of a shape at level 18, 24 MiB else; 18 is beside libzstd's 19."""
    frames = _frames(corpus, work / f"table-{level}-{shape}", shape, (2 if level == 18 else 24) * MIB)
    theirs = zstandard.ZstdCompressor(level=19 if level == 18 else level, write_checksum=True)
    ours = zstandard.ZstdCompressor(compression_params=parameters(level))
    raw_bytes = sum(map(len, frames))
    sizes = [sum(len(one.compress(frame)) for frame in frames) for one in (ours, theirs)]
    compared: Compared = beside(
        benchmark,
        timed(lambda: [ours.compress(frame) for frame in frames]),
        {"libzstd": timed(lambda: [theirs.compress(frame) for frame in frames])},
        raw_bytes=raw_bytes,
        rounds=1 if level == 18 else 3,
        ratio=raw_bytes / sizes[0],
        libzstd_ratio=raw_bytes / sizes[1],
        size_over_libzstd=sizes[0] / sizes[1],
    )
    assert sizes[0] <= sizes[1] * (1.05 if level == 18 else 1.015)
    assert compared.cpu_ratio("libzstd") <= 1.1


def _frames(corpus: Corpus, directory: Path, shape: str, most_bytes: int) -> list[bytes]:
    try:
        episodes = write_recordings(directory, shape) if shape in SETS else corpus.write_shape(directory, shape, SCALE)
    except NotFetched as why:
        pytest.skip(str(why))
    frames: list[bytes] = []
    with FramePool() as pool:
        for path in episodes:
            artifact = pack_into(directory, path, pool, PackOptions(level=1))
            with ArtifactReader.open(artifact.path) as reader:
                for frame in reader.stream():
                    frames.append(frame[: most_bytes - sum(map(len, frames))])
                    if sum(map(len, frames)) >= most_bytes:
                        return frames
    return frames


def test_lowmem_drains_in_128_mib(benchmark: Any, corpus: Corpus, nginx: Nginx, work: Path) -> None:
    """``fastship once --profile lowmem`` over the large shape: supervisor and worker together, by PSS."""
    waiting = backlog.make(work / "lowmem", "large", SCALE, corpus)
    command = [*fastship_command(waiting, nginx.url, "destination.proof=status"), "--profile", "lowmem"]
    peaks: list[int] = []

    def drain() -> Cost:
        nginx.empty()
        with _PssWatch() as watch:
            cost, _ = measure.run(command)
        peaks.append(watch.peak_bytes)
        assert len(nginx.artifacts()) == waiting.episode_count
        waiting.restore()
        return cost

    drain()
    beside(benchmark, drain, {}, raw_bytes=waiting.raw_bytes, rounds=1)
    note(benchmark, peak_pss_mib=max(peaks) / MIB)
    print("PSS", benchmark.extra_info["peak_pss_mib"], "MiB; VmHWM", benchmark.extra_info["actual"]["peak_mib"], "MiB")
    assert 0 < max(peaks) < LOWMEM_BYTES


class _PssWatch:
    """The most that this process's children, and theirs, held at once: pages that they share count once."""

    def __enter__(self) -> _PssWatch:
        self._own = os.getpid()
        self._strangers = set(measure._tree(self._own))
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(pid) for pid in self._members()))

    def _members(self) -> Iterator[int]:
        return (pid for pid in measure._tree(self._own) if pid not in self._strangers)


def _pss_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith(b"Pss:")), 0)
