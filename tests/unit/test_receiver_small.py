"""Small artifacts stored together: what befalls one is no other's, and nobody is answered too early."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import random
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from fastship import durable
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import OVERLOADED, Body, Declared
from fastship.receiver.store.small import Small, SmallStore
from fastship.receiver.store.store import Store
from fastship.receiver.uploads.lock import UploadLock
from fastship.settings import ReceiverSettings

WAIT_S = 30


def make_artifact(seed: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("e/data")
        info.size = 2000
        tar.addfile(info, io.BytesIO(random.Random(seed).randbytes(2000)))
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def small(episode: str, data: bytes, sha256: str | None = None, body_sha256: str | None = None) -> Small:
    said = sha256 or hashlib.sha256(data).hexdigest()
    return Small(
        Declared(episode=episode, sha256=said, length=len(data)), None, Body(length=len(data), sha256=body_sha256), data
    )


class Gate:
    """Holds the thread at the first decision, so that what is submitted meanwhile is stored together."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def decide(self, declared: Declared, _commit: str | None) -> Answer | None:
        self.opened.wait(WAIT_S)
        return OVERLOADED if declared.episode == "refused" else None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(ReceiverSettings(root=str(tmp_path / "root")))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def together(store: Store, gate: Gate) -> Iterator[SmallStore]:
    together = SmallStore(store, gate.decide, threads=1)
    yield together
    gate.opened.set()
    together.close()


def store_all(together: SmallStore, gate: Gate, smalls: list[Small]) -> list[Answer]:
    """The first goes alone; the others wait for it and then go together."""
    answered = [together.submit(one) for one in smalls]
    gate.opened.set()
    return [one.result(WAIT_S) for one in answered]


def files(store: Store) -> set[str]:
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


def test_each_gets_its_own_answer(together: SmallStore, gate: Gate, store: Store) -> None:
    one, other = make_artifact(1), make_artifact(2)
    answered = store_all(
        together,
        gate,
        [
            small("first", one),
            small("a", one),
            small("refused", one),
            small("wrong", one, sha256="0" * 64),
            small("body", one, body_sha256="0" * 64),
            small("body2", one, body_sha256=hashlib.sha256(one).hexdigest()),
            small("none", b"not an artifact"),
            small("twice", one),
            small("twice", one),
            small("twice", other),
            small("a", one),
        ],
    )
    assert [answer.status for answer in answered] == [201, 201, 503, 400, 400, 201, 422, 201, 200, 409, 200]
    stored = {"first", "a", "body2", "twice"}
    assert files(store) == {f"episodes/{name}.{kind}" for name in stored for kind in ("tar.zst", "receipt.json")} | {
        "secret"
    }
    for name in stored:
        assert store.artifact_path(name).read_bytes() == one
        receipt = store.receipt(name)
        assert receipt is not None
        assert receipt.artifact.sha256 == hashlib.sha256(one).hexdigest()


def test_many_share_the_syncs_of_the_directory(
    together: SmallStore, gate: Gate, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = []
    real = durable.sync_directory

    def sync(path: Path) -> None:
        syncs.append(path)
        real(path)

    monkeypatch.setattr(durable, "sync_directory", sync)
    answered = store_all(together, gate, [small(f"e{number}", make_artifact(number)) for number in range(50)])
    assert [answer.status for answer in answered] == [201] * 50
    assert len(syncs) < 10
    assert len(files(store)) == 101


def test_what_was_not_synced_is_not_named(
    together: SmallStore, gate: Gate, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, [0]

    def fail(fd: int) -> None:
        calls[0] += 1
        if "one-" in os.readlink(f"/proc/self/fd/{fd}") and calls[0] > 3:
            raise OSError(errno.EIO, "lost")
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    answered = store_all(together, gate, [small(name, make_artifact(1)) for name in ("first", "a", "b")])
    assert [answer.status for answer in answered] == [201, 500, 500]
    assert files(store) == {"episodes/first.tar.zst", "episodes/first.receipt.json", "secret"}


def test_nobody_is_told_of_a_name_that_may_be_lost(
    together: SmallStore, gate: Gate, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(durable, "sync_directory", fail)
    one = make_artifact(1)
    answered = store_all(together, gate, [small("a", one), small("b", one), small("b", one), small("b", b"x")])
    assert [answer.status for answer in answered] == [500, 500, 500, 422]
    monkeypatch.undo()
    assert not [name for name in files(store) if name.endswith((".receipt.json", ".part"))]
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", synced.append)
    assert together.submit(small("a", one)).result(WAIT_S).status == 200  # it has its name, which is synced now
    assert synced == [store.root / "episodes"]


def test_an_upload_of_it_that_somebody_asks_about_goes_as_soon_as_that_is_done(
    together: SmallStore, gate: Gate, store: Store
) -> None:
    one = small("a", make_artifact(1))
    begun = store.uploads.create(one.declared)
    begun.close()
    gate.opened.set()
    with contextlib.closing(UploadLock(store.root / "uploads" / f"{begun.token}.lock")) as lock, lock.locked():
        assert together.submit(one).result(WAIT_S).status == 201  # and waits for nobody
        assert together.submit(small("b", make_artifact(2))).result(WAIT_S).status == 201
        assert f"uploads/{begun.token}.part" in files(store)
    end = time.monotonic() + WAIT_S
    while (left := {name for name in files(store) if name.startswith("uploads/")}) and time.monotonic() < end:
        time.sleep(0.001)
    assert left == set()


def test_an_error_that_nobody_foresaw_is_one_artifacts_own(
    together: SmallStore, gate: Gate, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.prepare

    def fail(partial: object, declared: Declared) -> object:
        if declared.episode == "a":
            raise RuntimeError
        return real(partial, declared)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "prepare", fail)
    answered = store_all(together, gate, [small(name, make_artifact(1)) for name in ("first", "a", "b")])
    assert [answer.status for answer in answered] == [201, 500, 201]
    assert not list((store.root / "uploads").glob("one-*"))
