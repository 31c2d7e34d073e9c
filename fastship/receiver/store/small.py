"""Small artifacts, stored by few threads, many at a time: what they cost is not only their bytes.

Twenty threads that each make a few short system calls spend most of their time handing Python's lock to each other, and
one commit of the disk serves as many files as wait for it. So what came while others were being stored is stored
together: each is decided on, written and verified, all are synced, all are named, the directory is synced once, and
then all are answered.

What always holds: for each artifact the steps and their order are those of `Store.publish`; what befalls one is no
other's. Blocks nobody but its own threads. Imported by ``app``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from fastship import durable
from fastship.receiver.policy import answers
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Body, Declared
from fastship.receiver.store.ending import refusal, storage_failed
from fastship.receiver.store.store import Prepared, Store
from fastship.receiver.uploads.lock import Busy
from fastship.receiver.uploads.uploads import WAIT_S, UnknownUpload

_log = logging.getLogger("fastship.receiver")

SMALL_BYTES = 512 << 10  # of an artifact
SMALL_CONTENT_BYTES = 4 << 20  # declared, and no more is unpacked: some 5 ms
THREADS = 2  # one unpacks while the other waits for the disk; CPU an artifact is the same with 1
_TOGETHER = 64  # the first of them waits for the last


class Small(NamedTuple):
    """A whole one-shot body and what was said of it."""

    declared: Declared
    commit: str | None
    body: Body
    data: bytes


class _Storing:
    """One of them on its way; it goes on until it has an answer."""

    answer: Answer | None = None
    prepared: Prepared | None = None

    def __init__(self, small: Small) -> None:
        self.small = small
        self.answered: Future[Answer] = Future()


class SmallStore:
    """The threads. ``decide`` gives the verdict that needs no body."""

    def __init__(
        self, store: Store, decide: Callable[[Declared, str | None], Answer | None], *, threads: int = THREADS
    ) -> None:
        self._store = store
        self._decide = decide
        self._waiting: deque[_Storing] = deque()
        self._threads = ThreadPoolExecutor(threads, "receiver-small")
        self._forgetting = ThreadPoolExecutor(1, "receiver-forget")  # no thread before it has something to do

    def submit(self, small: Small) -> Future[Answer]:
        """The answer, when it may be given. Does not block."""
        storing = _Storing(small)
        self._waiting.append(storing)
        self._threads.submit(self._run)  # finds nothing where an earlier turn took it along
        return storing.answered

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        self._forgetting.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        together: list[_Storing] = []
        with contextlib.suppress(IndexError):  # the other thread takes from it, too
            while len(together) < _TOGETHER:
                together.append(self._waiting.popleft())
        for step in (self._prepare, self._begin_sync, self._sync, self._name):
            for storing in together:
                if storing.answer is None:
                    self._attempt(step, storing)
        named = [storing for storing in together if storing.answer is None]
        if named:
            try:
                self._store.sync_names()
            except OSError as error:
                # Nor may those be told 200 that found one of these names there.
                for storing in together:
                    if storing.answer is None or storing.answer.status < 300:
                        storing.answer = storage_failed(error, answers.ABOUT_EPISODE)
                for storing in named:
                    assert storing.prepared is not None
                    durable.unlink_if_present(storing.prepared.partial.path)
            else:  # a receipt in its place says that the name beside it is durable
                for storing in named:
                    self._attempt(self._settle, storing)
        for storing in together:
            if storing.prepared is not None:
                storing.prepared.close()
            assert storing.answer is not None
            storing.answered.set_result(storing.answer)

    @staticmethod
    def _attempt(step: Callable[[_Storing], Answer | None], storing: _Storing) -> None:
        try:
            storing.answer = step(storing) or storing.answer
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                _log.exception("storing %s failed", storing.small.declared.episode)
            storing.answer = refused[0] if refused is not None else answers.INTERNAL

    def _prepare(self, storing: _Storing) -> Answer | None:
        declared, commit, body, data = storing.small
        verdict = self._decide(declared, commit)
        if verdict is not None:
            return verdict
        if body.sha256 is not None and hashlib.sha256(data).hexdigest() != body.sha256:
            return answers.digest_mismatch("the body is not what Content-Digest says")
        partial = self._store.uploads.one_shot()
        try:
            partial.write([data])
            prepared = self._store.prepare(partial, declared)
        except BaseException:
            partial.drop()
            raise
        if isinstance(prepared, Answer):
            partial.drop()
            return prepared
        storing.prepared = prepared
        return None

    def _begin_sync(self, storing: _Storing) -> None:
        assert storing.prepared is not None
        self._store.begin_sync(storing.prepared)

    def _sync(self, storing: _Storing) -> None:
        assert storing.prepared is not None
        self._store.sync(storing.prepared)

    def _name(self, storing: _Storing) -> Answer | None:
        assert storing.prepared is not None
        return self._store.name(storing.prepared)

    def _settle(self, storing: _Storing) -> Answer:
        assert storing.prepared is not None
        self._store.settle(storing.prepared)
        declared = storing.small.declared
        if declared.sha256 is not None:
            try:
                self._forget(declared, wait_s=0)
            except Busy:  # whoever asks where it stands is no reason to let all others wait
                with contextlib.suppress(RuntimeError):  # closed, or no thread to be had: it is swept
                    self._forgetting.submit(self._forget_later, declared)
        return storing.answer or answers.stored(201, storing.prepared.receipt)

    def _forget(self, declared: Declared, *, wait_s: float = WAIT_S) -> None:
        """What had come of it as an upload is of no use now. Raises `Busy`."""
        with contextlib.suppress(UnknownUpload):
            self._store.uploads.cancel(self._store.uploads.token(declared), declared.owner, wait_s=wait_s)

    def _forget_later(self, declared: Declared) -> None:
        try:
            self._forget(declared)
        except (Busy, OSError) as error:
            _log.warning("an upload of %s is left to the sweep: %s", declared.episode, error or "it is in use")
