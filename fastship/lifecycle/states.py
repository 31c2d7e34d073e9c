"""The states of an episode, how one is recognised on disk, and the one table of legal transitions.

Pure. Imports nothing of fastship; the rest of ``lifecycle`` imports it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec


class State(enum.StrEnum):
    """Where an episode stands. The first group can be read off the disk, the second is known in memory only."""

    RECORDING = "recording"  # a directory without a marker
    READY = "ready"  # with a marker; nothing useful in the outbox
    PACKED = "packed"  # with an artifact and its manifest: ready, and need not be packed again
    HELD = "held"  # waits for an operator, in place
    CONDEMNED = "condemned"  # its quarantine is decided and written down, the move is not done
    QUARANTINED = "quarantined"
    RETIRED = "retired"
    STALE = "stale"  # only leftovers in the outbox or among the holds
    GONE = "gone"

    QUEUED = "queued"  # given to a worker, not begun
    PACKING = "packing"
    SHIPPING = "shipping"
    WAITING = "waiting"  # to be attempted again at a later time


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What can be seen on disk of one id."""

    directory: bool = False  # episodes/<id> is a directory
    marker: bool = False
    artifact: bool = False  # outbox/<id>.tar.zst, of the size its manifest says
    leftovers: bool = False  # anything else of this id in the outbox, or a hold
    hold: bool = False
    condemned: bool = False  # a quarantine reason was made durable
    quarantined: bool = False
    retired: bool = False


def infer(facts: Facts) -> State:
    """The state that a restarted supervisor takes an episode to be in. Total: every combination has an answer."""
    if facts.condemned:
        return State.CONDEMNED
    if not facts.directory:
        if facts.artifact or facts.leftovers or facts.hold:
            return State.STALE
        if facts.retired:
            return State.RETIRED
        return State.QUARANTINED if facts.quarantined else State.GONE
    if not facts.marker:
        return State.RECORDING
    if facts.hold:
        return State.HELD
    return State.PACKED if facts.artifact else State.READY


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.RECORDING: frozenset({State.READY, State.GONE}),
    State.READY: frozenset({State.QUEUED, State.HELD, State.CONDEMNED, State.RECORDING, State.GONE}),
    State.WAITING: frozenset({State.QUEUED, State.READY, State.RECORDING, State.GONE}),
    State.QUEUED: frozenset({State.PACKING, State.SHIPPING, State.READY, State.WAITING}),
    State.PACKING: frozenset({State.SHIPPING, State.READY, State.WAITING, State.HELD, State.CONDEMNED}),
    State.SHIPPING: frozenset({State.RETIRED, State.HELD, State.CONDEMNED, State.READY, State.WAITING}),
    State.HELD: frozenset({State.READY, State.WAITING, State.CONDEMNED, State.RECORDING, State.GONE}),
}
"""Legal next states. What is not here (RETIRED, CONDEMNED, QUARANTINED...) leaves the book."""

CLAIMED = frozenset({State.QUEUED, State.PACKING, State.SHIPPING})
"""With a worker."""
