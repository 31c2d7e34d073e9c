"""The artifact format: zstd frames of the tar stream, a member index, a seek table. Written, read and verified here.

The only package that imports zstandard; it imports nothing of fastship but ``errors``. ``pack``, the receiver, the
worker and the command line import what stands in ``__all__``.
"""

from fastship.frames.arriving import ArrivingContent
from fastship.frames.compress import FramePool, FrameStream, LevelChoice
from fastship.frames.following import Following
from fastship.frames.index import Kind, Member
from fastship.frames.kept import KeptFrames
from fastship.frames.memory import pool_bytes
from fastship.frames.reader import ArtifactReader, ReadAt
from fastship.frames.tar import Header, NotTar, TarReader
from fastship.frames.verify import Bomb, ReadAgain, VerifiedContent, read_again, verify_content
from fastship.frames.writer import ArtifactWriter

__all__ = [
    "ArrivingContent",
    "ArtifactReader",
    "ArtifactWriter",
    "Bomb",
    "Following",
    "FramePool",
    "FrameStream",
    "Header",
    "KeptFrames",
    "Kind",
    "LevelChoice",
    "Member",
    "NotTar",
    "ReadAgain",
    "ReadAt",
    "TarReader",
    "VerifiedContent",
    "pool_bytes",
    "read_again",
    "verify_content",
]
