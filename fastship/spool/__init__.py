"""The spool: the watched tree of a lab host and every durable step in it.

``layout`` (directories, lock) -> ``outbox`` (artifacts) -> ``headroom`` (what one may take of the disk), ``reason``,
``removal``, ``journal`` (receipts, read) -> ``shelf`` (copies), ``store`` (the moves) -> ``requests`` (an operator's
words) -> ``watch``: each imports only those before it. The supervisor alone moves episodes, under the lock; workers use
`Outbox` and `Headroom` alone. ``watch`` is imported by itself: a pass needs no inotify, and workers do not.
"""

from fastship.spool.headroom import Headroom, Ratio
from fastship.spool.journal import Journal
from fastship.spool.layout import Lock, remedy_for
from fastship.spool.outbox import Outbox, is_intact
from fastship.spool.reason import QuarantineReason
from fastship.spool.shelf import Copy, Shelf
from fastship.spool.store import HoldRecord, Look, Quarantined, Spool

__all__ = [
    "Copy",
    "Headroom",
    "HoldRecord",
    "Journal",
    "Lock",
    "Look",
    "Outbox",
    "QuarantineReason",
    "Quarantined",
    "Ratio",
    "Shelf",
    "Spool",
    "is_intact",
    "remedy_for",
]
