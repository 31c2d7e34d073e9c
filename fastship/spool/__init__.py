"""The spool: the watched tree of a lab host and every durable step in it.

``layout`` (directories, lock) -> ``outbox`` (artifacts) -> ``watch`` -> ``store`` (the moves) -> ``requests`` (an
operator's words): each imports only those before it. The supervisor alone moves episodes, under the lock; workers use
`Outbox` alone.
"""

from fastship.spool.layout import Lock
from fastship.spool.outbox import Outbox, is_intact
from fastship.spool.store import HoldRecord, Look, Quarantined, QuarantineReason, Spool
from fastship.spool.watch import MarkerWatch

__all__ = [
    "HoldRecord",
    "Lock",
    "Look",
    "MarkerWatch",
    "Outbox",
    "QuarantineReason",
    "Quarantined",
    "Spool",
    "is_intact",
]
