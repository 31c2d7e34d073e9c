"""What making frames takes in memory, so that a limit can be kept by having fewer threads.

Imports zstandard, ``compress`` and ``levels``; the supervisor sees it through the package.
"""

from __future__ import annotations

import zstandard

from fastship.frames.compress import COMPRESSORS
from fastship.frames.levels import FASTEST_LEVEL, parameters


def pool_bytes(threads: int, *, level: int, frame_bytes: int, chosen: bool = False) -> int:
    """The most that a `FramePool` of so many threads holds: threads + 2 frames, in and out, and zstd's own tables.

    ``chosen``: levels up to ``level`` are chosen for each frame, so that a thread holds several tables at once.
    """
    asked = parameters(level).estimated_compression_context_size()
    # libzstd makes no tables larger than a frame can fill, which the estimate of what is asked for does not know.
    filled = zstandard.ZstdCompressionParameters.from_level(level, source_size=frame_bytes)
    tables = min(asked, filled.estimated_compression_context_size())
    tables *= COMPRESSORS - 1 if chosen else 1
    tables += parameters(FASTEST_LEVEL).estimated_compression_context_size()
    return (threads + 2) * 2 * frame_bytes + threads * tables
