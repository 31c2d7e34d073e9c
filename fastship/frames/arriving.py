"""The content of an artifact of which the bytes come once, in order, from a server that may know no ranges.

What always holds: what is found in a whole artifact is what `verify_content` finds, but for the seek table and the
member index, which are passed over as any zstd decoder does; memory is bounded by the zstd window, 128 MiB at most,
and `SLICE_BYTES` unpacked. Imports its siblings and ``errors``; ``upload`` imports it through ``fastship.frames``.
"""

from __future__ import annotations

import blake3
import zstandard

from fastship.errors import ArtifactError
from fastship.frames.reader import WINDOW_BYTES
from fastship.frames.seektable import SEEKABLE_MAGIC
from fastship.frames.verify import VerifiedContent

SLICE_BYTES = 1 << 10
"""At once to the decoder, which gives back all that is in it: up to 128 KiB for four bytes (RFC 8878, 3.1.1.2)."""


class ArrivingContent:
    """Feed it every byte with `take`, then `end`. After damage it takes and drops what still comes."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._frame_at = 0  # where in the artifact the frame begins that is being decompressed
        self._at = 0
        self._digest = blake3.blake3()
        self._content_bytes = 0
        self._fault = ""
        self._last = b""

    def take(self, piece: bytes) -> None:
        """The next bytes. Raises nothing for what is in them."""
        self._last = (self._last + piece)[-4:]
        for start in range(0, 0 if self._fault else len(piece), SLICE_BYTES):
            rest = piece[start : start + SLICE_BYTES]
            while rest and not self._fault:
                rest = self._decompress(rest)

    def _decompress(self, piece: bytes) -> bytes:
        """What of ``piece`` is behind the end of the frame."""
        try:
            content = self._frame.decompress(piece)
        except (zstandard.ZstdError, MemoryError) as error:
            self._fault = f"the zstd frame that begins at its byte {self._frame_at} is damaged: {error}"
            return b""
        self._digest.update(content)
        self._content_bytes += len(content)
        rest = self._frame.unused_data if self._frame.eof else b""
        self._at += len(piece) - len(rest)
        if self._frame.eof:
            self._frame_at = self._at
            self._frame = self._decompressor.decompressobj()
        return rest

    @property
    def has_begun(self) -> bool:
        """Whether anything of it was zstd."""
        return self._at > 0

    @property
    def has_table(self) -> bool:
        """Whether a seek table is its end: without one, an artifact of ours is cut, if only between two frames."""
        return self._last == SEEKABLE_MAGIC.to_bytes(4, "little")

    def end(self) -> VerifiedContent:
        """What is in it, its members not counted; that was all. Raises `ArtifactError` where it is damaged or cut."""
        if self._fault:
            raise ArtifactError(self._fault)
        if not self._at:
            raise ArtifactError("it is empty")
        if self._at != self._frame_at:
            raise ArtifactError(f"it ends within the zstd frame that begins at its byte {self._frame_at}")
        return VerifiedContent(self._digest.hexdigest(), self._content_bytes, None)
