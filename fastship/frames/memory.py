"""What making frames takes in memory, so that a limit can be kept by having fewer threads.

Imports zstandard; the supervisor sees it through the package.
"""

from __future__ import annotations

import zstandard


def pool_bytes(threads: int, *, level: int, frame_bytes: int) -> int:
    """The most that a `FramePool` of so many threads holds: threads + 2 frames, in and out, and zstd's own tables."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, source_size=frame_bytes)
    return (threads + 2) * 2 * frame_bytes + threads * parameters.estimated_compression_context_size()
