"""Every rule about what becomes of an episode: pure, no I/O, no clock.

Two functions carry it. `infer(facts)` recognises an episode's state from what is on disk: it is all that a
restarted supervisor has. `decide(book, event, now)` is told what happened and answers with commands; it alone
changes the `Book`. Every change of state is one of `TRANSITIONS`, the one table of what is legal.

``states`` -> ``events`` -> ``book``, ``giveway``, ``pressure`` -> ``sharing`` -> ``rules``: each imports only those
before it.
"""

from fastship.lifecycle.book import Book, Policy
from fastship.lifecycle.giveway import GiveWay, Limits, Reading
from fastship.lifecycle.pressure import DiskLimits, DiskReading, Level, Pressure, low_bytes, reserve_bytes
from fastship.lifecycle.rules import decide, next_wake
from fastship.lifecycle.sharing import share_cores
from fastship.lifecycle.states import CLAIMED, TRANSITIONS, Facts, State, infer

__all__ = [
    "CLAIMED",
    "TRANSITIONS",
    "Book",
    "DiskLimits",
    "DiskReading",
    "Facts",
    "GiveWay",
    "Level",
    "Limits",
    "Policy",
    "Pressure",
    "Reading",
    "State",
    "decide",
    "infer",
    "low_bytes",
    "next_wake",
    "reserve_bytes",
    "share_cores",
]
