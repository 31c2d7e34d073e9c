"""What packing costs beside its parts: the CPU of `pack` over the CPU of reading, zstd, BLAKE3 and SHA-256 alone.

    pytest bench/bench_pack.py                      256 MB, and 100 small episodes
    FASTSHIP_BENCH_BYTES=1000000000 pytest bench/bench_pack.py

Floor and actual are taken in turn within one run, as CPU seconds of the process, the least of three rounds each: the
ratio holds on a noisy machine where seconds do not. The floor compresses the same frames one-shot in one thread and
reads the same files into one buffer; it writes nothing, while `pack` writes the artifact to a file. Each round's digest
is compared with the floor's. The ratio is in the benchmark's extra_info and on stdout (``-s``).
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import blake3
import pytest
import zstandard

from bench.corpus import Corpus
from fastship.episode import Manifest
from fastship.frames import ArtifactReader, FramePool
from fastship.pack import PackOptions, fingerprint, pack

TOTAL_BYTES = int(os.environ.get("FASTSHIP_BENCH_BYTES", 256_000_000))
FRAME_BYTES = 8 << 20
SMALL_EPISODES, SMALL_FILES, SMALL_FILE_BYTES = 100, 64, 16_384
ROUNDS = 3


class Floor:
    """The parts of packing alone. The frames are those of an artifact, so that zstd has the very same input."""

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._buffer = memoryview(bytearray(FRAME_BYTES))

    def cpu_seconds(self, episode: Path, artifact: bytes | Path) -> tuple[dict[str, float], str]:
        """Seconds by part, and the content digest that came out."""
        parts = {"read": self._read(episode), "zstd": 0.0, "blake3": 0.0, "sha256": 0.0}
        content, digest = blake3.blake3(), hashlib.sha256()
        with _open(artifact) as reader:
            for frame in reader.stream():
                times = [time.process_time()]
                compressed = self._compressor.compress(frame)
                times.append(time.process_time())
                content.update(frame)
                times.append(time.process_time())
                digest.update(compressed)
                times.append(time.process_time())
                for part, start, end in zip(("zstd", "blake3", "sha256"), times, times[1:], strict=False):
                    parts[part] += end - start
        return parts, content.hexdigest()

    def _read(self, episode: Path) -> float:
        start = time.process_time()
        for name in os.listdir(episode):
            fd = os.open(episode / name, os.O_RDONLY)
            while os.readv(fd, [self._buffer]) == len(self._buffer):
                pass
            os.close(fd)
        return time.process_time() - start


def _open(artifact: bytes | Path) -> ArtifactReader:
    if isinstance(artifact, Path):
        return ArtifactReader.open(artifact)
    return ArtifactReader(lambda offset, length: artifact[offset : offset + length], len(artifact))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def episode(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "large"
    assert corpus.write_episode(path, TOTAL_BYTES, 16_000_000) == TOTAL_BYTES
    return path


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("level", "threads"), [(1, 2), (3, 1), (3, 2)])
def test_a_large_episode(benchmark: Any, episode: Path, tmp_path: Path, level: int, threads: int) -> None:
    options, artifact = PackOptions(level=level, frame_bytes=FRAME_BYTES), tmp_path / "a.tar.zst"
    floor, floors, actuals = Floor(level), [], []

    def run(pool: FramePool) -> Manifest:
        with open(artifact, "wb", buffering=0) as sink:
            return pack(episode, sink, options, pool)

    with FramePool(threads) as pool:
        run(pool)  # the page cache is warm and the pool's buffers are there
        for _ in range(ROUNDS):
            parts, digest = floor.cpu_seconds(episode, artifact)
            floors.append(sum(parts.values()))
            manifest = run(pool)
            actuals.append(manifest.cpu_seconds)
            assert manifest.content_blake3 == digest
        manifest = benchmark.pedantic(run, args=(pool,), rounds=1)
    assert manifest.fingerprint == fingerprint(episode, "keep")
    _report(benchmark, min(floors), min(actuals), manifest)
    if threads == 1:  # two threads at once cost each other cache: zstd alone takes up to 1.3 times the CPU then
        assert min(actuals) <= 1.25 * min(floors)


@pytest.mark.timeout(0)
def test_small_episodes(benchmark: Any, corpus: Corpus, tmp_path: Path) -> None:
    episodes = [tmp_path / f"small-{number:03d}" for number in range(SMALL_EPISODES)]
    for number, path in enumerate(episodes):
        corpus.write_episode(path, SMALL_FILES * SMALL_FILE_BYTES, SMALL_FILE_BYTES, number)
    floor, floors, actuals = Floor(3), [], []

    def run(pool: FramePool) -> list[tuple[Manifest, bytes]]:
        made = []
        for path in episodes:
            sink = io.BytesIO()
            made.append((pack(path, sink, PackOptions(), pool), sink.getvalue()))
        return made

    with FramePool(1) as pool:
        made = run(pool)
        for _ in range(ROUNDS):
            total = 0.0
            for path, (manifest, artifact) in zip(episodes, made, strict=True):
                parts, digest = floor.cpu_seconds(path, artifact)
                total += sum(parts.values())
                assert digest == manifest.content_blake3
            floors.append(total)
            start = time.process_time()
            made = run(pool)
            actuals.append(time.process_time() - start)
        benchmark.pedantic(run, args=(pool,), rounds=1)
    _report(benchmark, min(floors), min(actuals), made[0][0])
    assert min(actuals) <= 1.6 * min(floors)


@pytest.mark.timeout(0)
def test_memory(benchmark: Any, episode: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom fastship.frames import FramePool\n"
        "from fastship.pack import PackOptions, pack\n"
        "with FramePool(2) as pool, open('/dev/null', 'wb', buffering=0) as sink:\n"
        "    pack(Path(sys.argv[1]), sink, PackOptions(), pool)\n"
        # Not ru_maxrss: a process started by vfork begins with its parent's.
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)\n"
    )
    command = [sys.executable, "-c", script, str(episode)]
    done = benchmark.pedantic(subprocess.run, args=(command,), kwargs={"capture_output": True, "check": True}, rounds=1)
    benchmark.extra_info["peak_rss_mib"] = peak = int(done.stdout)
    print(f"\n{TOTAL_BYTES / 1e6:.0f} MB, 2 threads: peak {peak} MiB")
    assert peak < 200


def _report(benchmark: Any, floor: float, actual: float, manifest: Manifest) -> None:
    benchmark.extra_info.update(
        floor_cpu_s=round(floor, 3),
        actual_cpu_s=round(actual, 3),
        actual_over_floor=round(actual / floor, 3),
        compression=round(manifest.content_bytes / manifest.artifact_bytes, 2),
    )
    print("\n", benchmark.name, benchmark.extra_info)
