"""What is counted, once each, whichever way an attempt ends."""

from __future__ import annotations

from sample import manifest_of, shipped, verdict

from fastship.episode import Outcome, Scope
from fastship.lifecycle import Book, Policy, State, decide
from fastship.lifecycle.events import Answered, Found
from fastship.supervisor.tally import RECENT, Tally

POLICY = Policy(cores=2, in_flight=4, poison_after=3, pause_min_s=1.0, pause_max_s=8.0, pause_after=3, once=True)


def book_with(*episodes: str) -> Book:
    book = Book(POLICY)
    decide(book, Found([(episode, episode) for episode in episodes]), 0.0)
    return book


def test_shipped_counts_when_it_is_retired_and_shows_when_it_is_answered() -> None:
    book, tally = book_with("a"), Tally("http://x", once=False)
    manifest = manifest_of("a")
    tally.answered(book, Answered("a", shipped(manifest), manifest))
    assert tally.totals(book).shipped == 0
    tally.retired(manifest)
    totals = tally.totals(book)
    assert (totals.shipped, totals.bytes_in, totals.bytes_out) == (1, manifest.content_bytes, manifest.artifact_bytes)
    [result] = tally.snapshot(book, [], recording=0, draining=False).recent
    assert (result.episode, result.outcome) == ("a", "shipped")


def test_one_that_changed_meanwhile_is_not_shown_as_shipped() -> None:
    book, tally = book_with("a"), Tally("http://x", once=False)
    manifest = manifest_of("a")
    tally.answered(book, Answered("a", shipped(manifest), manifest, unchanged=False))
    tally.answered(book, Answered("a", shipped(manifest), manifest, unchanged=False, unseen="a disk that fails"))
    changed, unseen = tally.snapshot(book, [], recording=0, draining=False).recent
    assert changed.outcome == unseen.outcome == "transient"
    assert "changed" in changed.error
    assert "a disk that fails" in unseen.error


def test_holds_and_quarantines_are_counted_when_they_are_made() -> None:
    book, tally = book_with("a", "b"), Tally("http://x", once=False)
    manifest = manifest_of("a")
    for outcome in (Outcome.CONFLICT, Outcome.REJECTED):
        tally.answered(book, Answered("a", verdict(outcome, Scope.EPISODE, status=409), manifest))
    assert not tally.snapshot(book, [], recording=0, draining=False).recent
    tally.held(book, "a", "taken")
    tally.quarantined(book, "b", "refused")
    totals = tally.totals(book)
    assert (totals.conflicts, totals.fatal) == (1, 1)


def test_those_that_keep_failing_are_shown_for_as_long_as_they_wait() -> None:
    book, tally = book_with("a", "b"), Tally("http://x", once=False)
    for times, episode in enumerate(("a", "b"), 1):
        entry = book.entries[episode]
        entry.attempts, entry.error = times, "cannot be read"
        book.move(entry, State.QUEUED)
        book.move(entry, State.PACKING)
        book.move(entry, State.WAITING)
    first, second = tally.snapshot(book, [], recording=0, draining=False).waiting
    assert (first.episode, first.attempts, first.error) == ("b", 2, "cannot be read")
    assert (second.episode, second.attempts) == ("a", 1)


def test_in_a_single_pass_the_untried_failed() -> None:
    book, tally = book_with("a", "b", "c"), Tally("http://x", once=True)
    book.breaker.paused = True
    assert tally.totals(book).transient_failures == 3


def test_only_the_last_results_are_kept_and_odd_names_can_be_shown() -> None:
    book, tally = book_with(), Tally("http://x", once=False)
    for number in range(RECENT + 5):
        tally.pack_failed(book, f"ep{number}\udcff", "why")
    recent = tally.snapshot(book, [], recording=0, draining=False).recent
    assert len(recent) == RECENT
    assert recent[-1].episode == f"ep{RECENT + 4}\\udcff"
