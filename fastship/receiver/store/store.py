"""The durable store: artifacts and receipts under the episodes' names, each published once.

``<root>/episodes/<id>.tar.zst`` beside ``<id>.receipt.json`` is all that a reader needs; ``<root>/uploads/`` is what
is not finished; ``<root>/secret`` keys the upload tokens. Nothing is written outside the root.

What always holds: a name in ``episodes/`` is given by ``link(2)``, never replaced, and only to a file that was
synced and verified. The artifact is the fact, the receipt follows from it, so the order is
    receipt synced as uploads/<id>.<inode>.receipt -> artifact linked, directory synced -> receipt renamed into place
and a crash between any two of these loses nothing: whoever next asks for an artifact without a receipt (`mend` asks
for all, at each start) syncs both, finds the one that waits under the artifact's inode (a link keeps it) and renames
it, or makes it again by reading the artifact. So an artifact with a receipt in its place has a name that survives, and
nobody is told of any other. A receipt without its artifact says nothing and is removed before that id
is published.

Blocks on the disk. Imported by ``app`` and ``server``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fastship import durable, pagecache
from fastship.episode import (
    Read,
    Receipt,
    ReceivedArtifact,
    ReceivedContent,
    episode_of_artifact,
    now_wall,
)
from fastship.errors import ArtifactError, ReceiverError
from fastship.frames import Following, ReadAgain, verify_content
from fastship.receiver.policy import answers
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared, compare
from fastship.receiver.store.accounts import Accounts, Full
from fastship.receiver.store.receipts import Receipts, encode
from fastship.receiver.store.recount import Recount
from fastship.receiver.store.rotted import Rotted
from fastship.receiver.uploads.partial import Partial, Unsynced, begin_writeback, sync_data
from fastship.receiver.uploads.uploads import Uploads
from fastship.settings import ReceiverSettings

_log = logging.getLogger("fastship.receiver")

_DOUBTFUL = 1000  # artifacts remembered so that not everyone who asks reads them
_FOLLOWINGS = 4  # artifacts verified while they come, in a process; the others are when they are whole


class DigestMismatch(Exception):
    """The artifact's bytes are not what its digest says."""


class ContentMismatch(Exception):
    """The tar stream is not what the content digest or length says."""


class Prepared:
    """A verified artifact and its receipt, on the way to their names. Raises ``OSError``."""

    named = False

    def __init__(self, partial: Partial, declared: Declared, receipt: Receipt, waiting: Path) -> None:
        self.partial = partial
        self.declared = declared
        self.receipt = receipt
        self.waiting = waiting
        # Nobody reads it before the artifact has its name, and it is synced before that.
        self.receipt_fd = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            durable.write_all(self.receipt_fd, encode(receipt, declared.owner))
        except BaseException:
            self.close(keep_partial=True)
            raise

    def forget_receipt(self) -> None:
        durable.unlink_if_present(self.waiting)

    def close(self, *, keep_partial: bool = False) -> None:
        """What got no name leaves no receipt and, unless it is kept for another try, no partial."""
        os.close(self.receipt_fd)
        if not self.named:
            self.forget_receipt()
        if not keep_partial:
            if not self.named:
                durable.unlink_if_present(self.partial.path)
            self.partial.close()


