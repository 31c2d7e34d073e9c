"""What becomes of a body that has come to its end: published, kept, forgotten, or refused; and the answer to it.

What always holds: an exception of storing means the same however the artifact came. Blocks; called in threads.
Imported by ``app`` and ``small``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time

import msgspec

from fastship.episode import Receipt
from fastship.errors import ArtifactError
from fastship.frames import Bomb
from fastship.receiver.policy import answers, decisions
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.accounts import Full
from fastship.receiver.store.store import ContentMismatch, DigestMismatch, Store
from fastship.receiver.uploads.lock import Busy, Superseded
from fastship.receiver.uploads.partial import Partial, Unsynced
from fastship.receiver.uploads.upload import Upload
from fastship.receiver.uploads.uploads import UnknownUpload

_log = logging.getLogger("fastship.receiver")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Ending:
    """Of the uploads and one-shot bodies of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uploads = store.uploads

    def publish(self, partial: Partial, declared: Declared) -> tuple[Answer, bool]:
        """The verdict on a whole artifact, and whether the partial is still good for another try."""
        started = time.monotonic()
        try:
            published = self._store.publish(partial, declared)
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                raise
            return refused
        if isinstance(published, Answer):
            return published, False
        _, receipt = published
        took_ms = (time.monotonic() - started) * 1000
        _log.info("stored %s: %d bytes, verified and synced in %.0f ms", receipt.episode, partial.offset, took_ms)
        return answers.stored(201, receipt), False

    def store(self, partial: Partial, declared: Declared) -> Answer:
        """The verdict on a whole one-shot body. Raises `Superseded` when a newer request has taken it over."""
        with partial.exclusive():
            answer, _ = self.publish(partial, declared)
        if declared.sha256 and answer.status < 300:
            with contextlib.suppress(UnknownUpload, Busy):
                self._uploads.cancel(self._uploads.token(declared), declared.owner)
        return answer

    def finish(self, upload: Upload) -> Answer:
        offset, length = upload.partial.offset, upload.declared.length
        if length is not None and offset != length:
            text = f"the upload has {offset} of {length} bytes and cannot be complete"
            return answers.length_mismatch(text, upload.tell())
        with upload.exclusive():
            answer, good = self.publish(upload.partial, upload.declared)
            if not good:
                # An error of the disk leaves no tombstone: the client makes the upload again, from 0.
                self._uploads.end(upload, answer if answer.status < 500 else None)
        return answer

    def known(self, upload: Upload) -> Answer | None:
        """The verdict when the episode was stored by another upload meanwhile."""
        known = self._compare(upload.declared)
        if known is not None:
            with contextlib.suppress(Superseded), upload.exclusive():  # it is true whoever has the upload now
                self._uploads.end(upload, known)
        return known

    def superseded(self, declared: Declared) -> Answer:
        """To a request that another one took over from: what is known of the episode by now, or to come again."""
        return self._compare(declared) or answers.SUPERSEDED

    def _compare(self, declared: Declared) -> Answer | None:
        stored = self._store.receipt(declared.episode)
        return decisions.compare(declared.sha256, declared.content_blake3, stored) if stored is not None else None

    def keep_cut(self, declared: Declared, data: bytes) -> None:
        """As `keep`, of a body that is in memory. No newer request could take it over there: so it may begin an upload,
        but is nothing where there is one."""
        partial = self._uploads.one_shot(declared)
        try:
            with contextlib.suppress(OSError):
                partial.write([data])
                self._keep(declared, partial, begin_only=True)
        finally:
            partial.drop()

    def keep(self, declared: Declared, partial: Partial) -> None:
        with contextlib.suppress(OSError):
            self._keep(declared, partial, begin_only=False)

    def _keep(self, declared: Declared, partial: Partial, *, begin_only: bool) -> None:
        if self._store.receipt(declared.episode) is None:  # else it would only promise room
            self._uploads.keep(declared, partial, begin_only=begin_only)

    def forget(self, upload: Upload) -> None:
        """Of one that nobody was told of, and whose name is random, nobody will ever ask."""
        with contextlib.suppress(Superseded), upload.exclusive():
            self._uploads.end(upload, None)

    def leave(self, upload: Upload) -> None:
        self._uploads.remember(upload)
        upload.close()

    def ended(self, token: str, owner: str) -> Answer | None:
        try:
            look = self._uploads.ended(token, owner)
        except UnknownUpload:
            return answers.UNKNOWN_UPLOAD
        if look is None or look.ended is None:
            return None
        return look.ended if self.holds(look.ended) else answers.UNKNOWN_UPLOAD

    def holds(self, ended: Answer) -> bool:
        """Whether an upload's final answer is still true. A 200 or 201 is not when what it was about has rotted, or was
        taken out of the store by hand, whatever has been stored under that id since."""
        if ended.status >= 300 or ended.body is None:
            return True
        told = msgspec.convert(ended.body, Receipt)
        stored = self._store.receipt(told.episode)
        return stored is not None and stored.artifact == told.artifact


def refusal(error: Exception) -> tuple[Answer, bool] | None:
    """The verdict on a whole artifact that could not be published, and whether its partial is still good for another
    try. None for what nobody foresaw."""
    if isinstance(error, DigestMismatch):
        return answers.digest_mismatch(str(error)), False
    if isinstance(error, ContentMismatch):
        return answers.error(422, "content-mismatch", str(error), answers.ABOUT_EPISODE), False
    if isinstance(error, Bomb):
        text = f"{error.message}: see receiver.max_ratio if that is as it should be"
        return answers.error(422, "artifact-invalid", text, answers.ABOUT_EPISODE), False
    if isinstance(error, ArtifactError):
        text = f"this is not an artifact (.tar.zst): {error.message}"
        return answers.error(422, "artifact-invalid", text, answers.ABOUT_EPISODE), False
    if isinstance(error, Full):
        return decisions.full(error.stored_bytes, error.most_bytes), True
    if isinstance(error, InterruptedError):
        return answers.STOPPING, True
    if isinstance(error, OSError):
        again = error.errno in _NO_SPACE and not isinstance(error, Unsynced)
        return storage_failed(error, answers.ABOUT_EPISODE), again
    return None


def storage_failed(error: OSError, *more: tuple[str, str]) -> Answer:
    """507 or 500, with the fields ``more``."""
    _log.error("storing failed: %s", error)
    if error.errno in _NO_SPACE:
        return decisions.NO_ROOM.with_fields(*more)
    text = f"the receiver's disk failed: {os.strerror(error.errno or errno.EIO)}"
    return answers.error(500, "storage", text, *more)
