"""Uploads in the making: found again after any crash, taken over at once, never going back.

``<root>/uploads/`` holds of each upload ``<token>.json`` (what was declared), ``<token>.part`` (the bytes) and
``<token>.lock`` (see ``lock``); of each that ended ``ended/<token>.json``, the tombstone with its final answer;
and bodies of one-shot PUTs (see ``bodies``).

What always holds: an offset that is told is durable: data, counter and the names of both; after another boot the part
is cut back to what was synced; ``<token>.json`` exists before anybody hears of the token; a lock's line names this boot
only while the upload's names are durable; no byte changes of a part that has been given an artifact's name; the newer
of two requests on an upload has it, whichever ways they are of, and the older one stops.

Blocks on the disk. Imported by ``store`` and ``app``.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from fastship import durable, sealed
from fastship.frames import Following
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared, Held
from fastship.receiver.uploads.bodies import Bodies
from fastship.receiver.uploads.lock import Busy, Gone, State, Superseded, UploadLock
from fastship.receiver.uploads.partial import Digest, Partial, Unsynced, sync_data
from fastship.receiver.uploads.reserved import Reserved
from fastship.receiver.uploads.sweep import TOKEN, Sweep
from fastship.receiver.uploads.upload import Upload, note, own

_log = logging.getLogger("fastship.receiver")
WAIT_S = 5.0  # for an upload's lock; whoever verifies holds it for longer
_GENERATIONS = 10**11  # where one may begin; lock has room for ten times as many


class UnknownUpload(Exception):
    """There is no such upload (any more)."""


class LengthMismatch(Exception):
    """The length declared now is not the one declared before, or less than what has arrived."""


class WrongOffset(Exception):
    """The upload does not stand where the request wants to append, but at ``offset``, which is durable."""

    def __init__(self, offset: int, wanted: int) -> None:
        super().__init__(f"the upload is at offset {offset}, not {wanted}")
        self.offset, self.wanted = offset, wanted


class Look(msgspec.Struct, frozen=True):
    """What HEAD tells of an upload; ``offset`` is durable."""

    offset: int
    length: int | None
    ended: Answer | None = None
    owner: str = ""


class _Running(NamedTuple):
    """What goes on from one request to the next, if that is the next generation and at this offset."""

    generation: int
    offset: int
    digest: Digest
    following: Following | None


class Uploads:
    """All uploads below ``directory``. Safe to use from threads and from several processes at once."""

    def __init__(
        self,
        directory: Path,
        secret: bytes,
        max_age_s: float,
        follow: Callable[[], Following | None] = lambda: None,
        reserve_bytes: int = 0,
    ) -> None:
        self._reserve_bytes = reserve_bytes
        self._follow = follow
        self._directory = directory
        self._ended = directory / "ended"
        self._secret = secret
        self._boot = durable.boot_id()
        self._bodies = Bodies(directory, self._boot, reserve_bytes)
        self._running: dict[str, _Running] = {}  # of uploads that this process wrote last, by token
        self._reserved = Reserved(directory, self._read)
        self._sweep = Sweep(directory, max_age_s, self._read, self._remove)

    def token(self, declared: Declared) -> str:
        """The same for the same episode, artifact digest and owner, whenever it is asked; random without a digest."""
        if declared.sha256 is None:
            return secrets.token_hex(32)
        what = f"{declared.episode}|{declared.sha256}" + (f"|{declared.owner}" if declared.owner else "")
        return hmac.new(self._secret, what.encode(), hashlib.sha256).hexdigest()

    def held_by(self, declared: Declared) -> int | None:
        """The bytes that its upload has or was declared with; None where none is there to be gone on with."""
        token = self.token(declared)
        known = self._read(token) if declared.sha256 is not None else None
        return None if known is None else max(known.length or 0, self._reserved.arrived(token))

    def one_shot(self, declared: Declared | None = None) -> Partial:
        """A partial of nobody else, for a body that is sent whole.

        ``declared``: what is sent, where its bytes may count for its upload when that is taken over meanwhile (see
        ``bodies``) or they are kept; ignored without the artifact digest.
        """
        token = self.token(declared) if declared is not None and declared.sha256 else None
        return self._bodies.begin(token, self._follow())

    def create(self, declared: Declared, *, wait_s: float = WAIT_S) -> Upload:
        """Find the upload of this artifact or begin one, and take it over. Idempotent.

        Raises `Busy` after ``wait_s``, and `LengthMismatch` where more has arrived than the length declared now.
        """
        token = self.token(declared)
        while True:
            lock = UploadLock(self._path(token, "lock"), make=True)
            try:
                with lock.locked(wait_s):
                    known = self._read(token)
                    # How an older upload of this token ended is no answer to this one; a power loss may bring it back.
                    durable.unlink_if_present(self._ended / f"{token}.json")
                    if known is None:
                        self._begin(token, declared, lock)
                    else:
                        known = self._declare_again(token, known, declared, lock)
                    return self._take(token, known or declared, lock, wait_s)
            except Gone:  # it ended between our open and our lock: begin anew
                lock.close()
            except BaseException:
                lock.close()
                raise

    def take(self, token: str, owner: str = "", *, offset: int | None = None, wait_s: float = WAIT_S) -> Upload:
        """Take an upload over, so that whoever wrote before stops. Raises `UnknownUpload`, `Busy`.

        ``offset``: only where it stands there. Raises `WrongOffset`, and whoever writes goes on: what wants to append
        elsewhere may be an old request that was held up, or sent twice, on its way.
        """
        lock = self._open_lock(token)
        try:
            with lock.locked(wait_s):
                known = self._read(token)
                if known is None or not _may(owner, known.owner):
                    raise UnknownUpload
                return self._take(token, known, lock, wait_s, offset=offset)
        except Gone:
            lock.close()
            raise UnknownUpload from None
        except BaseException:
            lock.close()
            raise

    def declare_length(self, upload: Upload, length: int) -> None:
        """The whole length, once. Raises `LengthMismatch` (after which the upload stands as it did), `Superseded`."""
        if length < upload.partial.offset:
            raise LengthMismatch(f"{upload.partial.offset} bytes have arrived already")
        known = upload.declared.length
        if known is not None:
            if known != length:
                raise LengthMismatch(f"the upload was declared with {known} bytes")
            return
        with upload.exclusive():
            upload.declared = msgspec.structs.replace(upload.declared, length=length)
            durable.write_file(self._path(upload.token, "json"), sealed.seal(msgspec.json.encode(upload.declared)))
        self._reserved.note(upload.token, upload.declared)

    def look(self, token: str, owner: str = "", *, wait_s: float = WAIT_S) -> Look:
        """The durable offset, without disturbing a request that is writing. Raises `UnknownUpload`, `Busy`."""
        ended = self.ended(token, owner)
        if ended is not None:
            return ended
        try:
            lock = self._open_lock(token)
        except UnknownUpload:
            ended = self.ended(token, owner)  # it may have ended just now
            if ended is None:
                raise
            return ended
        try:
            if not _may(owner, getattr(self._read(token), "owner", "")):
                raise UnknownUpload
            self._sync_part(token, lock)  # most of the wait, while the writer goes on
            with lock.locked(wait_s):
                known = self._read(token)
                if known is None:
                    raise UnknownUpload
                state = self._settle(token, lock)
                return Look(state.synced, known.length)
        except Gone:
            return self.look(token, owner, wait_s=wait_s)
        finally:
            lock.close()

    def keep(self, declared: Declared, partial: Partial, *, begin_only: bool = False) -> None:
        """Make a cut one-shot body the upload of its artifact: where it has more than that, and no newer request has
        taken the body over. ``begin_only``: and only where there is no upload."""
        if not partial.offset or not self._bodies.may_be_taken(partial.path):
            return
        token = self.token(declared)
        lock = UploadLock(self._path(token, "lock"), make=True)
        with contextlib.closing(lock), contextlib.suppress(Busy, Gone), lock.locked():
            known = self._read(token)
            if not self._bodies.may_be_taken(partial.path):  # it was, while we waited
                if known is None:
                    self._remove(token)
                return
            if known is None:
                self._begin(token, declared, lock)
            elif begin_only or self._settle(token, lock).synced >= partial.offset:
                return  # nothing to add: whoever may be writing there is not disturbed
            upload = self._take(token, known or declared, lock, WAIT_S, body=partial.path)
            with contextlib.closing(upload.partial):
                ours = os.path.samestat(os.fstat(upload.partial.fd), os.fstat(partial.fd))
                if ours and upload.partial.offset == partial.offset and partial.running is not None:
                    self._running[token] = _Running(
                        upload._generation, partial.offset, partial.running, partial.part_from_following()
                    )

    def remember(self, upload: Upload) -> None:
        """Keep the running digest and verification for the next append that comes to this process."""
        partial = upload.partial
        if partial.running is not None and partial.offset and not upload.ended:
            if len(self._running) > 4096:
                self._running.clear()  # costs a re-read each, no more; verifications end when nothing comes
            self._running[upload.token] = _Running(
                upload._generation, partial.offset, partial.running, partial.part_from_following()
            )

    def end(self, upload: Upload, answer: Answer | None) -> None:
        """Remove the upload (within `Upload.exclusive`) and keep its final answer as a tombstone, if there is one."""
        token = upload.token
        if answer is not None:
            look = Look(upload.partial.offset, upload.declared.length, answer, upload.declared.owner)
            tombstone = sealed.seal(msgspec.json.encode(look))
            durable.write_file(self._ended / f"{token}.json", tombstone, sync=False)
        self._remove(token)
        upload.ended = True

    def cancel(self, token: str, owner: str = "", *, wait_s: float = WAIT_S) -> None:
        """Remove an upload and its tombstone; whoever writes stops. Raises `UnknownUpload` for neither, `Busy`."""
        removed = False
        there = contextlib.suppress(UnknownUpload, Gone)
        with there, contextlib.closing(self._open_lock(token)) as lock, lock.locked(wait_s):
            if not _may(owner, getattr(self._read(token), "owner", "")):
                raise UnknownUpload
            self._remove(token)
            removed = True
        if self.ended(token, owner) is not None and durable.unlink_if_present(self._ended / f"{token}.json"):
            removed = True
        if not removed:
            raise UnknownUpload

    def ended(self, token: str, owner: str = "") -> Look | None:
        """The tombstone. Raises `UnknownUpload` for what cannot be a token."""
        try:
            raw = (self._ended / f"{_checked(token)}.json").read_bytes()
            look = msgspec.json.decode(sealed.unseal(raw), type=Look)
        except (FileNotFoundError, ValueError):
            return None
        return look if _may(owner, look.owner) else None

    def declared_bytes(self, but: str | None = None, *, fresh: bool = False) -> int:
        """What unfinished uploads other than ``but`` have declared and not yet sent, less what ``but`` has sent.

        Up to a second and more out of date unless ``fresh``, which costs a look through the directory.
        """
        return self._reserved.bytes(but, fresh=fresh)

    def held(self, owner: str, *, fresh: bool = False) -> Held:
        """What ``owner`` has of unfinished uploads, and all have; as up to date as `declared_bytes`."""
        return self._reserved.held(owner, fresh=fresh)

    def sweep(self, is_stored: Callable[[str], bool] = lambda _episode: False) -> int:
        """As `Sweep.run`."""
        return self._sweep.run(is_stored)

    def is_orphan(self, mtime: float) -> bool:
        """As `Sweep.is_orphan`."""
        return self._sweep.is_orphan(mtime)

    def _begin(self, token: str, declared: Declared, lock: UploadLock) -> None:
        # The part first: a record with no part would be an upload that lost its bytes. Always a new file: what a power
        # loss left under this name may be an artifact that was published.
        part = self._path(token, "part")
        durable.unlink_if_present(part)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        durable.write_file(
            self._path(token, "json"), sealed.seal(msgspec.json.encode(declared))
        )  # makes all three names durable
        lock.write(State(boot=self._boot))
        self._reserved.note(token, declared)

    def _declare_again(self, token: str, known: Declared, declared: Declared, lock: UploadLock) -> Declared:
        """Under the lock: what is said of the artifact now is in force, and what is not said now stays.

        Both are of the same artifact digest, so where they differ one is wrong. Were it the older one and stayed, the
        artifact could not be sent for as long as its upload is kept. Raises `LengthMismatch` as `create`.
        """
        said = {name: value for name in declared.__struct_fields__ if (value := getattr(declared, name)) is not None}
        again = msgspec.structs.replace(known, **said)
        if again != known:
            arrived = self._settle(token, lock).synced
            if again.length is not None and again.length < arrived:
                raise LengthMismatch(f"{arrived} bytes have arrived already")
            durable.write_file(self._path(token, "json"), sealed.seal(msgspec.json.encode(again)))
            self._reserved.note(token, again)
        return again

    def _take(
        self,
        token: str,
        declared: Declared,
        lock: UploadLock,
        wait_s: float,
        *,
        body: Path | None = None,
        offset: int | None = None,
    ) -> Upload:
        """Under the lock: a new generation, at the offset that stands, or where an older one-shot body has more, there.

        ``body``: of the bodies only this; ``offset``: see `take`. Raises `Busy` after ``wait_s``.
        """
        before = self._settle(token, lock, grow=offset is None)
        if offset is not None:
            if before.synced != offset:
                raise WrongOffset(before.synced, offset)
            if before.held >= 0:
                before = self._settle(token, lock, grow=True)
        path = self._path(token, "part")
        generation = before.generation + 1

        def replacing() -> None:
            # Nobody may go on with what was the part, and of the new one no more counts than of both, up to where they
            # are the same beginning, until its name is durable.
            lock.write(before._replace(generation=generation, boot="-"))

        offset = self._bodies.take_over(token, path, before.synced, declared.length, wait_s, replacing, body)
        before = before._replace(synced=offset)
        lock.write(before._replace(generation=generation))
        running = self._running.pop(token, None)
        if running is not None and running[:2] != (before.generation, before.synced):
            _drop(running)
            running = None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        partial = Partial(
            path,
            fd,
            offset=before.synced,
            running=running.digest if running else None,
            following=running.following if running else self._follow() if before.synced == 0 else None,
            guard=lambda: own(lock, generation),
            synced=lambda offset: note(lock, generation, offset),
            unsynced=lambda: self._abandon(token, lock, generation),
            reserve_bytes=self._reserve_bytes,
        )
        return Upload(token, declared, lock, generation, partial)

    def _settle(self, token: str, lock: UploadLock, *, grow: bool = False) -> State:
        """Under the lock: find out how many bytes count and make them durable, with the counter.

        Bytes of this boot count as the file's size says, whatever process wrote them; of another boot, only
        what was synced. ``grow``: the caller takes the upload over, so bytes that do not count are cut off. Raises
        `Gone` when the part was published, and a crash came before it lost this name or a power loss gave it back.
        """
        state = lock.read()
        if not state.generation:
            # A token may come again: nothing that any process remembers of the one before may fit this one.
            state = state._replace(generation=1 + secrets.randbelow(_GENERATIONS))
        try:
            fd = os.open(self._path(token, "part"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # published, and a crash came before the record went
            self._remove(token)
            raise Gone from None
        try:
            status = os.fstat(fd)
            if status.st_nlink > 1:
                self._remove(token)
                raise Gone
            size = status.st_size
            same_boot = bool(self._boot) and state.boot == self._boot
            if not same_boot:
                durable.sync_directory(self._directory)
            offset = size if same_boot else min(size, state.synced)
            if state.held >= 0:
                offset = min(offset, state.held)
            if grow or not same_boot:
                if offset < size:
                    os.ftruncate(fd, offset)
                state = state._replace(held=-1, boot=self._boot or "-")
            sync_data(fd)
            state = state._replace(synced=offset)
            lock.write(state, durably=True)
            return state
        except Unsynced:
            self._remove(token)
            raise
        finally:
            os.close(fd)

    def _sync_part(self, token: str, lock: UploadLock) -> None:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path(token, "part"), os.O_RDWR | os.O_CLOEXEC)
            try:
                sync_data(fd)
            except Unsynced:
                with lock.locked():
                    self._remove(token)
                raise
            finally:
                os.close(fd)

    def _abandon(self, token: str, lock: UploadLock, generation: int) -> None:
        """The disk lost bytes of it: nobody may be told of them by a later sync that finds nothing wrong."""
        with contextlib.suppress(Superseded), own(lock, generation):
            _log.error("upload %s... is abandoned: the disk did not take its bytes", token[:8])
            self._remove(token)

    def _read(self, token: str) -> Declared | None:
        try:
            return msgspec.json.decode(sealed.unseal(self._path(token, "json").read_bytes()), type=Declared)
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("the record of upload %s... is spoilt, it begins anew: %s", token[:8], error)
            return None

    def _remove(self, token: str) -> None:
        # The record first: without it nothing of the rest is an upload any more. The lock last.
        for kind in ("json", "part", "lock"):
            durable.unlink_if_present(self._path(token, kind))
        _drop(self._running.pop(token, None))
        self._reserved.note(token, None)

    def _open_lock(self, token: str) -> UploadLock:
        try:
            return UploadLock(self._path(_checked(token), "lock"))
        except FileNotFoundError:
            raise UnknownUpload from None

    def _path(self, token: str, kind: str) -> Path:
        return self._directory / f"{token}.{kind}"


def _drop(running: _Running | None) -> None:
    if running is not None and running.following is not None:
        running.following.abandon()


def _may(owner: str, known: str) -> bool:
    return not owner or not known or owner == known


def _checked(token: str) -> str:
    if not TOKEN.fullmatch(token):
        raise UnknownUpload
    return token