class Store:
    """The store below ``settings.root``, made when it is not there. Raises `ReceiverError` when it cannot be used.

    ``most_bytes``: as for `Accounts`. Safe to use from threads and from several processes at once.
    """

    def __init__(self, settings: ReceiverSettings, most_bytes: Callable[[str], int] = lambda _owner: 0) -> None:
        if not settings.root:
            raise ReceiverError("receiver.root is not set", remedy="name a directory: fastship receive --root DIR")
        self.root = Path(settings.root)
        self._episodes = self.root / "episodes"
        self._uploads = self.root / "uploads"
        self._verify: Literal["content", "artifact"] = settings.verify
        self._read_back = settings.read_back
        self._threads = max(1, len(os.sched_getaffinity(0)) // settings.workers)
        self._max_ratio = settings.max_ratio
        self._reserve_bytes = settings.reserve_bytes
        self._name = socket.gethostname()
        self._receipts = Receipts(self._episodes, self._uploads)
        self.accounts = Accounts(self.root / "accounts", most_bytes)
        self.recount = Recount(self._episodes, self._receipts, self.accounts)
        self.rotted = Rotted(self.root / "rotted", self._receipts)
        self._recovering = threading.Lock()
        self._doubtful: dict[str, tuple[tuple[int, int, int], Receipt]] = {}  # not as stored; when it was read so
        self._stopping = threading.Event()
        try:
            durable.make_directories([self.root])
            self.secret = _secret(self.root)
            inside = (self._uploads / "ended", self._uploads / "bodies", self.root / "accounts")
            durable.make_directories([self._episodes, self._uploads, *inside])  # makes the secret's name durable, too
            if os.stat(self._episodes).st_dev != os.stat(self._uploads).st_dev:
                raise ReceiverError(
                    f"{self._episodes} and {self._uploads} are on two file systems",
                    remedy="keep the receiver's root on one: an artifact is published by a link",
                )
        except OSError as error:
            raise ReceiverError(
                f"receiver.root {self.root} cannot be used: {error.strerror}: {error.filename or self.root}",
                remedy="make it writable for the receiver",
            ) from None
        self._followings = threading.Semaphore(_FOLLOWINGS)
        self.uploads = Uploads(
            self._uploads, self.secret, settings.upload_max_age_s, self._follow, settings.reserve_bytes
        )

    def stop(self) -> None:
        """Let verifications that are under way end with ``InterruptedError``: nothing is published any more."""
        self._stopping.set()

    def artifact_path(self, episode: str) -> Path:
        return self._receipts.artifact_path(episode)

    def receipt(self, episode: str) -> Receipt | None:
        """The receipt of a stored episode, None when it is not stored. Reads the artifact only after a crash."""
        if not self.artifact_path(episode).exists():
            return None
        return self._receipts.read(episode) or self._recover(episode)

    def kept_receipt(self, episode: str, fd: int) -> Receipt | None:
        """The receipt of the artifact that is open as ``fd``, as it was written; None where it is lost or spoilt.

        It may be of more bytes, or fewer, than there are. Afterwards the artifact is durable, so that a receipt may
        stand beside it.
        """
        if not self._receipts.path(episode).exists():
            self._sync_named(fd)
        self._receipts.place(episode, fd)
        return self._receipts.written(episode)

    def renew_receipt(self, episode: str, found: ReadAgain) -> Receipt:
        """Write the receipt anew, of an artifact that was ``found`` so in its file. Durable."""
        content = None
        if found.content is not None:
            content = ReceivedContent(found.content.blake3, found.content.bytes, found.content.members)
        read = Read(artifact="file", content="file" if content is not None else None, at=now_wall())
        receipt = self._make_receipt(episode, found.sha256, found.bytes, content, read)
        self._receipts.write(receipt)
        return receipt

    def note_checked(self, episode: str, at_ns: int) -> None:
        """The modification time of a receipt says when its artifact was last read and found right. Not durable."""
        with contextlib.suppress(OSError):
            os.utime(self._receipts.path(episode), ns=(at_ns, at_ns))

    def checked_ns(self, episode: str) -> int:
        """When it was; 0 for an artifact without a receipt."""
        try:
            return os.stat(self._receipts.path(episode)).st_mtime_ns
        except FileNotFoundError:
            return 0

    @property
    def episodes(self) -> Path:
        return self._episodes

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def verifies_content(self) -> bool:
        return self._verify == "content"

    @property
    def threads(self) -> int:
        """That one verification may use."""
        return self._threads

    def mend(self) -> None:
        """Give every artifact its receipt and sweep what is too old or was left by a crash. May be repeated."""
        names = {entry.name for entry in os.scandir(self._episodes)}
        for name in names:
            episode = episode_of_artifact(name)
            if episode is not None and self._receipts.path(episode).name not in names:
                try:
                    self.receipt(episode)
                except OSError as error:
                    _log.error("%s cannot be read, it stays without a receipt: %s", self.artifact_path(episode), error)
        self.uploads.sweep(lambda episode: self.artifact_path(episode).exists())
        self.rotted.mend(self.uploads.is_orphan)
        for directory in (self.root, self._episodes):
            durable.remove_temporaries(directory, is_old=self.uploads.is_orphan)

    def room_bytes(self, token: str | None, wanted_bytes: int = 0) -> int:
        """Free space less the reserve less what uploads other than ``token`` have yet to send; may be below 0.

        Only where ``wanted_bytes`` seem not to fit is the last word on the other uploads asked for.
        """
        free_bytes = durable.free_bytes(self._uploads) - self._reserve_bytes
        room_bytes = free_bytes - self.uploads.declared_bytes(token)
        return room_bytes if wanted_bytes <= room_bytes else free_bytes - self.uploads.declared_bytes(token, fresh=True)

    def publish(self, partial: Partial, declared: Declared) -> tuple[bool, Receipt] | Answer:
        """Verify a whole artifact and give it its name; True: stored now. May be repeated after any failure.

        Returns the 200 or 409 when another upload of the episode was first. Raises `DigestMismatch`,
        `ContentMismatch`, `ArtifactError` (it is no artifact), `Full`, ``InterruptedError`` after `stop`, any other
        ``OSError`` (abandon the partial).
        """
        prepared = self.prepare(partial, declared)
        if isinstance(prepared, Answer):
            return prepared
        try:
            self.sync(prepared)
            first = self.name(prepared)
            if first is not None:
                return first
            self.sync_names()
            self.settle(prepared)
            return True, prepared.receipt
        finally:
            prepared.close(keep_partial=True)

    # The steps of `publish`, for who takes them with several artifacts at once. Each raises what `publish` does.

    def prepare(self, partial: Partial, declared: Declared) -> Prepared | Answer:
        """Verify the artifact and write its receipt where it waits. `Prepared.close` is the caller's to call."""
        sha256, read_from = self._digest(partial)
        if declared.sha256 is not None and sha256 != declared.sha256:
            raise DigestMismatch(f"the {partial.offset} bytes received have SHA-256 {sha256}, not {declared.sha256}")
        stored = self.receipt(declared.episode)
        first = self._already(stored, sha256)
        if first is not None:
            return first
        content, content_from = None, None
        if self._verify == "content":
            try:
                content, content_from = self._verify_content(partial.path, declared, partial)
            except (ArtifactError, ContentMismatch):
                stored = self.receipt(declared.episode)
                if stored is not None:  # whatever this is, it is not what stands there
                    return answers.conflict(stored)
                raise
        if stored is not None:  # else who came first meanwhile is found by `name`
            first = self._already(self.receipt(declared.episode), sha256, content)
            if first is not None:
                return first
        read = Read(artifact=read_from, content=content_from, at=now_wall())
        receipt = self._make_receipt(declared.episode, sha256, partial.offset, content, read)
        waiting = self._receipts.waiting(declared.episode, os.fstat(partial.fd).st_ino)
        return Prepared(partial, declared, receipt, waiting)

    def begin_sync(self, prepared: Prepared) -> None:
        """Let the disk begin, so that of several `sync` the first waits for all."""
        for fd in (prepared.partial.fd, prepared.receipt_fd):
            begin_writeback(fd)

    def sync(self, prepared: Prepared) -> None:
        """The artifact's bytes and the receipt's are synced; the receipt's name is not: that would cost a disk's commit
        more, and a receipt whose name was lost is made again by reading."""
        try:
            os.fsync(prepared.partial.fd)
        except OSError as error:
            raise Unsynced(error.errno, error.strerror) from error
        os.fsync(prepared.receipt_fd)

    def name(self, prepared: Prepared) -> Answer | None:
        """Give it its name, which its owner has so many bytes more by; the 200 or 409 when another artifact has it."""
        declared = prepared.declared
        self._receipts.drop_without_artifact(declared.episode)
        try:
            with self.accounts.adding(declared.owner, prepared.receipt.artifact.bytes):
                os.link(prepared.partial.path, self.artifact_path(declared.episode))
        except (FileExistsError, Full) as error:
            stored = self.receipt(declared.episode)
            first = self._already(stored, prepared.receipt.artifact.sha256, prepared.receipt.content)
            if first is None and isinstance(error, Full):
                self.recount.ask()
                raise
            if first is None:  # what had the name was set aside just now
                return self.name(prepared)
            prepared.forget_receipt()
            return first
        prepared.named = True
        return None

    def sync_names(self) -> None:
        """All that `name` gave so far survives a power loss."""
        durable.sync_directory(self._episodes)

    def settle(self, prepared: Prepared) -> None:
        """The receipt gets its place; the name that the artifact was received under goes."""
        durable.unlink_if_present(prepared.partial.path)
        with contextlib.suppress(FileNotFoundError):  # somebody who asked in between did it for us
            os.rename(prepared.waiting, self._receipts.path(prepared.declared.episode))

    def _already(self, stored: Receipt | None, sha256: str, content: ReceivedContent | None = None) -> Answer | None:
        if stored is None:
            return None
        if content is None:
            # What the client says of the content is not proof here: we hold its bytes and can look.
            known = compare(sha256, None, stored)
            undecided = stored.verified == "content" and self._verify == "content"
            return known if sha256 == stored.artifact.sha256 or not undecided else None
        return compare(sha256, content.blake3, stored)

    def _digest(self, partial: Partial) -> tuple[str, str]:
        """The artifact digest, and from where it was taken. What did not come in one request lay on the disk meanwhile:
        what is there now counts, and not what once passed. Raises `DigestMismatch` where the two are not the same."""
        read_from = "file"
        if self._read_back:
            sync_data(partial.fd)  # what is dirty cannot be dropped
            pagecache.give_back(partial.fd, 0, 0)
            read_from = "disk" if pagecache.cached_bytes(partial.fd) == 0 else "file"
        elif partial.came_at_once:
            return partial.digest(), "arriving"
        passed = partial.digest() if partial.running is not None else None
        found = partial.read_digest()
        if passed not in (None, found):
            text = f"{partial.path.name}: its bytes came with SHA-256 {passed} and have {found} on the receiver's disk"
            _log.error("%s: the disk, or the memory, changed them", text)
            raise DigestMismatch(text)
        return found, read_from

    def _follow(self) -> Following | None:
        """What verifies a new partial while it comes. Takes none of the threads' time before there is much of it."""
        if self._verify != "content":
            return None
        followings = self._followings
        return Following(
            threads=self._threads,
            place=lambda: followings.release if followings.acquire(blocking=False) else None,
            max_ratio=self._max_ratio,
        )

    def _verify_content(
        self, path: Path, declared: Declared | None, partial: Partial | None = None
    ) -> tuple[ReceivedContent, str]:
        """What the artifact holds, and whether that was read from the file ``arriving``, while more of it came."""
        limit = declared.content_bytes if declared is not None else None
        found = None
        if partial is not None and partial.following is not None:
            found = partial.following.finish(partial.offset, self._stopping.is_set)
        read_from = "arriving"
        if found is None or (limit is not None and found.bytes > limit):
            read_from = "file"
            found = verify_content(
                path,
                threads=self._threads,
                max_content_bytes=limit,
                max_ratio=self._max_ratio if declared is not None else 0,
                stopped=self._stopping.is_set,
            )
        if declared is not None:
            if declared.content_blake3 is not None and found.blake3 != declared.content_blake3:
                raise ContentMismatch(f"the tar stream has BLAKE3 {found.blake3}, not {declared.content_blake3}")
            if declared.content_bytes is not None and found.bytes != declared.content_bytes:
                raise ContentMismatch(f"the tar stream has {found.bytes} bytes, not {declared.content_bytes}")
        return ReceivedContent(found.blake3, found.bytes, found.members), read_from

    def _make_receipt(
        self, episode: str, sha256: str, size: int, content: ReceivedContent | None, read: Read
    ) -> Receipt:
        return Receipt(
            episode=episode,
            artifact=ReceivedArtifact(sha256, size),
            content=content,
            verified="content" if content is not None else "artifact",
            stored_at=now_wall(),
            receiver=self._name,
            read=read,
        )

    def _recover(self, episode: str) -> Receipt | None:
        """The receipt of an artifact that has none: a crash came in between, or somebody put the file there.

        What cannot be unpacked, or is another content than an unspoilt receipt says, was cut or rotted: a receipt of it
        as it is now, beside it, would call it sound for ever. So that is only told, until somebody sets it aside.
        """
        with self._recovering:
            try:
                with open(self.artifact_path(episode), "rb") as file:
                    status = os.fstat(file.fileno())
                    self._sync_named(file.fileno())
                    self._receipts.place(episode, file.fileno())
                    receipt = self._receipts.read(episode)
                    if receipt is not None:
                        return receipt
                    known, found = self._doubtful.get(episode, (None, None))
                    if known == (status.st_ino, status.st_size, status.st_mtime_ns):
                        return found
                    _log.warning("%s has no receipt: it is made again by reading the artifact", episode)
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                return None
            content, content_from = None, None
            with contextlib.suppress(ArtifactError):
                content, content_from = self._verify_content(self.artifact_path(episode), None)
            read = Read(artifact="file", content=content_from, at=now_wall())
            receipt = self._make_receipt(episode, sha256, status.st_size, content, read)
            written = self._receipts.written(episode)
            if written is None:
                is_right = content is not None or self._verify != "content"
            else:
                is_right = content is not None and content == written.content
            if is_right:
                self._receipts.write(receipt)
                return receipt
            why = "cannot be unpacked" if written is None else "is not what its receipt says"
            _log.error("%s %s: fastship scrub sets it aside", self.artifact_path(episode), why)
            if len(self._doubtful) >= _DOUBTFUL:
                self._doubtful.clear()
            self._doubtful[episode] = (status.st_ino, status.st_size, status.st_mtime_ns), receipt
            return receipt

    def _sync_named(self, fd: int) -> None:
        """Before an artifact without a receipt is given one: whoever gave it its name may not have come to sync that,
        and may have died; whoever put a file there by hand synced nothing. Until both are durable it is not stored."""
        os.fsync(fd)
        durable.sync_directory(self._episodes)


def _secret(root: Path) -> bytes:
    """The key of the upload tokens, made once; two processes that start together agree on one.

    The caller syncs ``root``: whoever made it may have died before.
    """
    path = root / "secret"
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    temporary = root / f"{durable.TEMP_PREFIX}secret.{secrets.token_hex(8)}"
    durable.write_file(temporary, secrets.token_hex(32).encode() + b"\n", mode=0o600)
    with contextlib.suppress(FileExistsError):
        durable.publish(temporary, path)
    durable.unlink_if_present(temporary)
    return path.read_bytes()
