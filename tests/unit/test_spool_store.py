"""The spool's moves, uninterrupted (tests/crash/test_spool_moves.py interrupts them)."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from sample import (
    MTIME_NS,
    files_below,
    hold_record,
    journal_lines,
    make_episode,
    manifest_of,
    put_artifact,
    receipt_of,
)

from fastship import durable
from fastship.episode import MARKER
from fastship.errors import UsageError
from fastship.lifecycle import State, infer
from fastship.spool import Spool, reason
from fastship.spool import store as spool_store
from fastship.spool.reason import REASON_FILE


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool")
    made.create()
    return made


def condemn(spool: Spool, name: str, *, error: str = "no") -> Path:
    return spool.quarantine(name, status_code=422, error=error, body='{"why": "x"}')


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "the disk is faulty")

    return fail


# --- looking -----------------------------------------------------------------------------------------------------


def test_a_look_tells_ready_held_impossible_and_recording_apart(spool: Spool) -> None:
    for name in ("b", "a", "c.1", "held", "bad name"):
        make_episode(spool.paths.episodes, name)
    make_episode(spool.paths.episodes, "unfinished", marker=False)
    spool.hold(hold_record("held"))
    look = spool.look()
    assert look.ready == [("a", "a"), ("b", "b"), ("c.1", "c.1")]
    assert look.held == ["held"]
    assert look.impossible == ["bad name"]
    assert look.recording == ["unfinished"]


def test_only_real_directories_are_episodes(spool: Spool, tmp_path: Path) -> None:
    outside = make_episode(tmp_path, "outside")
    (spool.paths.episodes / "link").symlink_to(outside)
    (spool.paths.episodes / "dangling").symlink_to(tmp_path / "nothing")
    (spool.paths.episodes / "file").write_bytes(b"x")
    os.mkfifo(spool.paths.episodes / "fifo")
    look = spool.look()
    assert (look.ready, look.held, look.impossible, look.recording) == ([], [], [], [])
    assert look.links == ["link"]
    assert spool.facts("link").directory is False


def test_what_cannot_be_looked_at_is_not_there_and_raises_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_episode(spool.paths.episodes, "ep")

    def unreadable(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", unreadable)
        facts = spool.facts("ep")
    assert infer(facts) is not State.READY
    assert infer(spool.facts("ep")) is State.READY


def test_a_dangling_marker_is_none(spool: Spool) -> None:
    path = make_episode(spool.paths.episodes, "ep", marker=False)
    (path / MARKER).symlink_to("nothing")
    assert spool.look().recording == ["ep"]
    assert infer(spool.facts("ep")) is State.RECORDING


ODD_NAMES = [
    "new\nline",
    os.fsdecode(b"undecodable-\xff\xfe"),
    "x" * 255,
    "é" * 127,  # 254 bytes of UTF-8: cutting it by bytes may cut a character
    ".hidden",
    ".tmp-looks-like-ours",
    ".condemned-looks-like-ours",
    ".removing-looks-like-ours",
    "-dash",
    "tilde~1",
    "%2e%2e",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_a_name_that_cannot_be_an_id_is_quarantined_whole_and_for_good(spool: Spool, name: str) -> None:
    before = files_below(make_episode(spool.paths.episodes, name))
    assert spool.look().impossible == [name]
    target = condemn(spool, name)
    assert spool.look().impossible == []
    for _ in range(2):  # what a start does leaves it alone
        again = Spool(spool.paths.root)
        again.remove_temporaries()
        again.finish_quarantines()
        assert again.sweep() == []
        assert again.clean_quarantine(1.0) == []
        after = files_below(target)
        assert after.pop(REASON_FILE)
        assert after == before
    (entry,) = spool.quarantined()
    assert entry.name == target.name
    assert entry.reason is not None
    assert entry.reason.status_code == 422
    # ... and it can be got back under a good name, or removed, like any other.
    assert spool.retry(entry.name, new_id="good") == "good"
    assert files_below(spool.paths.episodes / "good") == before
    second = make_episode(spool.paths.episodes, name)
    condemn(spool, second.name)
    os.utime(spool.paths.quarantine / target.name, (1, 1))
    assert spool.clean_quarantine(1.0) == [target.name]
    assert os.listdir(spool.paths.quarantine) == []


def test_names_that_are_cut_alike_do_not_meet(spool: Spool) -> None:
    names = ["x" * 250 + "1", "x" * 250 + "2"]
    for name in names:
        make_episode(spool.paths.episodes, name)
    targets = [condemn(spool, name) for name in names]
    assert targets[0] != targets[1]
    assert [(path / "data.bin").read_bytes() for path in targets] == [os.fsencode(name) * 50 for name in names]


@pytest.mark.parametrize(("order", "expected"), [("name", "abc"), ("oldest", "cab"), ("newest", "bac")])
def test_order(spool: Spool, order: str, expected: str) -> None:
    for name, age_s in (("a", 20), ("b", 10), ("c", 30)):
        path = make_episode(spool.paths.episodes, name)
        os.utime(path / MARKER, (1_700_000_000 - age_s,) * 2)
    look = Spool(spool.paths.root, order=order).look()
    assert "".join(episode for _, episode in look.ready) == expected


def test_a_look_through_ten_thousand(spool: Spool) -> None:
    for number in range(10_000):
        path = spool.paths.episodes / f"ep-{number:05d}"
        path.mkdir()
        if number % 2:
            (path / MARKER).touch()
    look = spool.look()
    assert [episode for _, episode in look.ready] == [f"ep-{number:05d}" for number in range(1, 10_000, 2)]
    assert len(look.recording) == 5_000
    shutil.rmtree(spool.paths.episodes)


def test_facts_lead_to_the_state(spool: Spool) -> None:
    assert infer(spool.facts("ep")) is State.GONE
    path = make_episode(spool.paths.episodes, "ep", marker=False)
    assert infer(spool.facts("ep")) is State.RECORDING
    (path / MARKER).touch()
    assert infer(spool.facts("ep")) is State.READY
    manifest = put_artifact(spool, "ep")
    assert infer(spool.facts("ep")) is State.PACKED
    spool.hold(hold_record("ep"))
    assert infer(spool.facts("ep")) is State.HELD
    assert spool.release("ep") is True
    assert spool.release("ep") is False
    spool.retire([("ep", receipt_of(manifest), manifest)])
    assert infer(spool.facts("ep")) is State.RETIRED
    put_artifact(spool, "ep")
    assert infer(spool.facts("ep")) is State.STALE
    assert spool.sweep() == ["ep"]
    make_episode(spool.paths.episodes, "other")
    condemn(spool, "other")
    assert infer(spool.facts("other")) is State.QUARANTINED


# --- retiring ----------------------------------------------------------------------------------------------------


def test_retiring_moves_the_episode_and_removes_the_artifact(spool: Spool) -> None:
    before = {name: files_below(make_episode(spool.paths.episodes, name)) for name in ("a", "b")}
    manifests = [put_artifact(spool, name) for name in before]
    assert spool.retire([(one.episode, receipt_of(one), one) for one in manifests]) == {}
    assert {name: files_below(spool.paths.shipped / name) for name in before} == before
    assert os.listdir(spool.paths.episodes) == os.listdir(spool.paths.outbox) == []
    journal = list(journal_lines(spool))
    assert [msgspec.convert(line["receipt"], type=dict[str, object])["episode"] for line in journal] == ["a", "b"]
    assert {line["fingerprint"] for line in journal} == {"f00d"}


def test_nothing_to_retire_writes_nothing(spool: Spool) -> None:
    assert spool.retire([]) == {}
    assert os.listdir(spool.paths.receipts) == []


def test_an_older_episode_of_the_same_id_stays(spool: Spool) -> None:
    manifest = manifest_of("ep")
    for content in (b"first", b"second", b"third"):
        make_episode(spool.paths.episodes, "ep", content=content)
        assert spool.retire([("ep", receipt_of(manifest), manifest)]) == {}
    found = {path.name: (path / "data.bin").read_bytes() for path in spool.paths.shipped.iterdir()}
    assert found == {"ep": b"first", "ep~1": b"second", "ep~2": b"third"}


def test_a_file_in_the_way_in_shipped_is_not_touched(spool: Spool) -> None:
    (spool.paths.shipped / "ep").write_bytes(b"somebody's")
    (spool.paths.shipped / "ep~1").symlink_to("nothing")
    manifest = manifest_of("ep")
    make_episode(spool.paths.episodes, "ep")
    assert spool.retire([("ep", receipt_of(manifest), manifest)]) == {}
    assert (spool.paths.shipped / "ep").read_bytes() == b"somebody's"
    assert (spool.paths.shipped / "ep~2" / MARKER).exists()


@pytest.mark.parametrize("stays_full", [False, True])
def test_on_a_full_disk_artifacts_make_room_for_their_receipts(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, stays_full: bool
) -> None:
    make_episode(spool.paths.episodes, "ep")
    manifest = put_artifact(spool, "ep")
    append = durable.append_lines

    def full(path: Path, lines: list[bytes]) -> None:
        if stays_full or spool.outbox.artifact("ep").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, lines)

    monkeypatch.setattr(durable, "append_lines", full)
    if stays_full:
        with pytest.raises(OSError, match="No space"):
            spool.retire([("ep", receipt_of(manifest), manifest)])
        assert os.listdir(spool.paths.episodes) == ["ep"]
        assert os.listdir(spool.paths.shipped) == []
        assert spool.outbox.find_given_up("ep") == manifest
    else:
        assert spool.retire([("ep", receipt_of(manifest), manifest)]) == {}
        assert os.listdir(spool.paths.shipped) == ["ep"]
        assert os.listdir(spool.paths.outbox) == []
        assert len(list(journal_lines(spool))) == 1


def test_what_cannot_be_moved_is_told_and_does_not_keep_the_others(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "here")
    manifests = [put_artifact(spool, name) for name in ("vanished", "here")]
    failed = spool.retire([(one.episode, receipt_of(one), one) for one in manifests])
    assert list(failed) == ["vanished"]
    assert isinstance(failed["vanished"], FileNotFoundError)
    assert os.listdir(spool.paths.shipped) == ["here"]
    assert spool.outbox.episodes() == {"vanished"}  # kept: the sweep knows better
    assert spool.sweep() == ["vanished"]


def test_a_torn_journal_line_spoils_only_itself(spool: Spool) -> None:
    manifest = manifest_of("ep")
    journal = spool.paths.receipts / "2020-01-01.jsonl"
    journal.write_bytes(b'{"retired_at":"1"}\n{"retired_at":"2')
    make_episode(spool.paths.episodes, "ep")
    spool.retire([("ep", receipt_of(manifest), manifest)])
    assert next(line["retired_at"] for line in journal_lines(spool)) == "1"
    assert len(list(journal_lines(spool))) == 2
    (today,) = [path for path in spool.paths.receipts.iterdir() if path != journal]
    with open(today, "ab") as file:
        file.write(b'{"retired_at":')
    make_episode(spool.paths.episodes, "ep")
    spool.retire([("ep", receipt_of(manifest), manifest)])
    assert len(list(journal_lines(spool))) == 3


def test_a_retired_episode_goes_back_as_it_was(spool: Spool) -> None:
    manifest = manifest_of("ep")
    for content in (b"first", b"second"):
        make_episode(spool.paths.episodes, "ep", content=content)
        spool.retire([("ep", receipt_of(manifest), manifest)])
    assert spool.shelf.names_of("ep") == ["ep~1", "ep"]
    assert spool.shelf.names_of("../shipped/ep") == spool.shelf.names_of("nobody") == []
    before = files_below(spool.paths.shipped / "ep~1")
    assert spool.shelf.reship("ep~1") == "ep"
    assert files_below(spool.paths.episodes / "ep") == before
    assert spool.shelf.names_of("ep") == ["ep"]
    assert [episode for _, episode in spool.look().ready] == ["ep"]
    with pytest.raises(UsageError, match="is there already"):
        spool.shelf.reship("ep")
    for name in ("nobody", "../shipped/ep", "ep~1/..", ""):
        with pytest.raises(UsageError):
            spool.shelf.reship(name)


# --- quarantine --------------------------------------------------------------------------------------------------


def test_quarantine_keeps_the_data_and_says_why(spool: Spool) -> None:
    before = files_below(make_episode(spool.paths.episodes, "ep"))
    put_artifact(spool, "ep")
    target = condemn(spool, "ep", error="not this")
    assert target == spool.paths.quarantine / "ep"
    after = files_below(target)
    reason = msgspec.json.decode(after.pop(REASON_FILE))
    assert after == before
    assert {"status_code", "error", "body", "quarantined_at_wall"} <= set(reason)
    assert (reason["status_code"], reason["error"], reason["body"]) == (422, "not this", '{"why": "x"}')
    time.strptime(reason["quarantined_at_wall"], "%Y-%m-%dT%H:%M:%SZ")
    assert os.listdir(spool.paths.outbox) == []
    assert os.listdir(spool.paths.quarantine) == ["ep"]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_a_file_that_the_recorder_named_like_the_reason_is_kept(spool: Spool, kind: str) -> None:
    own = make_episode(spool.paths.episodes, "ep") / REASON_FILE
    if kind == "file":
        own.write_bytes(b"the recorder's")
    elif kind == "directory":
        own.mkdir()
        (own / "file").write_bytes(b"the recorder's")
    else:
        own.symlink_to("data.bin")
    before = files_below(spool.paths.episodes / "ep")
    target = condemn(spool, "ep", error="not this")
    assert files_below(target) == before
    (entry,) = spool.quarantined()
    assert entry.reason is not None
    assert entry.reason.error == "not this"
    assert spool.retry("ep") == "ep"
    assert files_below(spool.paths.episodes / "ep") == before
    assert os.path.lexists(spool.paths.episodes / "ep" / REASON_FILE)
    assert os.listdir(spool.paths.quarantine) == []


def test_a_fifo_that_the_recorder_named_like_the_reason_is_not_waited_for(spool: Spool) -> None:
    own = make_episode(spool.paths.episodes, "ep") / REASON_FILE
    os.mkfifo(own)
    condemn(spool, "ep", error="not this")
    (entry,) = spool.quarantined()
    assert entry.reason is not None
    assert entry.reason.error == "not this"
    spool.retry("ep")
    assert own.is_fifo()
    assert os.listdir(spool.paths.quarantine) == []


def test_quarantine_beside_an_older_one(spool: Spool) -> None:
    for content in (b"first", b"second"):
        make_episode(spool.paths.episodes, "ep", content=content)
        condemn(spool, "ep", error=content.decode())
    entries = spool.quarantined()
    assert [(entry.episode, entry.name) for entry in entries] == [("ep", "ep"), ("ep", "ep~1")]
    assert [entry.reason.error for entry in entries if entry.reason] == ["first", "second"]
    assert (spool.paths.quarantine / "ep" / "data.bin").read_bytes() == b"first"


def test_an_entry_without_a_readable_reason_is_listed(spool: Spool) -> None:
    path = make_episode(spool.paths.quarantine, "old")
    (spool.paths.quarantine / "stray-file").touch()
    assert [(entry.name, entry.reason) for entry in spool.quarantined()] == [("old", None)]
    (path / REASON_FILE).write_bytes(b"{")
    assert [(entry.name, entry.reason) for entry in spool.quarantined()] == [("old", None)]


def test_the_original_tools_reason_is_read(spool: Spool) -> None:
    path = make_episode(spool.paths.quarantine, "old")
    (path / REASON_FILE).write_bytes(
        b'{"status_code": 412, "error": "e", "body": "b", "quarantined_at_wall": "2020-01-01T00:00:00Z"}'
    )
    (entry,) = spool.quarantined()
    assert entry.reason is not None
    assert entry.reason.status_code == 412


@pytest.mark.parametrize("word", ["retry", "drop"])
def test_what_is_not_wholly_in_quarantine_is_not_taken_out_of_it(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """The disk is full still, the decision stands: it would take the episode again, or the next one of its name."""
    make_episode(spool.paths.episodes, "ep")

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    act = spool.retry if word == "retry" else spool.drop_quarantined
    with monkeypatch.context() as patch:
        patch.setattr(spool_store, "put_reason", no_room)
        with pytest.raises(OSError, match="No space"):
            condemn(spool, "ep")
        with pytest.raises(UsageError, match="cannot be completed now: No space") as refused:
            act("ep")
        assert "free space" in refused.value.remedy
    act("ep")
    assert os.listdir(spool.paths.quarantine) == []
    if word == "retry":
        assert (spool.paths.episodes / "ep").stat().st_mtime_ns == MTIME_NS


def test_retry_puts_it_back_as_it_was(spool: Spool) -> None:
    before = files_below(make_episode(spool.paths.episodes, "ep"))
    condemn(spool, "ep")
    assert (spool.paths.quarantine / "ep").stat().st_mtime_ns != MTIME_NS
    assert spool.retry("ep") == "ep"
    assert files_below(spool.paths.episodes / "ep") == before
    assert (spool.paths.episodes / "ep").stat().st_mtime_ns == MTIME_NS
    assert os.listdir(spool.paths.quarantine) == []
    assert spool.look().ready == [("ep", "ep")]


def test_an_interrupted_retry_is_repeated_with_the_time_it_had(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(make_episode(spool.paths.episodes, "ep"))
    condemn(spool, "ep", error="not this")
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", failing(errno.EIO))
        with pytest.raises(OSError, match="faulty"):
            spool.retry("ep")
    (entry,) = spool.quarantined()
    assert entry.reason is not None
    assert entry.reason.error == "not this"
    assert Spool(spool.paths.root).retry("ep") == "ep"
    assert files_below(spool.paths.episodes / "ep") == before
    assert (spool.paths.episodes / "ep").stat().st_mtime_ns == MTIME_NS
    assert os.listdir(spool.paths.quarantine) == []


def test_a_reason_that_cannot_be_read_stays_out_of_the_episode(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    make_episode(spool.paths.episodes, "ep")
    condemn(spool, "ep")
    with monkeypatch.context() as patch:
        patch.setattr(reason, "_open_without_waiting", failing(errno.EIO))
        with pytest.raises(OSError, match="faulty"):
            spool.retry("ep")
        assert [entry.reason for entry in spool.quarantined()] == [None]
    assert spool.look().ready == []
    spool.retry("ep")
    assert REASON_FILE not in os.listdir(spool.paths.episodes / "ep")


def test_a_reason_whose_entry_was_put_back_goes(spool: Spool) -> None:
    """The retry was killed before its last step; what is no reason of ours stays."""
    make_episode(spool.paths.episodes, "ep")
    condemn(spool, "ep")
    (spool.paths.quarantine / "ep" / REASON_FILE).rename(spool.paths.quarantine / f"ep.{REASON_FILE}")
    (spool.paths.quarantine / f"other.{REASON_FILE}").write_bytes(b"somebody's")
    spool.finish_quarantines()
    assert spool.quarantined()[0].reason is not None
    (spool.paths.quarantine / "ep").rename(spool.paths.episodes / "ep")
    spool.finish_quarantines()
    assert os.listdir(spool.paths.quarantine) == [f"other.{REASON_FILE}"]


def test_retry_of_a_later_one_takes_the_id_back(spool: Spool) -> None:
    for content in (b"first", b"second"):
        make_episode(spool.paths.episodes, "ep", content=content)
        condemn(spool, "ep")
    assert spool.retry("ep~1") == "ep"
    with pytest.raises(UsageError, match="is there already") as refused:
        spool.retry("ep")
    assert "--as" in refused.value.remedy
    assert spool.retry("ep", new_id="ep-first") == "ep-first"
    assert (spool.paths.episodes / "ep-first" / "data.bin").read_bytes() == b"first"


def test_retry_takes_no_part_of_an_impossible_name_for_an_id(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep~backup")
    condemn(spool, "ep~backup")
    with pytest.raises(UsageError, match="'ep~backup' cannot be an episode's id") as refused:
        spool.retry("ep~backup")
    assert "--as" in refused.value.remedy
    assert spool.retry("ep~backup", new_id="ep-backup") == "ep-backup"


NOT_ENTRIES = ["", ".", "..", "nothing", "a/b", "../episodes/ep", "ep/", ".condemned-x", "ep\0", "link", "file"]


@pytest.mark.parametrize("name", NOT_ENTRIES)
def test_what_is_no_entry_is_refused_and_nothing_is_touched(spool: Spool, name: str) -> None:
    """An empty name above all: it would be quarantine/ itself."""
    make_episode(spool.paths.episodes, "ep")
    make_episode(spool.paths.quarantine, "kept")
    (spool.paths.quarantine / "link").symlink_to(spool.paths.episodes / "ep")
    (spool.paths.quarantine / "file").touch()
    before = files_below(spool.paths.root)
    for word in (spool.drop_quarantined, spool.retry):
        with pytest.raises(UsageError) as refused:
            word(name)
        assert refused.value.remedy
    assert files_below(spool.paths.root) == before
    assert spool.paths.quarantine.is_dir()


@pytest.mark.parametrize("new_id", ["", "../up", "a b", ".x"])
def test_retry_under_an_impossible_id_is_refused(spool: Spool, new_id: str) -> None:
    make_episode(spool.paths.quarantine, "kept")
    if new_id:
        with pytest.raises(UsageError, match="cannot be an episode's id"):
            spool.retry("kept", new_id=new_id)
        assert (spool.paths.quarantine / "kept").is_dir()
    else:  # none given
        assert spool.retry("kept", new_id=new_id) == "kept"


def test_dropping_is_for_good(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    condemn(spool, "ep")
    spool.drop_quarantined("ep")
    assert os.listdir(spool.paths.quarantine) == []


def test_cleaning_goes_by_age(spool: Spool) -> None:
    now = time.time()
    for name, days in (("new", 0.5), ("old", 3.0), ("older", 30.0)):
        os.utime(make_episode(spool.paths.quarantine, name), (now - days * 86400,) * 2)
    assert spool.clean_quarantine(0) == spool.clean_quarantine(-1) == []
    assert spool.clean_quarantine(10) == ["older"]
    assert spool.clean_quarantine(1) == ["old"]
    assert os.listdir(spool.paths.quarantine) == ["new"]


def test_cleaning_goes_on_where_an_earlier_removal_could_not_end(spool: Spool) -> None:
    """What is left of one that would not go does not keep the next of its name from going."""
    stuck = make_episode(spool.paths.quarantine, ".removing-ep")
    os.utime(make_episode(spool.paths.quarantine, "ep"), (1, 1))
    assert spool.clean_quarantine(1) == ["ep"]
    assert os.listdir(spool.paths.quarantine) == [stuck.name]
    spool.finish_quarantines()
    assert os.listdir(spool.paths.quarantine) == []


# --- holds -------------------------------------------------------------------------------------------------------


def test_a_hold_leaves_everything_in_place(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    put_artifact(spool, "ep")
    before = files_below(spool.paths.root)
    spool.hold(hold_record("ep"))
    after = files_below(spool.paths.root)
    assert after.pop("holds/ep.json")
    assert after == before
    assert spool.holds() == [hold_record("ep")]
    assert spool.sweep() == []


def test_a_hold_that_cannot_be_read_holds(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    (spool.paths.holds / "ep.json").write_bytes(b'{"episode": ')
    look = spool.look()
    assert (look.ready, look.held) == ([], ["ep"])
    (record,) = spool.holds()
    assert (record.episode, record.reason, record.fingerprint) == ("ep", "unreadable", "")
    assert spool.keep_local("ep") == "ep"
    assert spool.look().ready == [("ep", "ep")]


def test_keep_local_offers_it_again_with_its_artifact(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    manifest = put_artifact(spool, "ep")
    spool.hold(hold_record("ep"))
    assert spool.keep_local("ep") == "ep"
    assert spool.look().ready == [("ep", "ep")]
    assert spool.outbox.peek("ep") == manifest


def test_keep_local_under_another_id(spool: Spool) -> None:
    before = files_below(make_episode(spool.paths.episodes, "ep"))
    make_episode(spool.paths.episodes, "taken")
    put_artifact(spool, "ep")
    spool.hold(hold_record("ep"))
    for new_id in ("taken", "ep", "bad id"):
        with pytest.raises(UsageError):
            spool.keep_local("ep", new_id=new_id)
    assert spool.look().held == ["ep"]
    assert spool.keep_local("ep", new_id="ep-local") == "ep-local"
    assert files_below(spool.paths.episodes / "ep-local") == before
    assert [episode for _, episode in spool.look().ready] == ["ep-local", "taken"]
    assert os.listdir(spool.paths.outbox) == os.listdir(spool.paths.holds) == []


def test_drop_local_keeps_the_data_in_quarantine(spool: Spool) -> None:
    before = files_below(make_episode(spool.paths.episodes, "ep"))
    put_artifact(spool, "ep")
    spool.hold(hold_record("ep"))
    target = spool.drop_local("ep")
    after = files_below(target)
    assert msgspec.json.decode(after.pop(REASON_FILE))["error"] == "dropped by an operator: another content"
    assert after == before
    assert os.listdir(spool.paths.outbox) == os.listdir(spool.paths.holds) == []


@pytest.mark.parametrize("name", ["ep", "nothing", "", "../ep"])
def test_what_is_not_held_is_refused(spool: Spool, name: str) -> None:
    make_episode(spool.paths.episodes, "ep")
    with pytest.raises(UsageError, match="is not held"):
        spool.keep_local(name)
    with pytest.raises(UsageError, match="is not held"):
        spool.drop_local(name)


# --- sweeping ----------------------------------------------------------------------------------------------------


def test_the_sweep_removes_what_has_no_episode(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "here")
    make_episode(spool.paths.episodes, "recording", marker=False)
    for name in ("here", "recording", "gone"):
        put_artifact(spool, name)
        spool.hold(hold_record(name))
    spool.outbox.begin("partial-only").close()
    (spool.paths.outbox / "README").write_bytes(b"not ours")
    (spool.paths.episodes / "a-file").touch()
    put_artifact(spool, "a-file")
    assert spool.sweep() == ["a-file", "gone", "partial-only"]
    assert spool.sweep() == []
    assert spool.outbox.episodes() == {"here", "recording"}
    assert sorted(os.listdir(spool.paths.holds)) == ["here.json", "recording.json"]
    assert (spool.paths.outbox / "README").exists()


def test_temporaries_go_and_nothing_else(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    put_artifact(spool, "ep")
    before = files_below(spool.paths.root)
    for directory in (spool.paths.outbox, spool.paths.holds, spool.paths.state, spool.paths.quarantine):
        (directory / ".tmp-x.json.123").write_bytes(b"torn")
    spool.remove_temporaries()
    assert files_below(spool.paths.root) == before


def test_what_cannot_be_swept_stops_nothing(spool: Spool) -> None:
    (spool.paths.outbox / "somebody.tar.zst").mkdir()
    (spool.paths.outbox / "gone.tar.zst").write_bytes(b"x")
    assert spool.sweep() == ["gone"]
    assert (spool.paths.outbox / "somebody.tar.zst").is_dir()


def test_a_quarantine_that_cannot_be_finished_stops_nothing(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    make_episode(spool.paths.episodes, "one")
    path = spool._condemned_path("one")
    with monkeypatch.context() as patch:
        patch.setattr(spool, "_finish_quarantine", lambda *_: None)
        spool.quarantine("one", status_code=422, error="no", body="")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "move", raise_full)
        spool.finish_quarantines()
    assert path.exists()
    assert (spool.paths.episodes / "one").is_dir()
    spool.finish_quarantines()
    assert not path.exists()
    assert (spool.paths.quarantine / "one").is_dir()


def test_a_quarantine_that_the_disk_refuses_is_taken_back(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    make_episode(spool.paths.episodes, "one")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "move", raise_full)
        with pytest.raises(OSError, match="No space"):
            spool.quarantine("one", status_code=422, error="no", body="")
    assert os.listdir(spool.paths.quarantine) == []
    spool.finish_quarantines()
    assert (spool.paths.episodes / "one").is_dir()


@pytest.mark.parametrize("again", [False, True], ids=["the same process", "another"])
def test_an_entry_that_is_put_back_is_not_condemned_by_what_was_left(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    make_episode(spool.paths.episodes, "one")
    make_episode(spool.paths.episodes, "two")
    with monkeypatch.context() as patch:
        patch.setattr(spool_store, "put_reason", raise_full)
        for name in ("one", "two"):
            with pytest.raises(OSError, match="No space"):
                condemn(spool, name)
    assert spool.unfinished
    if again:
        spool = Spool(spool.paths.root)
    spool.retry("one")
    spool.drop_quarantined("two")
    make_episode(spool.paths.episodes, "two")
    assert not spool.unfinished
    Spool(spool.paths.root).finish_quarantines()
    assert sorted(os.listdir(spool.paths.episodes)) == ["one", "two"]
    assert os.listdir(spool.paths.quarantine) == []


def test_a_decision_that_cannot_be_read_stops_nothing(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    (spool.paths.quarantine / ".condemned-0123.json").write_bytes(b"x")

    def unreadable(_: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    spool.finish_quarantines()
    assert spool.unfinished


def raise_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("years", [30, -30])
def test_a_clock_that_jumps_cleans_no_quarantine(spool: Spool, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    make_episode(spool.paths.episodes, "ep")
    condemn(spool, "ep")
    assert spool.clean_quarantine(1) == []
    wall = time.time() + years * 366 * 86400.0
    monkeypatch.setattr(time, "time", lambda: wall)
    assert spool.clean_quarantine(1) == []
    again = Spool(spool.paths.root)  # nor after a restart
    assert again.clean_quarantine(1) == []


@pytest.mark.parametrize("spoilt", [b"\xff", b'{"episode": "\xff"}', b'{"\xff": 1}', b"[", b""])
def test_no_record_that_is_spoilt_stops_a_look(spool: Spool, spoilt: bytes) -> None:
    for name in ("held", "ready"):
        make_episode(spool.paths.episodes, name)
    make_episode(spool.paths.quarantine, "refused")
    for path in (
        spool.paths.holds / "held.json",
        spool.paths.quarantine / "refused" / "quarantine_reason.json",
        spool.paths.quarantine / ".condemned-0123.json",
        spool.outbox.manifest("ready"),
        spool.outbox.upload_note("ready"),
        spool.paths.receipts / "2020-01-01.jsonl",
    ):
        path.write_bytes(spoilt)
    spool.outbox.artifact("ready").write_bytes(b"artifact")
    spool.finish_quarantines()
    look = spool.look()
    assert ([name for _, name in look.ready], look.held) == (["ready"], ["held"])
    (record,) = spool.holds()
    assert record.reason == "unreadable"
    assert spool.outbox.find("ready") is None
    assert spool.outbox.find_upload("ready", "http://receiver.example") == ""
    (quarantined,) = [one for one in spool.quarantined() if one.name == "refused"]
    assert quarantined.reason is None
    assert list(journal_lines(spool)) == []
