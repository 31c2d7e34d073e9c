"""Frames alone: the pool with 1 and 2 threads beside one-shot zstd of the same frames and libzstd's own threads."""

from __future__ import annotations

import random
from typing import Any

import pytest
import zstandard

from bench.compare import SCALE, beside, timed
from bench.corpus import SHAPES, Corpus
from fastship.frames import FramePool
from fastship.frames.levels import parameters

pytestmark = pytest.mark.timeout(0)

FRAME_BYTES = 8 << 20


@pytest.fixture(scope="module")
def frames(corpus: Corpus) -> list[bytes]:
    total = round(SHAPES["large"].total_bytes * SCALE)
    rng = random.Random(1)
    pieces = [corpus._pieces(kind, total // 4, rng) for kind in ("jsonl", "csv", "f64", "log")]
    data = b"".join(piece for kind in pieces for piece in kind)
    return [data[at : at + FRAME_BYTES] for at in range(0, len(data), FRAME_BYTES)]


@pytest.mark.parametrize("level", [3, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_frame_pool(benchmark: Any, frames: list[bytes], level: int, threads: int) -> None:
    compressor = zstandard.ZstdCompressor(compression_params=parameters(level))
    threaded = zstandard.ZstdCompressor(level=level, threads=threads, write_checksum=True)
    expected = [compressor.compress(frame) for frame in frames]
    whole = b"".join(frames)
    made: list[bytes] = []

    def through_pool() -> None:
        made.clear()
        stream = pool.open(level=level, frame_bytes=FRAME_BYTES, commit=lambda frame, _size: made.append(frame))
        with stream:
            buffer = stream.buffer
            for frame in frames[:-1]:
                buffer[: len(frame)] = frame  # where packing reads files into it
                buffer = stream.submit(len(frame))
            buffer[: len(frames[-1])] = frames[-1]
            stream.finish(len(frames[-1]))

    with FramePool(threads) as pool:
        beside(
            benchmark,
            timed(through_pool),
            {
                "one_shot": timed(lambda: [compressor.compress(frame) for frame in frames]),
                "libzstd_threads": timed(lambda: threaded.compress(whole)),
            },
            raw_bytes=len(whole),
            ratio=len(whole) / sum(map(len, expected)),
        )
    assert made == expected
