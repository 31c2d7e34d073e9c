"""Artifacts read again: what is sound, mended, rotted; and how what rotted is set aside."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from receiver_process import make_artifact

from fastship.episode import Receipt
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.custody import Custody, Finding, Pace
from fastship.receiver.store.store import Prepared, Store
from fastship.settings import ReceiverSettings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(ReceiverSettings(root=str(tmp_path / "root")))


def keep(store: Store, episode: str = "e", seed: int = 0) -> bytes:
    """Store an artifact the ordinary way."""
    data = make_artifact(episode, seed=seed)
    partial = store.uploads.one_shot()
    partial.write([data])
    sha256 = hashlib.sha256(data).hexdigest()
    assert isinstance(store.publish(partial, Declared(episode=episode, sha256=sha256, length=len(data))), tuple)
    partial.close()  # and with it its flock
    return data


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def check(store: Store, episode: str = "e", *, leave: bool = False) -> Finding:
    found = Custody(store, keep=leave).check(episode)
    assert found is not None
    return found


def change_receipt(store: Store, **changes: object) -> None:
    path = store.episodes / "e.receipt.json"
    receipt = msgspec.json.decode(path.read_bytes())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            receipt[section][key] = value
        else:
            receipt[section] = value
    path.write_bytes(msgspec.json.encode(receipt))


def test_a_sound_artifact_is_found_sound_and_when_it_was_read_is_noted(store: Store) -> None:
    data = keep(store)
    os.utime(store.episodes / "e.receipt.json", ns=(1, 1))
    found = check(store)
    assert (found.verdict, found.error, found.set_aside) == ("sound", "", "")
    assert found.receipt is not None
    assert found.receipt.content is not None
    assert found.artifact_sha256 == hashlib.sha256(data).hexdigest() == found.receipt.artifact.sha256
    assert found.content_blake3 == found.receipt.content.blake3
    assert found.artifact_bytes == len(data)
    assert (found.read_from == "disk") == (found.cached_bytes == 0)
    assert store.checked_ns("e") > 1


def test_what_is_not_stored_is_not_found(store: Store) -> None:
    assert Custody(store).check("nobody") is None


def test_what_rotted_is_set_aside_and_its_id_is_free(store: Store) -> None:
    data = keep(store)
    flip(store.artifact_path("e"), len(data) // 2)
    found = check(store)
    assert found.verdict == "rotted"
    assert "its receipt says" in found.error
    assert found.set_aside == "rotted/e.tar.zst"
    assert (store.root / found.set_aside).stat().st_size == len(data)
    reason = json.loads((store.root / "rotted" / "e.reason.json").read_bytes())
    assert reason["error"] == found.error
    assert reason["receipt"]["artifact"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert os.listdir(store.episodes) == []
    assert store.receipt("e") is None
    keep(store)
    assert check(store).verdict == "sound"
    flip(store.artifact_path("e"), len(data) // 2)
    assert check(store).set_aside == "rotted/e~1.tar.zst"  # the older one is not replaced


class Stop(BaseException):
    """The process ends here."""


def test_what_rotted_is_in_one_place_with_its_reason_wherever_it_is_stopped(tmp_path: Path) -> None:
    """At each call that changes something: the next one finds it, and the id comes free with nothing lost."""
    changing = ("write", "fsync", "rename", "unlink", "mkdir", "utime")
    stop_at, ended = 0, False
    while not ended:
        store = Store(ReceiverSettings(root=str(tmp_path / str(stop_at))))
        data = keep(store)
        flip(store.artifact_path("e"), len(data) // 2)
        rotten = store.artifact_path("e").read_bytes()
        made = 0

        def counted(real: Callable[..., object], limit: int = stop_at) -> Callable[..., object]:
            def call(*args: object, **more: object) -> object:
                nonlocal made
                if made >= limit:
                    raise Stop
                made += 1
                return real(*args, **more)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in changing:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                check(store)
                ended = True
            except Stop:
                pass
        stored, aside = store.artifact_path("e"), store.root / "rotted" / "e.tar.zst"
        assert stored.exists() != aside.exists(), stop_at
        assert (stored if stored.exists() else aside).read_bytes() == rotten
        if aside.exists():
            assert json.loads((store.root / "rotted" / "e.reason.json").read_bytes())["verdict"] == "rotted"
        Custody(Store(ReceiverSettings(root=str(store.root)))).check("e")
        assert aside.read_bytes() == rotten
        assert store.receipt("e") is None
        keep(store)
        assert check(store).verdict == "sound"
        stop_at += 1
    assert stop_at > 6


def test_what_a_killed_scrub_was_writing_goes_when_it_is_old(store: Store) -> None:
    keep(store)
    flip(store.artifact_path("e"), 100)
    Custody(store).check("e")
    files = sorted(os.listdir(store.root / "rotted"))
    left = store.root / "rotted" / ".tmp-f.reason.json.123"
    left.write_bytes(b"{")
    store.mend()
    assert left.exists()  # somebody may be writing it now
    old_s = time.time() - 30 * 86400
    os.utime(left, (old_s, old_s))
    Store(ReceiverSettings(root=str(store.root))).mend()
    assert sorted(os.listdir(store.root / "rotted")) == files


def test_what_rotted_is_only_told_of_where_it_is_to_stay(store: Store) -> None:
    data = keep(store)
    flip(store.artifact_path("e"), len(data) // 2)
    found = check(store, leave=True)
    assert (found.verdict, found.set_aside) == ("rotted", "")
    assert store.artifact_path("e").exists()


def test_every_bit_of_an_artifact_counts(store: Store) -> None:
    data = keep(store)
    path = store.artifact_path("e")
    for at in [*range(24), *range(24, len(data), len(data) // 40), *range(len(data) - 8, len(data))]:
        for bit in range(8):
            flip(path, at, bit)
            found = check(store, leave=True)
            # A bit that no decoder looks at leaves the content right: told of, and the receipt follows the bytes.
            assert found.verdict in ("rotted", "mended"), (at, bit)
            flip(path, at, bit)
            assert check(store, leave=True).verdict in ("sound", "mended")
    assert check(store).verdict == "sound"


@pytest.mark.parametrize(
    "changes",
    [
        {"artifact__sha256": "0" * 64},
        {"artifact__bytes": 1},
        {"content__blake3": "0" * 64},
        {"content": 7},
    ],
)
def test_a_spoilt_receipt_is_made_again_and_the_artifact_stays(store: Store, changes: dict[str, object]) -> None:
    data = keep(store)
    before = store.receipt("e")
    assert before is not None
    change_receipt(store, **changes)
    found = check(store)
    assert found.verdict == "mended"
    assert "receipt" in found.error
    after = store.receipt("e")
    assert after is not None
    assert (after.artifact, after.content) == (before.artifact, before.content)
    assert store.artifact_path("e").read_bytes() == data
    assert check(store).verdict == "sound"


def test_without_a_receipt_what_cannot_be_unpacked_has_rotted(store: Store) -> None:
    data = keep(store)
    (store.episodes / "e.receipt.json").unlink()
    assert check(store).verdict == "mended"
    (store.episodes / "e.receipt.json").unlink()
    flip(store.artifact_path("e"), len(data) // 2)
    found = check(store)
    assert (found.verdict, found.set_aside) == ("rotted", "rotted/e.tar.zst")
    assert "cannot be unpacked" in found.error


def test_what_is_being_stored_now_is_sound(store: Store) -> None:
    """Between the artifact's name and the receipt's."""
    data = make_artifact("e")
    partial = store.uploads.one_shot()
    partial.write([data])
    prepared = store.prepare(partial, Declared(episode="e"))
    assert not isinstance(prepared, Answer)
    store.sync(prepared)
    assert store.name(prepared) is None
    with pytest.raises(BlockingIOError):
        Custody(store).check("e", wait=False)
    fcntl.flock(partial.fd, fcntl.LOCK_UN)
    assert check(store).verdict == "sound"
    store.sync_names()
    store.settle(prepared)
    prepared.close()
    assert sorted(os.listdir(store.episodes)) == ["e.receipt.json", "e.tar.zst"]


def test_a_name_that_is_set_aside_while_another_is_published_is_free_for_it(store: Store) -> None:
    data = keep(store)
    partial = store.uploads.one_shot()
    partial.write([data])
    declared = Declared(episode="e", sha256=hashlib.sha256(data).hexdigest(), length=len(data))
    receipt = store.receipt("e")
    assert receipt is not None
    waiting = store._receipts.waiting("e", os.fstat(partial.fd).st_ino)
    prepared = Prepared(partial, declared, receipt, waiting)
    real = store.receipt

    def set_aside_first(episode: str) -> Receipt | None:
        store.receipt = real  # type: ignore[method-assign]
        flip(store.artifact_path("e"), len(data) // 2)
        assert check(store).set_aside
        return real(episode)

    store.receipt = set_aside_first  # type: ignore[method-assign]
    assert store.name(prepared) is None
    store.sync_names()
    store.settle(prepared)
    prepared.close()
    assert store.artifact_path("e").read_bytes() == data
    assert check(store).verdict == "sound"


def test_an_artifact_that_cannot_be_read_has_rotted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store)
    real, refused = os.pread, []

    def fail(fd: int, length: int, offset: int) -> bytes:
        if length > 100:
            refused.append(offset)
            raise OSError(5, "Input/output error")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", fail)
    found = check(store)
    assert (found.verdict, found.artifact_sha256) == ("rotted", "")
    assert "Input/output error" in found.error
    assert len(refused) == 2  # once more, before it is believed


def test_a_bad_moment_of_the_memory_is_no_rot(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store)
    real = os.pread
    times: list[int] = []

    def spoil_once(fd: int, length: int, offset: int) -> bytes:
        data = real(fd, length, offset)
        if length > 100 and not times:
            times.append(offset)
            return data[:50] + bytes([data[50] ^ 1]) + data[51:]
        return data

    monkeypatch.setattr(os, "pread", spoil_once)
    assert check(store).verdict == "sound"
    assert times


def test_one_at_a_time_reads_an_artifact(store: Store) -> None:
    keep(store)
    fd = os.open(store.artifact_path("e"), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        Custody(store).check("e", wait=False)
    with pytest.raises(InterruptedError):
        Custody(store).check("e", stopped=lambda: True)
    threading.Timer(0.2, os.close, [fd]).start()
    assert check(store).verdict == "sound"


def test_a_reading_can_be_stopped(store: Store) -> None:
    keep(store)
    with pytest.raises(InterruptedError):
        Custody(store).check("e", stopped=lambda: True)


def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    pace = Pace(1000.0)
    for _ in range(4):
        pace.wait(500, lambda: False)
    assert sum(slept) == pytest.approx(2.0)
    Pace().wait(1 << 40, lambda: False)
    assert sum(slept) == pytest.approx(2.0)


@pytest.mark.parametrize("verify", ["content", "artifact"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_cut_artifact_has_rotted_whoever_asked_for_its_receipt_before(
    tmp_path: Path, verify: Literal["content", "artifact"], asked: bool
) -> None:
    """A receipt that was made again from what is left would call it sound for ever."""
    store = Store(ReceiverSettings(root=str(tmp_path / "root"), verify=verify))
    data = keep(store)
    written = (store.episodes / "e.receipt.json").read_bytes()
    os.truncate(store.artifact_path("e"), len(data) // 2)
    if asked:
        for _ in range(2):
            told = store.receipt("e")
            assert told is not None
            assert told.artifact.sha256 == hashlib.sha256(data[: len(data) // 2]).hexdigest()
        store.mend()
    assert (store.episodes / "e.receipt.json").read_bytes() == written
    found = check(store)
    assert found.verdict == "rotted"
    assert found.receipt is not None
    assert found.receipt.artifact.bytes == len(data)
    assert store.receipt("e") is None
    assert keep(store) == data


def test_an_artifact_that_cannot_be_unpacked_and_lost_its_receipt_is_given_no_other(store: Store) -> None:
    keep(store)
    flip(store.artifact_path("e"), 1000)
    (store.episodes / "e.receipt.json").unlink()
    assert store.receipt("e") is not None
    assert not (store.episodes / "e.receipt.json").exists()
    assert check(store).verdict == "rotted"


def test_what_was_only_doubtful_is_read_again_when_it_is_another(store: Store) -> None:
    data = keep(store)
    os.truncate(store.artifact_path("e"), 100)
    doubtful = store.receipt("e")
    assert doubtful is not None
    assert doubtful.verified == "artifact"
    store.artifact_path("e").write_bytes(data)
    receipt = store.receipt("e")
    assert receipt is not None
    assert (receipt.artifact.bytes, receipt.verified) == (len(data), "content")
