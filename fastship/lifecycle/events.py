"""What can happen to an episode (events) and what can be asked for because of it (commands), as plain values.

Those events that a worker reports carry a tag: they travel to the supervisor as they are (``ipc``).

Imports ``episode``; the rest of ``lifecycle``, ``ipc``, the worker and the supervisor import it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from fastship.episode import Manifest, Outcome, Receipt, Verdict


class Found(msgspec.Struct, frozen=True):
    """A look through the spool: every episode with a marker, with its sort key; those not named are gone."""

    ready: Sequence[tuple[str, str]]  # (key, episode)
    held: Sequence[str] = ()
    impossible: Sequence[str] = ()  # directories with a marker whose names cannot be ids
    complete: bool = True  # False: some more, nothing is said of others (a marker noticed by inotify)
    packed: Collection[str] = ()  # ids that have an artifact in the outbox


class Measured(msgspec.Struct, frozen=True):
    """The answer to `Measure`: about how many frames the episode has (1 at least)."""

    episode: str
    frames: int


class WorkerJoined(msgspec.Struct, frozen=True):
    worker: int


class WorkerLeft(msgspec.Struct, frozen=True):
    """A worker ended. ``died``: not because it was told to; what it was at is suspect."""

    worker: int
    died: bool
    error: str = ""


class WorkerLeaving(msgspec.Struct, frozen=True):
    """A worker was told to drain: it finishes what it began and gets nothing new."""

    worker: int


class PackBegan(msgspec.Struct, frozen=True, tag=True):
    episode: str


class Packed(msgspec.Struct, frozen=True, tag=True):
    """The artifact is in the outbox and its upload begins."""

    episode: str
    manifest: Manifest
    reused: bool  # an earlier attempt had packed it


class PackFailed(msgspec.Struct, frozen=True, tag=True):
    episode: str
    code: str  # of the FastshipError
    error: str
    fingerprint: str = ""  # of the episode now, where it could be told


class Answered(msgspec.Struct, frozen=True, tag=True):
    """The verdict on an attempt. ``unchanged``: the episode still is what was packed (looked at after SHIPPED only)."""

    episode: str
    verdict: Verdict
    manifest: Manifest
    unchanged: bool = True
    unseen: str = ""  # why it could not be looked at, where that is all that is known

    @property
    def error(self) -> str:
        """Why the attempt came to nothing."""
        if self.verdict.outcome is not Outcome.SHIPPED:
            return self.verdict.error
        if self.unseen:
            return f"the receiver has it, but it could not be looked at here once more: {self.unseen}"
        # The receiver holds what was packed, not what is here now: packed again, that will be a conflict.
        return "the episode changed after it was packed; the receiver holds it as it was before"


class Returned(msgspec.Struct, frozen=True, tag=True):
    """A draining worker gives back what it did not begin."""

    episode: str


class Released(msgspec.Struct, frozen=True):
    """An operator's word, or a change on disk, ended a hold: ready again."""

    episode: str
    key: str


class Gone(msgspec.Struct, frozen=True):
    """An operator's word took a held or waiting episode out of ``episodes/``."""

    episode: str


class Budget(msgspec.Struct, frozen=True):
    """From now on packing may have so many cores, over all workers; 0: it is paused. ``why``: fewer than all."""

    cores: int
    why: str = ""


class Undone(msgspec.Struct, frozen=True):
    """The disk refused to retire, quarantine or hold an episode: it is in ``episodes/``, as before."""

    episode: str
    key: str
    error: str


class Room(msgspec.Struct, frozen=True):
    """What packing may take of the disk from now on.

    ``short``: what is packed is shipped first, and nothing new is packed, but for one artifact at a time that is
    lent some of what is left: without that, a disk full of unshipped episodes would never be emptied.
    """

    short: bool = False
    floor_bytes: int = 0  # free space that no pack may go below
    lent_floor_bytes: int = 0  # that the one may not go below


class Tick(msgspec.Struct, frozen=True):
    """Time went by."""


Event = (
    Found
    | Measured
    | WorkerJoined
    | WorkerLeaving
    | WorkerLeft
    | PackBegan
    | Packed
    | PackFailed
    | Answered
    | Returned
    | Released
    | Gone
    | Budget
    | Undone
    | Room
    | Tick
)


class Measure(msgspec.Struct, frozen=True):
    episode: str


class Assign(msgspec.Struct, frozen=True):
    worker: int
    episode: str
    first_attempt: bool
    frames: int = 1  # about; as far as it was measured
    floor_bytes: int = 0  # free space that packing it may not go below


class Share(msgspec.Struct, frozen=True):
    """A worker's share of the cores for packing; 0: it pauses before the next frame, and ships on."""

    worker: int
    threads: int


class Recall(msgspec.Struct, frozen=True):
    """The worker gives back (`Returned`) what it has not begun to pack, and what is packed and not begun to ship."""

    worker: int


class Retire(msgspec.Struct, frozen=True):
    episode: str
    receipt: Receipt
    manifest: Manifest


class Quarantine(msgspec.Struct, frozen=True):
    episode: str
    status_code: int | None
    error: str
    body: str


class Hold(msgspec.Struct, frozen=True):
    """Leave the episode and its artifact in place until an operator decides, or it changes (reason ``conflict``) or
    has stopped changing (``changing``)."""

    episode: str
    reason: str
    status: int | None
    error: str
    body: str
    fingerprint: str
    artifact_sha256: str = ""


class Discard(msgspec.Struct, frozen=True):
    """Remove the artifact: it is damaged."""

    episode: str


class Report(msgspec.Struct, frozen=True):
    """Something an operator should see in the log."""

    level: str  # "info", "warning", "error"
    event: str
    fields: dict[str, object]


Command = Measure | Assign | Share | Recall | Retire | Quarantine | Hold | Discard | Report
