"""What zstd is asked for: every level is a level, any decoder reads it, and random frames are passed quickly."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest
import zstandard

from fastship.frames import FramePool, levels
from fastship.frames.levels import FASTEST_LEVEL, parameters, worthwhile_level

FRAME = 1 << 20


def rows(length: int) -> bytes:
    rng = random.Random(3)
    pool = b"".join(b'{"t":%d,"cpu":%.4f}\n' % (number, rng.random()) for number in range(20_000))
    return (pool * (length // len(pool) + 1))[:length]


NOISE = random.Random(4).randbytes(FRAME)
ROWS = rows(FRAME)
FASTEST = zstandard.ZstdCompressor(compression_params=parameters(FASTEST_LEVEL))


@pytest.mark.parametrize("level", [level for level in levels.LEVELS if level])
@pytest.mark.parametrize("size", [0, 1, 20_000, 300_000])
def test_every_level_gives_sized_and_checked_frames_that_stock_zstd_reads(level: int, size: int) -> None:
    frame = zstandard.ZstdCompressor(compression_params=parameters(level)).compress(ROWS[:size])
    about = zstandard.get_frame_parameters(frame)
    assert (about.content_size, about.has_checksum) == (size, True)
    assert zstandard.ZstdDecompressor().decompress(frame) == ROWS[:size]
    if shutil.which("zstd") and size == 20_000:
        done = subprocess.run(["zstd", "-dc"], input=frame, capture_output=True, check=True)
        assert done.stdout == ROWS[:size]


@pytest.mark.parametrize("level", [-8, 23, 99])
def test_what_is_no_level_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=f"no level {level}"):
        parameters(level)


def test_a_frame_of_noise_is_passed_at_the_fastest_level() -> None:
    assert worthwhile_level(19, memoryview(NOISE), FASTEST) == FASTEST_LEVEL
    assert worthwhile_level(19, memoryview(ROWS), FASTEST) == 19


def test_low_levels_and_small_frames_are_not_sampled() -> None:
    assert worthwhile_level(3, memoryview(NOISE), FASTEST) == 3
    assert worthwhile_level(19, memoryview(NOISE)[:20_000], FASTEST) == 19
    assert worthwhile_level(19, memoryview(b""), FASTEST) == 19


def test_a_frame_of_which_half_is_noise_keeps_its_level() -> None:
    half = FRAME // 2
    for frame in (NOISE[:half] + ROWS[:half], ROWS[:half] + NOISE[:half]):
        assert worthwhile_level(9, memoryview(frame), FASTEST) == 9


@pytest.mark.parametrize("threads", [1, 2])
def test_the_pool_passes_noise_quickly_and_the_rest_at_its_level(threads: int) -> None:
    committed: list[bytes] = []
    with (
        FramePool(threads) as pool,
        pool.open(level=19, frame_bytes=FRAME, commit=lambda frame, _: committed.append(frame)) as stream,
    ):
        buffer = stream.buffer
        for data in (NOISE, ROWS[:FRAME]):
            buffer[:] = data
            buffer = stream.submit(FRAME)
        stream.finish(0)
    best = zstandard.ZstdCompressor(compression_params=parameters(19))
    assert committed == [FASTEST.compress(NOISE), best.compress(ROWS)]
