"""Is what was stored still there? An artifact is read again from the disk, compared with its receipt, and set aside
where it rotted.

What always holds: nothing is called rotted that was not read wrong twice, and nothing is removed: what rotted is moved
to ``<root>/rotted/``, with its reason, and its id is free to be stored again. Safe beside a running receiver and any
other who checks: an artifact has its name only when it is whole and verified, and it is checked under its ``flock``,
by one at a time. What is read leaves the page cache again.

Blocks on the disk. Imported by ``verification`` and ``scrub``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec

from fastship import pagecache
from fastship.episode import Receipt, now_wall
from fastship.frames import ReadAgain, read_again
from fastship.receiver.store.store import Store

_log = logging.getLogger("fastship.receiver")

_GIVE_BACK_BYTES = 32 << 20  # a large artifact is let go of in steps, while it is read
_POLL_S = 0.1

Verdict = Literal["sound", "mended", "rotted"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a reading found; the body of an answer, and in ``rotted/`` the reason."""

    episode: str
    verdict: Verdict  # "mended": the artifact's content is right, its receipt was not and is written anew
    error: str = ""  # what is wrong, one sentence
    artifact_sha256: str = ""  # as read now; "" where it cannot be read
    artifact_bytes: int = 0
    content_blake3: str | None = None  # as unpacked now; None where it cannot be
    content_bytes: int | None = None
    read_from: Literal["disk", "file"] = "file"  # "disk": nothing of it was left in the page cache when reading began
    cached_bytes: int | None = None  # what the kernel would not drop from its page cache; None: it does not say
    began_at: str = ""  # UTC
    ended_at: str = ""
    set_aside: str = ""  # below the receiver's root
    receipt: Receipt | None = None  # what was stored, by its receipt


class Pace:
    """At most ``bytes_per_s`` are read, on average; 0: as fast as the disk gives them."""

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        self._bytes_per_s = bytes_per_s
        self._due = 0.0

    def wait(self, count: int, stopped: Callable[[], bool]) -> None:
        if not self._bytes_per_s:
            return
        now = time.monotonic()
        self._due = max(self._due, now) + count / self._bytes_per_s
        while (left := self._due - time.monotonic()) > 0 and not stopped():
            time.sleep(min(left, _POLL_S))


class _Reading(NamedTuple):
    found: ReadAgain | None
    error: str  # why there is none
    cached_bytes: int | None


