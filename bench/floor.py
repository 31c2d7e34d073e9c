"""The floor: what packing cannot go below with this zstd: its parts alone, on the very same bytes.

Read the files, compress each frame one-shot, BLAKE3 of the tar stream, SHA-256 of the artifact, write it. No walk, no
tar headers, no index, no order to keep. Efficiency is the floor's CPU over the actual CPU, both taken in the same run.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import blake3
import zstandard

from fastship.frames import ArtifactReader
from fastship.frames.levels import parameters

_BUFFER_BYTES = 8 << 20


class FloorCost(NamedTuple):
    """CPU seconds by part, and the content digests that came out, one an artifact."""

    parts: dict[str, float]
    contents: list[str]

    @property
    def cpu_s(self) -> float:
        return sum(self.parts.values())


class Floor:
    """``threads`` compress at once, as many as the pack that it is compared with: two that share a core's units or a
    cache take more CPU for the same work than one alone, and that is not the packer's doing."""

    def __init__(self, level: int, threads: int, scratch: Path) -> None:
        self._level = level
        self._threads = threads
        self._scratch = scratch
        self._compressors = [zstandard.ZstdCompressor(compression_params=parameters(level)) for _ in range(threads)]
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def cost(self, episodes: Sequence[Path], artifacts: Sequence[Path]) -> FloorCost:
        """Of packing the episodes, whose frames are taken from their artifacts."""
        parts = {"read": 0.0, "zstd": 0.0, "blake3": 0.0, "sha256": 0.0, "write": 0.0}
        contents = []
        with ThreadPoolExecutor(self._threads) as pool:
            for episode, artifact in zip(episodes, artifacts, strict=True):
                parts["read"] += self._read(episode)
                contents.append(self._artifact(artifact, pool, parts))
        return FloorCost(parts, contents)

    def _artifact(self, artifact: Path, pool: ThreadPoolExecutor, parts: dict[str, float]) -> str:
        content, digest = blake3.blake3(), hashlib.sha256()
        fd = os.open(self._scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with ArtifactReader.open(artifact) as reader:
                for frames in _batches(reader.stream(), self._threads):
                    times = [time.process_time()]
                    if self._threads == 1:
                        compressed = [self._compressors[0].compress(frame) for frame in frames]
                    else:
                        shares = [frames[number :: self._threads] for number in range(self._threads)]
                        work = pool.map(_compress_all, self._compressors, shares)
                        compressed = [frame for share in work for frame in share]
                    times.append(time.process_time())
                    for frame in frames:
                        content.update(frame)
                    times.append(time.process_time())
                    for frame in compressed:
                        digest.update(frame)
                    times.append(time.process_time())
                    for frame in compressed:
                        os.write(fd, frame)
                    times.append(time.process_time())
                    for part, start, end in zip(("zstd", "blake3", "sha256", "write"), times, times[1:], strict=False):
                        parts[part] += end - start
        finally:
            os.close(fd)
        return content.hexdigest()

    def _read(self, episode: Path) -> float:
        start = time.process_time()
        for name in os.listdir(episode):
            fd = os.open(episode / name, os.O_RDONLY)
            while os.readv(fd, [self._buffer]) == len(self._buffer):
                pass
            os.close(fd)
        return time.process_time() - start


def _compress_all(compressor: zstandard.ZstdCompressor, frames: Sequence[bytes]) -> list[bytes]:
    return [compressor.compress(frame) for frame in frames]


def _batches(frames: Iterator[bytes], count: int) -> Iterator[list[bytes]]:
    """As few at once as there are threads, so that each is in the cache still when it is compressed, as in a pack."""
    while batch := list(itertools.islice(frames, count)):
        yield batch
