"""What each owner has stored, counted from the receipts of a real store."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from pathlib import Path

import pytest
from receiver_process import make_artifact, wait_for

from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store import recount as recount_module
from fastship.receiver.store.accounts import Full
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings

A = "name:a"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(ReceiverSettings(root=str(tmp_path / "root")), lambda owner: 5000 if owner == A else 0)


def keep(store: Store, episode: str, owner: str = A) -> int:
    data = make_artifact(episode, 1000)
    partial = store.uploads.one_shot()
    partial.write([data])
    said = Declared(episode=episode, sha256=hashlib.sha256(data).hexdigest(), length=len(data), owner=owner)
    try:
        assert isinstance(store.publish(partial, said), tuple)
    finally:
        partial.drop()
    return len(data)


def test_what_is_stored_is_counted_for_who_stored_it(store: Store) -> None:
    sizes = {episode: keep(store, episode) for episode in ("e1", "e2", "e3")}
    other = keep(store, "e4", "name:b")
    keep(store, "e5", "")
    told = {A: sum(sizes.values()), "name:b": other}
    assert store.accounts.all() == told
    assert store.recount.run()
    assert store.accounts.all() == told
    assert not [name for name in os.listdir(store.root / "uploads") if name.endswith(".receipt")]


def test_what_is_too_much_is_refused_and_leaves_nothing_and_a_count(store: Store) -> None:
    size = sum(keep(store, f"e{number}") for number in range(4))
    store.artifact_path("e0").unlink()
    with pytest.raises(Full):
        keep(store, "e4")
    assert not store.artifact_path("e4").exists()
    assert not [path for path in (store.root / "uploads").rglob("*") if path.is_file()]
    wait_for(lambda: store.accounts.stored_bytes(A) < size)
    keep(store, "e4")
    store.recount.close()


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_where_the_disk_takes_no_account_nothing_is_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def fails(place: object, *args: object) -> object:
        inside = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
        if "/accounts/" in inside:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(place, *args)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space"):
        keep(store, "e1")
    monkeypatch.undo()
    assert not store.artifact_path("e1").exists()
    assert store.accounts.stored_bytes(A) == 0
    assert keep(store, "e1") == store.accounts.stored_bytes(A)


def test_what_was_set_aside_removed_or_never_named_does_not_count_any_more(store: Store) -> None:
    sizes = {episode: keep(store, episode) for episode in ("e1", "e2", "e3")}
    with store.accounts.adding(A, 1):
        pass
    store.artifact_path("e1").unlink()
    store.rotted.set_aside("e2", os.stat(store.artifact_path("e2")).st_ino, Declared(episode="e2"))
    assert store.accounts.stored_bytes(A) == sum(sizes.values()) + 1
    assert store.recount.run()
    assert store.accounts.stored_bytes(A) == sizes["e3"]


def test_an_artifact_whose_receipt_was_lost_counts_for_nobody(store: Store) -> None:
    keep(store, "e1")
    (store.root / "episodes" / "e1.receipt.json").unlink()
    assert store.receipt("e1") is not None
    assert store.recount.run()
    assert store.accounts.stored_bytes(A) == 0


def test_a_lost_account_is_found_again(store: Store) -> None:
    size = keep(store, "e1")
    os.unlink(store.root / "accounts" / "name.a")
    assert store.recount.run()
    assert store.accounts.stored_bytes(A) == size


def test_one_counts_at_a_time_and_all_that_ask_are_counted_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recount_module, "_PAUSE_S", 0.0)
    keep(store, "e1")
    with store.accounts.counting() as put:
        assert put is not None
        assert not store.recount.run()
    store.artifact_path("e1").unlink()
    store.recount.ask()
    wait_for(lambda: store.accounts.stored_bytes(A) == 0)
    keep(store, "e2")
    store.artifact_path("e2").unlink()
    store.recount.ask()
    wait_for(lambda: store.accounts.stored_bytes(A) == 0)
    store.recount.close()
    wait_for(lambda: not any(thread.name == "receiver-recount" for thread in threading.enumerate()))
    store.recount.ask()


def test_where_no_thread_is_to_be_had_the_next_who_asks_is_counted_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, "e1")
    store.artifact_path("e1").unlink()
    with monkeypatch.context() as short:

        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        short.setattr(threading.Thread, "start", start)
        store.recount.ask()
    store.recount.ask()
    wait_for(lambda: store.accounts.stored_bytes(A) == 0)
    store.recount.close()


def test_counting_ends_when_it_is_told_to_and_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recount_module, "_TURN_S", -1.0)
    size = keep(store, "e1")
    store.artifact_path("e1").unlink()
    keep(store, "e2", "")
    store.recount.close()
    with pytest.raises(InterruptedError):
        store.recount.run()
    assert store.accounts.stored_bytes(A) == size


def test_a_store_that_cannot_be_read_is_said_and_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recount_module, "_PAUSE_S", 0.0)
    keep(store, "e1")
    owned = store._receipts.owned

    def fails(episode: str) -> tuple[str, int]:
        monkeypatch.setattr(store._receipts, "owned", owned)
        raise OSError(errno.EIO, os.strerror(errno.EIO), episode)

    monkeypatch.setattr(store._receipts, "owned", fails)
    store.artifact_path("e1").unlink()
    keep(store, "e2", "")
    with caplog.at_level(logging.ERROR):
        store.recount.ask()
        wait_for(lambda: "cannot be counted now" in caplog.text)
    store.recount.ask()
    wait_for(lambda: store.accounts.stored_bytes(A) == 0)
    store.recount.close()
