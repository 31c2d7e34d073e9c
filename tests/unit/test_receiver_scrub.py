"""A whole store, read again: in which order, how much of memory, and beside whom."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import pytest
from receiver_process import make_artifact

from fastship.errors import ReceiverError
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store import scrub as scrub_module
from fastship.receiver.store.scrub import Scrub, Unchecked
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings


@pytest.fixture
def settings(tmp_path: Path) -> ReceiverSettings:
    return ReceiverSettings(root=str(tmp_path / "root"))


def keep(store: Store, episode: str, checked_ns: int) -> Path:
    data = make_artifact(episode, 500)
    partial = store.uploads.one_shot()
    partial.write([data])
    sha256 = hashlib.sha256(data).hexdigest()
    assert isinstance(store.publish(partial, Declared(episode=episode, sha256=sha256, length=len(data))), tuple)
    partial.close()
    store.note_checked(episode, checked_ns)
    return store.artifact_path(episode)


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 16]) + data[201:])


def order(scrub: Scrub) -> list[str]:
    return [found.episode for found in scrub.run()]


def test_the_longest_unread_is_read_first_and_each_once(
    settings: ReceiverSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub_module, "_TOGETHER", 2)
    store = Store(settings)
    for number, name in enumerate(("c", "a", "d", "b", "e")):
        keep(store, name, 1000 + number)
    assert order(Scrub(settings)) == ["c", "a", "d", "b", "e"]
    os.utime(store.episodes / "b.receipt.json", ns=(5, 5))
    assert order(Scrub(settings))[0] == "b"


def test_an_interrupted_one_is_gone_on_with(settings: ReceiverSettings) -> None:
    store = Store(settings)
    for number in range(6):
        keep(store, f"e{number}", 1000 + number)
    run = Scrub(settings).run()
    assert [next(run).episode for _ in range(2)] == ["e0", "e1"]
    run.close()
    assert order(Scrub(settings))[:4] == ["e2", "e3", "e4", "e5"]


def test_what_rotted_is_told_and_set_aside_or_kept(settings: ReceiverSettings) -> None:
    store = Store(settings)
    for number in range(4):
        keep(store, f"e{number}", 1000 + number)
    spoil(store.artifact_path("e1"))
    kept = {one.episode: one for one in Scrub(settings, keep=True).run()}
    assert not isinstance(kept["e1"], Unchecked)
    assert (kept["e1"].verdict, kept["e1"].set_aside) == ("rotted", "")
    found = {one.episode: one for one in Scrub(settings).run()}
    assert not isinstance(found["e1"], Unchecked)
    assert found["e1"].set_aside == "rotted/e1.tar.zst"
    assert order(Scrub(settings)) == ["e0", "e2", "e3"]


def test_what_cannot_be_checked_now_is_told(settings: ReceiverSettings) -> None:
    store = Store(settings)
    path = keep(store, "busy", 1)
    keep(store, "free", 2)
    (store.episodes / "link.tar.zst").symlink_to(path)
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    found = {one.episode: one for one in Scrub(settings).run()}
    os.close(fd)
    assert found["busy"] == Unchecked("busy", "somebody else is reading it")
    assert isinstance(found["link"], Unchecked)
    assert not isinstance(found["free"], Unchecked)


def test_an_artifact_without_a_receipt_gets_one(settings: ReceiverSettings) -> None:
    store = Store(settings)
    (store.episodes / "by-hand.tar.zst").write_bytes(make_artifact("by-hand"))
    (found,) = Scrub(settings).run()
    assert not isinstance(found, Unchecked)
    assert found.verdict == "mended"
    assert store.receipt("by-hand") is not None
    (again,) = Scrub(settings).run()
    assert not isinstance(again, Unchecked)
    assert again.verdict == "sound"


@pytest.mark.parametrize("made", [(), ("episodes",)])
def test_what_is_no_root_is_not_made_one(tmp_path: Path, made: tuple[str, ...]) -> None:
    root = tmp_path / "elsewhere"
    root.mkdir()
    for name in made:
        (root / name).mkdir()
    with pytest.raises(ReceiverError, match="is not a receiver's root") as caught:
        Scrub(ReceiverSettings(root=str(root)))
    assert "--root" in caught.value.remedy
    assert [path.name for path in root.iterdir()] == list(made)


def test_reading_can_be_stopped(settings: ReceiverSettings) -> None:
    keep(Store(settings), "e", 1)
    scrub = Scrub(settings, bytes_per_s=1.0)
    with pytest.raises(InterruptedError):
        list(scrub.run(stopped=lambda: True))
