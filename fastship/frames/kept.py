"""Frames that an interrupted packing left, taken again where they hold what is packed now.

What always holds: nothing of the file is believed: a frame is taken only where it decompresses to exactly the bytes
that the caller has read from the episode, so what comes out is an artifact of those bytes, whatever wrote the file.
From the first frame that does not fit, none is taken any more. Decompressing costs about a third of what compressing
at level 3 does, and a hundredth of level 19.

Memory: one frame, compressed and decompressed. Imports zstandard; ``compress`` uses it, the worker by the package.
"""

from __future__ import annotations

import os

import zstandard

_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1
_HEADER_BYTES = 18  # the longest frame header
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_SLACK_BYTES = 1 << 10  # with an 128th more than its content, above any frame of zstd (ZSTD_COMPRESSBOUND)
_RLE = 1  # a block of one byte, repeated (RFC 8878, 3.1.1.2.2)


class KeptFrames:
    """The whole frames at the beginning of the open file ``fd``, in order, each offered once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._decompressor = zstandard.ZstdDecompressor()
        self.left = True  # there may be a further one
        self.taken_all = True  # no frame was there that did not fit

    def take(self, content: memoryview) -> bytes | None:
        """The next frame if it holds just ``content``, compressed as it stands in the file; else None, for good."""
        if not self.left:
            return None
        frame = self._next(len(content))
        if frame is not None and self._holds(frame, content):
            self._at += len(frame)
            return frame
        self.taken_all = frame is None
        self.left = False
        return None

    def _next(self, content_bytes: int) -> bytes | None:
        """The next whole data frame; None where the file ends, within one or before another kind of frame."""
        longest = content_bytes + (content_bytes >> 7) + _SLACK_BYTES
        head = os.pread(self._fd, _HEADER_BYTES, self._at)
        if not head.startswith(_MAGIC):
            return None
        try:
            at = self._at + zstandard.frame_header_size(head)
            checksum_bytes = _CHECKSUM_BYTES if zstandard.get_frame_parameters(head).has_checksum else 0
        except zstandard.ZstdError:
            return None
        last = False
        while not last:
            header = os.pread(self._fd, _BLOCK_HEADER_BYTES, at)
            if len(header) < _BLOCK_HEADER_BYTES:
                return None
            value = int.from_bytes(header, "little")
            last = bool(value & 1)
            at += _BLOCK_HEADER_BYTES + (1 if (value >> 1) & 3 == _RLE else value >> 3)
            if at - self._at > longest:
                return None
        frame = os.pread(self._fd, at + checksum_bytes - self._at, self._at)
        return frame if len(frame) == at + checksum_bytes - self._at else None

    def _holds(self, frame: bytes, content: memoryview) -> bool:
        try:
            # Asked first: the decompressor would allocate whatever size the frame claims.
            if zstandard.get_frame_parameters(frame).content_size != len(content):
                return False
            return self._decompressor.decompress(frame) == bytes(content)
        except zstandard.ZstdError:
            return False