class Custody:
    """Of one store. Safe to use from threads and from several processes at once."""

    def __init__(self, store: Store, *, pace: Pace | None = None, keep: bool = False) -> None:
        """``keep``: say what rotted and leave it where it is."""
        self._store = store
        self._pace = pace or Pace()
        self._keep = keep
        self.read_bytes = 0

    def check(
        self, episode: str, *, stopped: Callable[[], bool] = lambda: False, wait: bool = True, not_before_ns: int = 0
    ) -> Finding | None:
        """Read the artifact again and say what it is; None where none is stored.

        Raises ``BlockingIOError`` where somebody else checks it now and ``wait`` is False, ``InterruptedError`` soon
        after ``stopped`` says so, and ``OSError`` where the store fails otherwise than in reading the artifact.
        ``not_before_ns``: see `Store.note_checked`.
        """
        with self._claimed(episode, stopped, wait) as fd:
            if fd is None:
                return None
            began_at = now_wall()
            receipt = self._store.kept_receipt(episode, fd)
            reading = self._read(fd, stopped)
            if not _is_as_received(reading, receipt):  # once more: memory and cables have their moments, too
                reading = self._read(fd, stopped)
            verdict, error = self._judge(reading, receipt)
            found = reading.found
            finding = Finding(
                episode=episode,
                verdict=verdict,
                error=error,
                artifact_sha256=found.sha256 if found else "",
                artifact_bytes=found.bytes if found else 0,
                content_blake3=found.content.blake3 if found and found.content else None,
                content_bytes=found.content.bytes if found and found.content else None,
                read_from="disk" if reading.cached_bytes == 0 else "file",
                cached_bytes=reading.cached_bytes,
                began_at=began_at,
                ended_at=now_wall(),
                receipt=receipt,
            )
            if verdict == "rotted":
                return self._rotted(finding, os.fstat(fd).st_ino)
            if verdict == "mended":
                assert found is not None
                _log.warning("%s: %s", episode, error)
                finding = msgspec.structs.replace(finding, receipt=self._store.renew_receipt(episode, found))
            self._store.note_checked(episode, max(time.time_ns(), not_before_ns))
            return finding

    def _judge(self, reading: _Reading, receipt: Receipt | None) -> tuple[Verdict, str]:
        found = reading.found
        if found is None:
            return "rotted", f"it cannot be read: {reading.error}"
        if _is_as_received(reading, receipt):
            return "sound", ""
        if receipt is None:
            if found.content is None and self._store.verifies_content:
                return "rotted", f"its receipt is lost or spoilt, and it cannot be unpacked: {found.fault}"
            return "mended", "its receipt was lost or spoilt, and is made again from the artifact"
        is_content_right = (
            found.content is not None and receipt.content is not None and found.content.blake3 == receipt.content.blake3
        )
        if is_content_right or found.sha256 == receipt.artifact.sha256:
            what = "content is" if is_content_right else "bytes are"
            return "mended", f"its {what} right and its receipt said something else: the receipt is made again"
        said = f"its bytes have SHA-256 {found.sha256}, its receipt says {receipt.artifact.sha256}"
        return "rotted", f"{said}; {found.fault}" if found.fault else said

    def _rotted(self, finding: Finding, inode: int) -> Finding:
        if not self._keep:
            try:
                target = self._store.rotted.set_aside(finding.episode, inode, finding)
                finding = msgspec.structs.replace(finding, set_aside=str(target.relative_to(self._store.root)))
            except OSError as error:
                _log.error("%s cannot be set aside: %s", finding.episode, error)
        place = f"it is set aside as {finding.set_aside}" if finding.set_aside else "it is left where it is"
        _log.error("%s rotted in the store: %s; %s", finding.episode, finding.error, place)
        return finding

    def _read(self, fd: int, stopped: Callable[[], bool]) -> _Reading:
        """From the disk, where the kernel drops what it has of the file."""
        pagecache.give_back(fd, 0, 0)
        cached_bytes = pagecache.cached_bytes(fd)
        given = 0

        def read_at(offset: int, length: int) -> bytes:
            nonlocal given
            self._pace.wait(length, stopped)
            data = os.pread(fd, length, offset)
            self.read_bytes += len(data)
            if offset - given > _GIVE_BACK_BYTES:
                pagecache.give_back(fd, given, offset)
                given = offset
            return data

        try:
            found = read_again(read_at, os.fstat(fd).st_size, threads=self._store.threads, stopped=stopped)
        except InterruptedError:
            raise
        except OSError as error:
            return _Reading(None, error.strerror or str(error), cached_bytes)
        finally:
            pagecache.give_back(fd, 0, 0)
        return _Reading(found, "", cached_bytes)

    @contextlib.contextmanager
    def _claimed(self, episode: str, stopped: Callable[[], bool], wait: bool) -> Iterator[int | None]:
        """The artifact, open and under its lock; None where there is none (any more)."""
        path = self._store.artifact_path(episode)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    if stopped():
                        raise InterruptedError("the verification was told to stop") from None
                    time.sleep(_POLL_S)
            yield fd if _is_at(path, fd) else None
        finally:
            os.close(fd)


def _is_as_received(reading: _Reading, receipt: Receipt | None) -> bool:
    """Whether the bytes, and what is known of the content, are what the receipt says."""
    found = reading.found
    if found is None or receipt is None:
        return False
    if (found.sha256, found.bytes) != (receipt.artifact.sha256, receipt.artifact.bytes):
        return False
    return receipt.content is None or found.content is None or found.content.blake3 == receipt.content.blake3


def _is_at(path: os.PathLike[str], fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
