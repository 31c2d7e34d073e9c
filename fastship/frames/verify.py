"""Is an artifact what it says? Every frame decompressed, the tar stream's digest and members counted.

What always holds: memory is bounded as `ArtifactReader.stream` says, whatever the file; nothing is written. Imports
its siblings, ``errors`` and blake3; the receiver and the command line import it through ``fastship.frames``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
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
    max_ratio: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> VerifiedContent:
    """Read the artifact at ``path``, with or without seek table, and say what is in it.

    Blocks for the length of a decompression (about 1 GB/s of tar stream a thread), without the GIL. The file is not
    changed and the call may be repeated. Raises `ArtifactError` when it is damaged, cut, not zstd, or holds more than
    ``max_content_bytes`` (None: any size); `Bomb` when it is one by ``max_ratio`` (0: none is);
    ``InterruptedError`` soon after ``stopped`` says so; any other ``OSError`` where the file cannot be read, which says
    nothing about the artifact.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reader = ArtifactReader(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)
        return _verify(reader, threads, max_content_bytes, stopped, max_ratio)
    finally:
        os.close(fd)


class Bomb(ArtifactError):
    """What the artifact holds is out of all proportion: to unpack it would cost much more than to send it."""


RATIO_FROM_BYTES = 1 << 30
"""Of content: half a second to unpack, whatever the ratio. What a sensor wrote that said nothing is less."""
_MEMBERS_FROM = 100_000
"""Members: half a second to look at. Beyond them one a byte of the artifact; real ones take ten and more."""


def most_content_bytes(artifact_bytes: int, max_ratio: int) -> int:
    """What an artifact of so many bytes may hold by ``max_ratio``, which is not 0."""
    return max(RATIO_FROM_BYTES, artifact_bytes * max_ratio)


def most_members(artifact_bytes: int) -> int:
    """What an artifact of so many bytes may have of them, where there is a ratio."""
    return _MEMBERS_FROM + artifact_bytes


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
    reader: ArtifactReader,
    threads: int,
    max_content_bytes: int | None,
    stopped: Callable[[], bool],
    max_ratio: int = 0,
) -> VerifiedContent:
    contents = reader.stream(threads)
    if max_ratio:
        contents = _in_proportion(contents, reader, max_ratio)
    most = most_members(reader.total_bytes) if max_ratio else None
    found = Digested(contents, reader.content_bytes or 0, max_content_bytes, stopped, most).judge()
    check_index(reader, found.members)
    return found


def _in_proportion(contents: Iterator[bytes], reader: ArtifactReader, max_ratio: int) -> Iterator[bytes]:
    most = most_content_bytes(reader.total_bytes, max_ratio)
    total = 0
    for chunk in contents:
        total += len(chunk)
        if max(total, reader.content_bytes or 0) > most:
            raise Bomb(f"it would unpack to more than {max_ratio} times its {reader.total_bytes} bytes")
        yield chunk


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
        most_members: int | None = None,
    ) -> None:
        self._contents = contents
        self._said_bytes = said_bytes
        self._limit_bytes = limit_bytes
        self._stopped = stopped
        self._most_members = most_members
        self._digest = blake3.blake3()
        self._bytes = 0

    def judge(self) -> VerifiedContent:
        """Read all of it, once. Raises `ArtifactError`, ``InterruptedError``, and what the contents raise."""
        chunks, most = iter(self), self._most_members
        members: int | None = None
        with contextlib.suppress(NotTar):
            members = TarReader(chunks).count(most)
        if members is not None and most is not None and members > most:
            raise Bomb(f"it has more than {most} members")
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
