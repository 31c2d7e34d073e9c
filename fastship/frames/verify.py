"""Is an artifact what it says? Every frame decompressed, the tar stream's digest and members counted.

What always holds: memory is bounded as `ArtifactReader.stream` says, whatever the file; nothing is written. Imports
its siblings, ``errors`` and blake3; the receiver and the command line import it through ``fastship.frames``.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import msgspec

from fastship.errors import ArtifactError
from fastship.frames.reader import ArtifactReader, ReadAt
from fastship.frames.tar import NotTar, TarReader

_PIECE_BYTES = 1 << 20


class VerifiedContent(msgspec.Struct, frozen=True):
    """What was found: the content digest, the tar stream's length, its members (None: not a tar stream)."""

    blake3: str
    bytes: int
    members: int | None


def verify_content(
    path: Path | str,
    *,
    threads: int = 1,
    max_content_bytes: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> VerifiedContent:
    """Read the artifact at ``path``, with or without seek table, and say what is in it.

    Blocks for the length of a decompression (about 1 GB/s of tar stream a thread), without the GIL. The file is not
    changed and the call may be repeated. Raises `ArtifactError` when it is damaged, cut, not zstd, or holds more than
    ``max_content_bytes`` (None: any size); ``InterruptedError`` soon after ``stopped`` says so.
    """
    with ArtifactReader.open(path) as reader:
        return _verify(reader, threads, max_content_bytes, stopped)


class ReadAgain(msgspec.Struct, frozen=True):
    """What the bytes of an artifact are: their SHA-256, and the content, or (``fault``) why there is none."""

    sha256: str
    bytes: int
    content: VerifiedContent | None
    fault: str = ""


def read_again(
    read_at: ReadAt, total_bytes: int, *, threads: int = 1, stopped: Callable[[], bool] = lambda: False
) -> ReadAgain:
    """Both digests of an artifact of which nothing is known, each of its bytes read once, in order.

    But for the seek table, the index and what follows damage, which is read twice. Blocks as `verify_content`. Raises
    ``InterruptedError`` soon after ``stopped`` says so, and what ``read_at`` raises, ``OSError`` say.
    """
    passing = _Passing(read_at, total_bytes)
    content, fault = None, ""
    try:
        content = _verify(ArtifactReader(passing.read, total_bytes), threads, None, stopped)
    except ArtifactError as error:
        fault = error.message
    return ReadAgain(passing.digest_rest(stopped), total_bytes, content, fault)


class _Passing:
    """Digests what is read of a file as long as that is the next that was not."""

    def __init__(self, read_at: ReadAt, total_bytes: int) -> None:
        self._read_at = read_at
        self._total_bytes = total_bytes
        self._digest = hashlib.sha256()
        self._at = 0

    def read(self, offset: int, length: int) -> bytes:
        data = self._read_at(offset, length)
        if offset == self._at:
            self._digest.update(data)
            self._at += len(data)
        return data

    def digest_rest(self, stopped: Callable[[], bool]) -> str:
        while self._at < self._total_bytes:
            if stopped():
                raise InterruptedError("the verification was told to stop")
            if not self.read(self._at, min(_PIECE_BYTES, self._total_bytes - self._at)):
                raise OSError(errno.EIO, f"the file ends at byte {self._at} of {self._total_bytes}")
        return self._digest.hexdigest()


def _verify(
    reader: ArtifactReader, threads: int, max_content_bytes: int | None, stopped: Callable[[], bool]
) -> VerifiedContent:
    found = Digested(reader.stream(threads), reader.content_bytes or 0, max_content_bytes, stopped).judge()
    check_index(reader, found.members)
    return found


def check_index(reader: ArtifactReader, members: int | None) -> None:
    """The member index, where there is one, must have as many. Raises `ArtifactError`."""
    if reader.has_index and sum(1 for _ in reader.members()) != members:
        raise ArtifactError(f"the member index does not have the {members} members of the tar stream")


class Digested:
    """A tar stream, digested, counted and limited while its members are looked at.

    ``said_bytes`` is the length that is claimed before anything is read.
    """

    def __init__(
        self,
        contents: Iterator[bytes],
        said_bytes: int = 0,
        limit_bytes: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._contents = contents
        self._said_bytes = said_bytes
        self._limit_bytes = limit_bytes
        self._stopped = stopped
        self._digest = blake3.blake3()
        self._bytes = 0

    def judge(self) -> VerifiedContent:
        """Read all of it, once. Raises `ArtifactError`, ``InterruptedError``, and what the contents raise."""
        chunks = iter(self)
        try:
            members: int | None = sum(1 for _ in TarReader(chunks))
        except NotTar:
            members = None
        for _ in chunks:  # the zero blocks, or all that follows what is not tar
            pass
        return VerifiedContent(self._digest.hexdigest(), self._bytes, members if self._bytes else None)

    def __iter__(self) -> Iterator[bytes]:
        self._check(self._said_bytes)
        for chunk in self._contents:
            if self._stopped():
                raise InterruptedError("the verification was told to stop")
            self._bytes += len(chunk)
            self._check(self._bytes)
            self._digest.update(chunk)
            yield chunk

    def _check(self, content_bytes: int) -> None:
        if self._limit_bytes is not None and content_bytes > self._limit_bytes:
            raise ArtifactError(f"the artifact holds more than the {self._limit_bytes} bytes that are allowed")
