"""Every move of the spool, stopped before and in each of its changing calls, then repaired by a fresh spool.

The calls are numbered by wrapping them where they live (``os``); a stop is an exception that nothing catches. What a
crash may leave is then what is on disk: all calls before the stop happened, none after it, and a ``write`` that is
stopped has put down half. (That what was fsynced survives a power loss is the file system's promise; that the fsyncs
come in the right order is looked at in the recorded calls.)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sample import MTIME_NS, files_below, hold_record, make_episode, put_artifact, receipt_of

from fastship import durable
from fastship.episode import Manifest
from fastship.errors import UsageError
from fastship.spool import Outbox, Shelf, Spool
from fastship.spool.reason import REASON_FILE

CHANGING = ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "write", "fsync", "utime", "truncate")


class Stop(BaseException):
    """The process ends here."""


class Calls:
    """Records the changing calls of ``os``, and stops at the one numbered ``stop_at`` (from 0)."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.made: list[tuple[str, str]] = []  # (call, what it was about)
        self._paths: dict[int, str] = {}

    def wrap(self, patch: pytest.MonkeyPatch) -> None:
        for name in CHANGING:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        patch.setattr(os, "getpid", lambda: 1 << 30)  # who repairs is another process: other temporary names
        real_open = os.open

        def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC):
                self._count("open", os.fspath(path))
            fd = real_open(path, flags, *args, **more)
            self._paths[fd] = os.fsdecode(path)
            return fd

        patch.setattr(os, "open", opened)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(subject: Any, *args: Any, **more: Any) -> Any:
            about = self._paths.get(subject, "?") if isinstance(subject, int) else os.fsdecode(subject)
            stopped = self._count(name, about, half=name == "write")
            if stopped:
                data = args[0]
                real(subject, data[: len(data) // 2])
                raise Stop
            return real(subject, *args, **more)

        return call

    def _count(self, name: str, about: str, *, half: bool = False) -> bool:
        if self.stop_at is not None and len(self.made) >= self.stop_at:
            if half and len(self.made) == self.stop_at:
                self.made.append((name, about))
                return True
            raise Stop  # and whatever tidies up on the way out is stopped, too
        self.made.append((name, about))
        return False

    def positions(self, name: str, ending: str) -> list[int]:
        return [number for number, (call, about) in enumerate(self.made) if call == name and about.endswith(ending)]


class Move(NamedTuple):
    """One move of the spool: how the spool stands before it, the move, and where each episode may be after it."""

    prepare: Callable[[Spool], None]
    act: Callable[[Spool], object]
    begun_at: dict[str, str]  # content -> where it was, below the root
    ends_at: dict[str, str | None]  # content -> where it is after the move; None: nowhere


def retire(spool: Spool) -> object:
    manifests = [spool.outbox.peek(name) for name in ("a", "b", "c")]
    batch = [(one.episode, receipt_of(one), one) for one in manifests if one is not None]
    return spool.retire(batch)


def prepare_retire(spool: Spool) -> None:
    make_episode(spool.paths.shipped, "b", content=b"older b")
    for name in ("a", "b", "c"):
        make_episode(spool.paths.episodes, name, content=name.encode())
        put_artifact(spool, name)


def prepare_shipped(spool: Spool) -> None:
    for name in ("a", "b"):
        make_episode(spool.paths.shipped, name, content=name.encode())


def prepare_quarantine(spool: Spool) -> None:
    make_episode(spool.paths.quarantine, "ep", content=b"older")
    make_episode(spool.paths.episodes, "ep", content=b"ep")
    put_artifact(spool, "ep")


def quarantine(name: str) -> Callable[[Spool], object]:
    return lambda spool: spool.quarantine(name, status_code=412, error="e", body="b")


def prepare_held(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep", content=b"ep")
    put_artifact(spool, "ep")
    spool.hold(hold_record("ep"))


def prepare_in_quarantine(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep", content=b"ep")
    spool.quarantine("ep", status_code=422, error="e", body="b")


def prepare_old(spool: Spool) -> None:
    for name in ("old", "young"):
        make_episode(spool.paths.episodes, name, content=name.encode())
        spool.quarantine(name, status_code=422, error="e", body="b")
    os.utime(spool.paths.quarantine / "old", (1, 1))


def prepare_packed(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep", content=b"ep")
    put_artifact(spool, "ep")


def prepare_odd(spool: Spool) -> None:
    make_episode(spool.paths.episodes, ODD, content=b"odd")


ODD = ".odd\n" + "x" * 240

MOVES = {
    "retire": Move(
        prepare_retire,
        retire,
        {"a": "episodes/a", "b": "episodes/b", "c": "episodes/c", "older b": "shipped/b"},
        {"a": "shipped/a", "b": "shipped/b~1", "c": "shipped/c", "older b": "shipped/b"},
    ),
    "quarantine": Move(
        prepare_quarantine,
        quarantine("ep"),
        {"ep": "episodes/ep", "older": "quarantine/ep"},
        {"ep": "quarantine/ep~1", "older": "quarantine/ep"},
    ),
    "quarantine of an odd name": Move(
        prepare_odd,
        quarantine(ODD),
        {"odd": f"episodes/{ODD}"},
        {"odd": f"quarantine/_{ODD[:199]}"},
    ),
    "hold": Move(
        prepare_packed,
        lambda spool: spool.hold(hold_record("ep")),
        {"ep": "episodes/ep"},
        {"ep": "episodes/ep"},
    ),
    "retry": Move(
        prepare_in_quarantine, lambda spool: spool.retry("ep"), {"ep": "quarantine/ep"}, {"ep": "episodes/ep"}
    ),
    "keep-local": Move(
        prepare_held, lambda spool: spool.keep_local("ep"), {"ep": "episodes/ep"}, {"ep": "episodes/ep"}
    ),
    "keep-local as another": Move(
        prepare_held,
        lambda spool: spool.keep_local("ep", new_id="ep-2"),
        {"ep": "episodes/ep"},
        {"ep": "episodes/ep-2"},
    ),
    "drop-local": Move(
        prepare_held, lambda spool: spool.drop_local("ep"), {"ep": "episodes/ep"}, {"ep": "quarantine/ep"}
    ),
    "drop": Move(
        prepare_in_quarantine, lambda spool: spool.drop_quarantined("ep"), {"ep": "quarantine/ep"}, {"ep": None}
    ),
    "clean": Move(
        prepare_old,
        lambda spool: spool.clean_quarantine(1),
        {"old": "quarantine/old", "young": "quarantine/young"},
        {"old": None, "young": "quarantine/young"},
    ),
    "ship again": Move(
        prepare_shipped,
        lambda spool: spool.shelf.reship("a"),
        {"a": "shipped/a", "b": "shipped/b"},
        {"a": "episodes/a", "b": "shipped/b"},
    ),
    "remove a copy": Move(
        prepare_shipped,
        lambda spool: Shelf(spool.paths).remove("a"),
        {"a": "shipped/a", "b": "shipped/b"},
        {"a": None, "b": "shipped/b"},
    ),
}


def new_spool(root: Path, move: Move) -> Spool:
    spool = Spool(root)
    spool.create()
    move.prepare(spool)
    return spool


def run(spool: Spool, move: Move, stop_at: int | None) -> Calls:
    calls = Calls(stop_at)
    with pytest.MonkeyPatch.context() as patch:
        calls.wrap(patch)
        if stop_at is None:
            move.act(spool)
        else:
            with pytest.raises(Stop):
                move.act(spool)
    return calls


def repaired(root: Path) -> Spool:
    """What every start does first."""
    spool = Spool(root)
    spool.create()
    spool.remove_temporaries()
    spool.finish_quarantines()
    Shelf(spool.paths).finish_removals()
    spool.sweep()
    return spool


def whereabouts(spool: Spool, move: Move) -> dict[str, str | None]:
    """Where each content is, having checked that all of it is there and nothing else lies about."""
    found: dict[str, str | None] = dict.fromkeys(move.begun_at)
    for parent in (spool.paths.episodes, spool.paths.shipped, spool.paths.quarantine):
        for name in os.listdir(parent):
            if name.endswith(f".{REASON_FILE}"):
                assert (parent / name.removesuffix(f".{REASON_FILE}")).is_dir(), "a reason without an entry"
                continue
            files = files_below(parent / name)
            files.pop(REASON_FILE, None)
            content = files["data.bin"].decode()
            assert files == {"data.bin": content.encode(), "sub/log.txt": b"line\n", "done.marker": b""}
            assert found[content] is None, f"{content} is in two places"
            found[content] = f"{parent.name}/{name}"
    return found


def leftovers(spool: Spool) -> list[str]:
    """Files of ours that nobody would need or remove."""
    found = [name for name in files_below(spool.paths.root) if "/.tmp-" in name or "/.removing-" in name]
    found += [name for name in os.listdir(spool.paths.quarantine) if name.startswith(".")]
    for parent in (spool.paths.outbox, spool.paths.holds):
        for name in os.listdir(parent):
            if not (spool.paths.episodes / name.split(".")[0]).is_dir():
                found.append(name)
    return found


@pytest.mark.parametrize("name", MOVES)
def test_stopped_anywhere_nothing_is_lost_and_repeating_ends_it(tmp_path: Path, name: str) -> None:
    move = MOVES[name]
    whole = new_spool(tmp_path / "whole", move)
    total = len(run(whole, move, None).made)
    assert whereabouts(whole, move) == move.ends_at
    assert total > 0
    for stop_at in range(total):
        root = tmp_path / str(stop_at)
        run(new_spool(root, move), move, stop_at)
        spool = repaired(root)
        places = whereabouts(spool, move)
        for content, place in places.items():
            assert place in (move.begun_at[content], move.ends_at[content]), f"stopped at {stop_at}"
        assert leftovers(spool) == [], f"stopped at {stop_at}"
        # What is not through is decided again, by the next answer or the operator's next word.
        if places != move.ends_at or name in ("hold", "keep-local", "retry"):
            for episode in ("a", "b", "c"):
                if places.get(episode) == f"episodes/{episode}" and spool.outbox.peek(episode) is None:
                    put_artifact(spool, episode)
            if name == "retry" and places == move.ends_at:
                assert (spool.paths.episodes / "ep").stat().st_mtime_ns == MTIME_NS, f"stopped at {stop_at}"
                continue
            # An operator is told so where the hold went with what was done already: as good as repeated.
            with contextlib.suppress(UsageError):
                move.act(spool)
            assert whereabouts(spool, move) == move.ends_at, f"stopped at {stop_at}"
            assert leftovers(spool) == [], f"stopped at {stop_at}"
            if name == "retry":  # else its content digest were another
                assert (spool.paths.episodes / "ep").stat().st_mtime_ns == MTIME_NS, f"stopped at {stop_at}"


@pytest.mark.parametrize("name", ["quarantine", "quarantine of an odd name", "drop-local"])
def test_a_quarantine_that_was_decided_is_finished_with_its_reason(tmp_path: Path, name: str) -> None:
    move = MOVES[name]
    total = len(run(new_spool(tmp_path / "whole", move), move, None).made)
    finished = 0
    for stop_at in range(total):
        root = tmp_path / str(stop_at)
        run(new_spool(root, move), move, stop_at)
        spool = repaired(root)
        if whereabouts(spool, move) == move.ends_at:
            finished += 1
            entry = spool.quarantined()[-1]
            assert entry.reason is not None
            assert entry.reason.mtime_ns == MTIME_NS
    assert finished > total // 2  # the decision is durable early


def test_the_repair_itself_may_be_stopped_anywhere(tmp_path: Path) -> None:
    move = MOVES["quarantine"]
    decided = 3  # open, write, fsync of the decision; the rename is next
    total = len(run(new_spool(tmp_path / "whole", move), move, None).made)
    for first in (decided, decided + 2, decided + 4, total - 1):
        for second in range(total):
            root = tmp_path / f"{first}-{second}"
            run(new_spool(root, move), move, first)
            calls = Calls(second)
            with pytest.MonkeyPatch.context() as patch:
                calls.wrap(patch)
                try:
                    repaired(root)
                except Stop:
                    pass
                else:
                    break
            spool = repaired(root)
            assert whereabouts(spool, move)["older"] == "quarantine/ep"
            assert whereabouts(spool, move)["ep"] in ("episodes/ep", "quarantine/ep~1")
            assert leftovers(spool) == []


def test_receipts_are_durable_before_anything_moves_and_moves_before_artifacts_go(tmp_path: Path) -> None:
    move = MOVES["retire"]
    calls = run(new_spool(tmp_path / "spool", move), move, None)
    (journal_write,) = calls.positions("write", ".jsonl")
    (journal_sync,) = calls.positions("fsync", ".jsonl")
    (journal_name,) = calls.positions("fsync", "/receipts")
    renames = [number for number, (call, _) in enumerate(calls.made) if call == "rename"]
    (shipped_sync,) = calls.positions("fsync", "/shipped")
    (episodes_sync,) = calls.positions("fsync", "/episodes")
    unlinks = [number for number, (call, _) in enumerate(calls.made) if call == "unlink"]
    assert journal_write < journal_sync < journal_name < min(renames)
    assert len(renames) == 3
    assert max(renames) < shipped_sync < episodes_sync < min(unlinks)  # the new name before the old one's absence
    assert len(calls.positions("fsync", "")) == 4  # however many episodes


def test_a_journal_whose_maker_died_before_its_name_was_durable_is_made_durable_by_the_next(tmp_path: Path) -> None:
    move = MOVES["retire"]
    spool = new_spool(tmp_path / "spool", move)
    (named,) = run(new_spool(tmp_path / "whole", move), move, None).positions("fsync", "/receipts")
    run(spool, move, named)
    again = run(repaired(tmp_path / "spool"), move, None)
    (journal_name,) = again.positions("fsync", "/receipts")
    assert journal_name < min(number for number, (call, _) in enumerate(again.made) if call == "rename")


def test_a_quarantine_is_durable_before_the_episode_moves(tmp_path: Path) -> None:
    move = MOVES["quarantine"]
    calls = run(new_spool(tmp_path / "spool", move), move, None)
    decision, moved, staged, reason = (number for number, (call, _) in enumerate(calls.made) if call == "rename")
    syncs = calls.positions("fsync", "/quarantine")
    assert decision < syncs[0] < moved < syncs[1] < staged < reason
    (forgotten,) = [n for n, (call, about) in enumerate(calls.made) if call == "unlink" and ".condemned-" in about]
    (reason_named,) = calls.positions("fsync", "/quarantine/ep~1")
    assert reason < reason_named < forgotten


SYNCED_AFTER = {
    "quarantine": (("unlink", ".condemned-"), "/quarantine"),
    "retry": (("rename", REASON_FILE), "/quarantine/ep"),
    "drop": (("rename", "/quarantine/ep"), "/quarantine"),
    "keep-local": (("unlink", "/holds/ep.json"), "/holds"),
    "ship again": (("rename", "/shipped/a"), "/episodes"),
}
"""What a power loss may not bring back: the call that removes it, and the directory that is synced next."""


@pytest.mark.parametrize("name", SYNCED_AFTER)
def test_what_an_operator_was_told_is_durable(tmp_path: Path, name: str) -> None:
    (call, about), directory = SYNCED_AFTER[name]
    calls = run(new_spool(tmp_path / "spool", MOVES[name]), MOVES[name], None)
    removed = next(number for number, made in enumerate(calls.made) if made[0] == call and about in made[1])
    following = itertools.takewhile(lambda made: made[0] in ("utime", "unlink", "fsync"), calls.made[removed + 1 :])
    assert any(kind == "fsync" and path.endswith(directory) for kind, path in following)


@pytest.mark.parametrize("older", [None, b"ARTIFACT", b"longer artifact"])
def test_an_artifact_is_whole_and_has_its_manifest_or_is_not_believed(tmp_path: Path, older: bytes | None) -> None:
    """Also where an older artifact of the same size stands there: its bytes are not what the new manifest says."""

    def prepare(spool: Spool) -> None:
        make_episode(spool.paths.episodes, "ep", content=b"ep")
        if older is not None:
            put_artifact(spool, "ep", older)

    def act(spool: Spool) -> Manifest:
        return put_artifact(spool, "ep", b"artifact")

    move = Move(prepare, act, {"ep": "episodes/ep"}, {"ep": "episodes/ep"})
    total = len(run(new_spool(tmp_path / "whole", move), move, None).made)
    for stop_at in range(total):
        root = tmp_path / str(stop_at)
        run(new_spool(root, move), move, stop_at)
        outbox = Outbox(repaired(root).paths.outbox)
        believed = outbox.peek("ep")
        if believed is not None:
            data = outbox.artifact("ep").read_bytes()
            assert hashlib.sha256(data).hexdigest() == believed.artifact_sha256, f"stopped at {stop_at}"
        manifest = act(repaired(root))
        assert outbox.find("ep") == manifest


def test_write_file_shows_the_old_or_the_new_and_publish_never_replaces(tmp_path: Path) -> None:
    def attempt(directory: Path, stop_at: int | None) -> Calls:
        directory.mkdir()
        (directory / "file").write_bytes(b"old")
        (directory / "source").write_bytes(b"published")
        calls = Calls(stop_at)
        with pytest.MonkeyPatch.context() as patch:
            calls.wrap(patch)
            try:
                durable.write_file(directory / "file", b"the new content")
                durable.publish(directory / "source", directory / "target")
            except Stop:
                assert stop_at is not None
        return calls

    calls = attempt(tmp_path / "whole", None)
    assert [call for call, _ in calls.made] == ["open", "write", "fsync", "rename", "fsync", "link", "fsync", "unlink"]
    for stop_at in range(len(calls.made)):
        directory = tmp_path / str(stop_at)
        attempt(directory, stop_at)
        durable.remove_temporaries(directory)
        files = files_below(directory)
        assert files.pop("file") in (b"old", b"the new content")
        assert set(files.values()) == {b"published"}
        assert set(files) <= {"source", "target"}
