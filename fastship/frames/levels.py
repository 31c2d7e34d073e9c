"""What zstd is asked for at each level, and which frames are not worth the asking.

What always holds: all here is a pure function of the level and the frame's content, so the same bytes come out for any
number of threads. Every zstd decoder reads them: only how matches are looked for differs from libzstd's own table.

Telemetry has few long matches and many digits that look alike by chance. Small tables forget the chance matches from
far away, which cost more to write down than they save, and stay in the first two caches: less CPU at the same size or
a smaller one. Not so for source text and programs, which have long matches: 2 % larger at level 3, 6 % at 18.
What is not set here is libzstd's, which also fits it to small frames. Imports zstandard; ``compress`` imports it.
"""

from __future__ import annotations

from typing import Any, Final

import zstandard

LEVELS: Final = range(-7, 23)
FASTEST_LEVEL: Final = 1
"""On random bytes no level takes less CPU, the negative ones included (``bench_profiles``)."""

_TABLES: Final[dict[int, dict[str, Any]]] = {
    2: {"hash_log": 14},  # 16 in libzstd
    3: {"chain_log": 14, "hash_log": 15},  # 16 and 17
    18: {"search_log": 4, "chain_log": 18, "hash_log": 17},  # 6, 23 and 22: 3 MiB of tables instead of 49
}
"""Where a level differs from libzstd's; ``bench_profiles`` holds each beside libzstd's own, on every shape.
Size and CPU over its: 2: 0.97 to 1.01, 0.81 to 0.99; 3: 0.97 to 1.00, 0.79 to 0.99;
18, over 19: 1.00 to 1.04, 0.26 to 0.67."""

_SAMPLED_FROM_LEVEL: Final = 5  # below, libzstd itself passes random bytes nearly as fast as at level 1
_SAMPLED_FROM_BYTES: Final = 256 << 10
_SAMPLES: Final = 32
_SAMPLE_BYTES: Final = 2 << 10
_COMPRESSIBLE: Final = 0.98  # of the samples' bytes: real recordings give at most 0.91, random bytes 1


def parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """For frames of any size at ``level``, with content size and checksum. Raises ``ValueError`` for no level."""
    if level not in LEVELS:
        raise ValueError(f"zstd has no level {level}")
    own = _TABLES.get(level, {})
    return zstandard.ZstdCompressionParameters(
        compression_level=level, write_content_size=True, write_checksum=True, **own
    )


def worthwhile_level(level: int, frame: memoryview, fastest: zstandard.ZstdCompressor) -> int:
    """``level``, or `FASTEST_LEVEL` for a frame that no level makes smaller, such as encoded video.

    Level 19 takes 350 times the CPU of level 1 for random bytes, and gains as little. Told by 32 samples of 2 KiB,
    spread evenly and compressed as one by ``fastest``: 0.1 ms. A frame of which a tenth can be compressed is taken for
    one that cannot in 3 % of all cases, and then that tenth still is, at level 1.
    """
    if level < _SAMPLED_FROM_LEVEL or len(frame) < _SAMPLED_FROM_BYTES:
        return level
    stride = len(frame) // _SAMPLES
    samples = b"".join(frame[at : at + _SAMPLE_BYTES] for at in range(0, stride * _SAMPLES, stride))
    return level if len(fastest.compress(samples)) < _COMPRESSIBLE * len(samples) else FASTEST_LEVEL
