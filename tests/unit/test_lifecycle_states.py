"""The table of states: every row, and `infer` for every combination of facts."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from fastship.lifecycle import CLAIMED, TRANSITIONS, Book, Facts, Policy, State, infer
from fastship.lifecycle.book import Entry

POLICY = Policy(cores=2, in_flight=2, poison_after=3, pause_min_s=1.0, pause_max_s=8.0, pause_after=3)

# Written out again, by hand, from the drawing in the design: who changes the table changes its test.
LEGAL = {
    ("recording", "ready"), ("recording", "gone"),
    ("ready", "queued"), ("ready", "held"), ("ready", "condemned"), ("ready", "recording"), ("ready", "gone"),
    ("waiting", "queued"), ("waiting", "ready"), ("waiting", "recording"), ("waiting", "gone"),
    ("queued", "packing"), ("queued", "shipping"), ("queued", "ready"), ("queued", "waiting"),
    ("packing", "shipping"), ("packing", "ready"), ("packing", "waiting"), ("packing", "held"),
    ("packing", "condemned"),
    ("shipping", "retired"), ("shipping", "held"), ("shipping", "condemned"), ("shipping", "ready"),
    ("shipping", "waiting"),
    ("held", "ready"), ("held", "waiting"), ("held", "condemned"), ("held", "recording"), ("held", "gone"),
}  # fmt: skip


def book_with(state: State) -> tuple[Book, Entry]:
    """A book with one entry, brought to ``state`` as `Book.move` would have."""
    book = Book(POLICY)
    entry = Entry(episode="ep", key="ep", state=state)
    book.entries["ep"] = entry
    if state is State.READY:
        book.ready.append(("ep", "ep"))
    elif state is State.WAITING:
        book.waiting.add("ep")
    elif state in CLAIMED:
        book.workers[1] = {"ep"}
        entry.worker = 1
    return book, entry


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_every_pair_of_states(before: State, after: State) -> None:
    book, entry = book_with(before)
    if (before, after) not in LEGAL:
        with pytest.raises((AssertionError, KeyError)):
            book.move(entry, after)
        assert entry.state is before
        assert list(book.entries) == ["ep"]
        return
    book.move(entry, after)
    assert entry.state is after
    assert (book.ready == [("ep", "ep")]) == (after is State.READY)
    assert (book.waiting == {"ep"}) == (after is State.WAITING)
    assert ("ep" in book.entries) == (after in TRANSITIONS)  # what leaves the table leaves the book
    if before in CLAIMED and after not in CLAIMED:
        assert entry.worker is None
        assert book.workers == {1: set()}


def test_no_way_leads_out_of_the_last_states() -> None:
    for state in (State.RETIRED, State.CONDEMNED, State.QUARANTINED, State.STALE, State.GONE):
        assert state not in TRANSITIONS


def test_only_what_ships_is_retired() -> None:
    assert [state for state, after in TRANSITIONS.items() if State.RETIRED in after] == [State.SHIPPING]


FIELDS = [field.name for field in msgspec.structs.fields(Facts)]
ALL_FACTS = [
    Facts(**dict(zip(FIELDS, bits, strict=True))) for bits in itertools.product((False, True), repeat=len(FIELDS))
]


@pytest.mark.parametrize("facts", ALL_FACTS, ids=lambda facts: "".join("01"[getattr(facts, name)] for name in FIELDS))
def test_infer_has_an_answer_for_every_combination(facts: Facts) -> None:
    state = infer(facts)
    # Stated the other way round than `infer` goes: what each answer says of the disk, and nothing else gives it.
    assert state not in CLAIMED
    assert state is not State.WAITING
    here = facts.directory and not facts.condemned
    gone = not facts.directory and not facts.condemned
    litter = facts.artifact or facts.leftovers or facts.hold
    assert (state is State.CONDEMNED) == facts.condemned
    assert (state is State.RECORDING) == (here and not facts.marker)
    assert (state is State.HELD) == (here and facts.marker and facts.hold)
    assert (state is State.PACKED) == (here and facts.marker and not facts.hold and facts.artifact)
    assert (state is State.READY) == (here and facts.marker and not facts.hold and not facts.artifact)
    assert (state is State.STALE) == (gone and litter)
    assert (state is State.RETIRED) == (gone and not litter and facts.retired)
    assert (state is State.QUARANTINED) == (gone and not litter and facts.quarantined and not facts.retired)
    assert (state is State.GONE) == (gone and not litter and not facts.quarantined and not facts.retired)


def test_there_are_256_combinations() -> None:
    assert len(ALL_FACTS) == 256
