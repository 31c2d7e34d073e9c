"""One upload that a request has taken over, and may write until a newer request takes it.

What always holds: nothing is written of it or said about it but under its lock and by the generation in force.
Blocks on the disk. Imported by ``uploads``, which makes these, and, as a type, by who is given one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastship.receiver.policy.decisions import Declared
from fastship.receiver.uploads.lock import Busy, Gone, Superseded, UploadLock
from fastship.receiver.uploads.partial import Partial, Unsynced

_WRITER_WAIT_S = 60.0  # a HEAD's fdatasync on a slow disk must not end an append


class Upload:
    """An upload that this request has taken over. Close it."""

    ended = False

    def __init__(self, token: str, declared: Declared, lock: UploadLock, generation: int, partial: Partial) -> None:
        self.token = token
        self.declared = declared
        self.partial = partial
        self._lock = lock
        self._generation = generation

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the upload against everybody. Raises `Superseded` when it is another request's by now."""
        with own(self._lock, self._generation):
            yield

    def tell(self) -> int:
        """Make all bytes and the counter durable and return the offset, which may then be told. Raises `Unsynced`."""
        offset = self.partial.sync()
        with self.exclusive():
            state = self._lock.read()
            try:
                self._lock.write(state._replace(synced=max(state.synced, offset)), durably=True)
            except Unsynced:
                self.partial.unsynced()
                raise
        return offset

    def hold(self, offset: int) -> None:
        """Let bytes above ``offset`` not count until `release`; -1 releases."""
        with self.exclusive():
            self._lock.write(self._lock.read()._replace(held=offset))

    def close(self) -> None:
        self.partial.close()
        self._lock.close()


@contextlib.contextmanager
def own(lock: UploadLock, generation: int) -> Iterator[None]:
    """Hold the lock while ``generation`` is still the writer's. Raises `Superseded`."""
    try:
        with lock.locked(_WRITER_WAIT_S, generation=generation):
            yield
    except (Gone, Busy):  # whoever ended the upload had taken it over
        raise Superseded from None


def note(lock: UploadLock, generation: int, offset: int) -> None:
    """Write down that ``offset`` bytes are on the disk, not durably: nobody is told of it yet."""
    with own(lock, generation):
        state = lock.read()
        if state.held < 0 or offset <= state.held:
            lock.write(state._replace(synced=max(state.synced, offset)))
