"""The durable store without HTTP: its promises, one by one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship import durable
from fastship.episode import Receipt
from fastship.errors import ArtifactError, ReceiverError
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.store import ContentMismatch, DigestMismatch, Store
from fastship.receiver.uploads.lock import Busy, Superseded, UploadLock
from fastship.receiver.uploads.partial import Partial
from fastship.receiver.uploads.uploads import LengthMismatch, UnknownUpload, Uploads
from fastship.settings import ReceiverSettings


def make_artifact(seed: int = 0, size: int = 2000) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("e/data")
        info.size = size
        tar.addfile(info, io.BytesIO(random.Random(seed).randbytes(size)))
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def declared(data: bytes, **more: object) -> Declared:
    known = {"episode": "e", "sha256": hashlib.sha256(data).hexdigest(), "length": len(data)}
    return Declared(**{**known, **more})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(ReceiverSettings(root=str(tmp_path / "root")))


def one_shot(store: Store, data: bytes) -> Partial:
    partial = store.uploads.one_shot()
    partial.write([data])
    return partial


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# --- publishing --------------------------------------------------------------------------------------------------


def test_publishing_leaves_artifact_and_receipt_only(store: Store) -> None:
    data = make_artifact()
    partial = one_shot(store, data)
    published = store.publish(partial, declared(data))
    assert isinstance(published, tuple)
    assert published[0]
    assert names(store.root) == {"secret", "episodes/e.tar.zst", "episodes/e.receipt.json"}
    assert store.artifact_path("e").read_bytes() == data
    receipt = store.receipt("e")
    assert receipt == published[1]
    assert (receipt.verified, receipt.artifact.bytes) == ("content", len(data))
    again = store.publish(one_shot(store, data), declared(data))
    assert isinstance(again, Answer)
    assert again.status == 200
    other = make_artifact(1)
    conflict = store.publish(one_shot(store, other), declared(other))
    assert isinstance(conflict, Answer)
    assert conflict.status == 409
    assert store.artifact_path("e").read_bytes() == data


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_what_came_in_one_request_is_believed_as_it_came(store: Store) -> None:
    data = make_artifact()
    published = store.publish(one_shot(store, data), declared(data))
    assert isinstance(published, tuple)
    read = published[1].read
    assert read is not None
    assert (read.artifact, read.content) == ("arriving", "file")


@pytest.mark.parametrize("named", [True, False])
def test_what_lay_on_the_disk_is_read_again_before_it_is_published(store: Store, named: bool) -> None:
    data = make_artifact()
    told = declared(data) if named else declared(data, sha256=None)
    upload = store.uploads.create(told)
    upload.partial.write([data[:1000]])
    upload.tell()
    store.uploads.remember(upload)
    upload.close()
    flip(store.uploads._path(upload.token, "part"), 500)
    upload = store.uploads.take(upload.token)
    assert upload.partial.running is not None
    upload.partial.write([data[1000:]])
    with pytest.raises(DigestMismatch, match="on the receiver's disk"):
        store.publish(upload.partial, told)
    assert names(store.root / "episodes") == set()
    flip(store.uploads._path(upload.token, "part"), 500)
    published = store.publish(upload.partial, told)
    assert isinstance(published, tuple)
    read = published[1].read
    assert read is not None
    assert read.artifact == "file"
    upload.close()


def test_everything_is_read_back_where_that_is_set(tmp_path: Path) -> None:
    store = Store(ReceiverSettings(root=str(tmp_path / "root"), read_back=True))
    data = make_artifact()
    partial = one_shot(store, data)
    flip(partial.path, 500)
    with pytest.raises(DigestMismatch, match="on the receiver's disk"):
        store.publish(partial, declared(data))
    flip(partial.path, 500)
    published = store.publish(partial, declared(data))
    assert isinstance(published, tuple)
    read = published[1].read
    assert read is not None
    assert read.artifact in ("disk", "file")  # a file system in memory has no disk to read from
    partial.close()


def test_what_is_not_as_declared_is_not_published(store: Store) -> None:
    data = make_artifact()
    with pytest.raises(DigestMismatch):
        store.publish(one_shot(store, data), declared(data, sha256="0" * 64))
    with pytest.raises(ContentMismatch):
        store.publish(one_shot(store, data), declared(data, content_blake3="0" * 64))
    with pytest.raises(ContentMismatch):
        store.publish(one_shot(store, data), declared(data, content_bytes=1 << 40))
    with pytest.raises(ArtifactError):
        store.publish(one_shot(store, data), declared(data, content_bytes=1))
    with pytest.raises(ArtifactError):
        store.publish(one_shot(store, data[:-9]), declared(data[:-9]))
    assert store.receipt("e") is None


def test_racing_publishers_give_one_artifact(store: Store) -> None:
    contents = [make_artifact(seed) for seed in range(8)]
    partials = [one_shot(store, data) for data in contents]
    outcomes: list[int] = []
    barrier = threading.Barrier(8)

    def run(index: int) -> None:
        barrier.wait()
        published = store.publish(partials[index], declared(contents[index]))
        outcomes.append(published.status if isinstance(published, Answer) else 201)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [201] + [409] * 7
    receipt = store.receipt("e")
    assert receipt is not None
    assert hashlib.sha256(store.artifact_path("e").read_bytes()).hexdigest() == receipt.artifact.sha256
    assert not list((store.root / "uploads").glob("*.receipt"))


def test_a_lost_receipt_is_made_again(store: Store) -> None:
    data = make_artifact()
    store.publish(one_shot(store, data), declared(data))
    first = store.receipt("e")
    path = store.root / "episodes" / "e.receipt.json"
    assert first is not None
    for spoil in (path.unlink, lambda: path.write_bytes(b""), lambda: path.write_bytes(b"{}")):
        spoil()
        store.mend() if not path.exists() else None
        again = store.receipt("e")
        assert again is not None
        assert (again.artifact, again.content, again.verified) == (first.artifact, first.content, "content")
        assert json.loads(path.read_bytes())["artifact"]["sha256"] == first.artifact.sha256


def test_a_receipt_without_artifact_says_nothing(store: Store) -> None:
    data, other = make_artifact(), make_artifact(1)
    store.publish(one_shot(store, data), declared(data))
    store.artifact_path("e").unlink()
    assert store.receipt("e") is None
    store.publish(one_shot(store, other), declared(other))
    receipt = store.receipt("e")
    assert receipt is not None
    assert receipt.artifact.sha256 == hashlib.sha256(other).hexdigest()


def test_an_fsync_error_publishes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_artifact()
    partial = one_shot(store, data)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            store.publish(partial, declared(data))
    assert store.receipt("e") is None


def test_a_root_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for root in ("", str(file), "/proc/no/such"):
        with pytest.raises(ReceiverError) as caught:
            Store(ReceiverSettings(root=root))
        assert caught.value.remedy


@pytest.mark.parametrize("ask", ["receipt", "kept_receipt"])
def test_nobody_is_told_of_a_name_that_is_not_durable_yet(
    store: Store, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """Another thread, or a process that was killed, gave it and has not synced it: whoever asks syncs it, or fails."""
    data = make_artifact()
    prepared = store.prepare(one_shot(store, data), declared(data))
    assert not isinstance(prepared, Answer)
    store.sync(prepared)
    assert store.name(prepared) is None
    synced: list[Path] = []

    def asked() -> Receipt | None:
        with open(store.artifact_path("e"), "rb") as file:
            return store.receipt("e") if ask == "receipt" else store.kept_receipt("e", file.fileno())

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, "the directory cannot be synced")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_directory", failing)
        with pytest.raises(OSError, match="cannot be synced"):
            asked()
    assert names(store.root) >= {"episodes/e.tar.zst"}
    assert "episodes/e.receipt.json" not in names(store.root)
    monkeypatch.setattr(durable, "sync_directory", lambda path: synced.append(path))
    assert asked() == prepared.receipt
    assert synced == [store.root / "episodes"]
    store.settle(prepared)
    prepared.close()
    assert names(store.root) == {"secret", "episodes/e.tar.zst", "episodes/e.receipt.json"}


# --- uploads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(store: Store) -> Uploads:
    return store.uploads


def test_creation_is_idempotent_across_restarts(store: Store, tmp_path: Path) -> None:
    data = make_artifact()
    first = store.uploads.create(declared(data))
    first.partial.write([data[:10]])
    first.close()
    again = Store(ReceiverSettings(root=str(tmp_path / "root"))).uploads.create(declared(data))
    assert (again.token, again.partial.offset) == (first.token, 10)
    assert again.partial.digest() == hashlib.sha256(data[:10]).hexdigest()
    again.close()
    other = Store(ReceiverSettings(root=str(tmp_path / "elsewhere"))).uploads
    assert other.token(declared(data)) != first.token
    assert store.uploads.token(declared(data, sha256=None)) != store.uploads.token(declared(data, sha256=None))


def test_a_later_request_takes_over(uploads: Uploads) -> None:
    old = uploads.create(declared(b"0123456789"))
    old.partial.write([b"012"])
    assert uploads.look(old.token).offset == 3
    old.partial.write([b"34"])  # a look takes nothing
    new = uploads.take(old.token)
    assert new.partial.offset == 5
    for attempt in (lambda: old.partial.write([b"xx"]), old.tell, lambda: old.hold(0)):
        with pytest.raises(Superseded):
            attempt()
    assert old.partial.offset == 5
    new.partial.write([b"56789"])
    assert new.partial.digest() == hashlib.sha256(b"0123456789").hexdigest()
    assert new.partial.path.read_bytes() == b"0123456789"
    old.close()
    new.close()


def test_the_running_digest_is_used_only_for_its_bytes(uploads: Uploads, tmp_path: Path) -> None:
    first = uploads.create(declared(b"0123456789"))
    first.partial.write([b"0123"])
    uploads.remember(first)
    first.close()
    elsewhere = Store(ReceiverSettings(root=str(tmp_path / "root"))).uploads  # as another process
    second = elsewhere.take(first.token)
    assert second.partial.running is None
    second.partial.write([b"45"])
    second.close()
    third = uploads.take(first.token)
    assert third.partial.running is None
    assert third.partial.digest() == hashlib.sha256(b"012345").hexdigest()
    uploads.remember(third)
    third.close()
    fourth = uploads.take(first.token)
    assert fourth.partial.running is not None
    fourth.close()


def test_after_another_boot_only_what_was_synced_counts(uploads: Uploads) -> None:
    upload = uploads.create(declared(b"x" * 100))
    upload.partial.write([b"x" * 10])
    assert upload.tell() == 10
    upload.partial.write([b"x" * 20])
    upload.close()
    uploads._boot = "another"
    assert uploads.look(upload.token).offset == 10
    again = uploads.take(upload.token)
    assert (again.partial.offset, again.partial.path.stat().st_size) == (10, 10)
    again.close()


def test_a_shorter_file_of_another_boot_is_believed(uploads: Uploads) -> None:
    upload = uploads.create(declared(b"x" * 100))
    upload.partial.write([b"x" * 10])
    upload.tell()
    os.truncate(upload.partial.path, 4)
    upload.close()
    uploads._boot = "another"
    assert uploads.look(upload.token).offset == 4


def test_held_bytes_do_not_count(uploads: Uploads) -> None:
    upload = uploads.create(declared(b"x" * 100))
    upload.partial.write([b"x" * 10])
    upload.hold(10)
    upload.partial.write([b"x" * 20])
    upload.partial.sync()
    assert uploads.look(upload.token).offset == 10
    upload.close()  # as a crash would
    again = uploads.take(upload.token)
    assert (again.partial.offset, again.partial.path.stat().st_size) == (10, 10)
    again.partial.write([b"y"])
    assert uploads.look(upload.token).offset == 11
    again.close()


def test_an_upload_that_is_being_verified_is_busy(uploads: Uploads) -> None:
    upload = uploads.create(declared(b"x"))
    lock = UploadLock(upload.partial.path.with_suffix(".lock"))
    with upload.exclusive(), pytest.raises(Busy), lock.locked(0.05):
        pass
    with lock.locked(0.05):
        pass
    lock.close()
    upload.close()


def test_what_was_declared_last_is_in_force(uploads: Uploads) -> None:
    """Of two lengths of one digest one is wrong, and it may be the older one."""
    upload = uploads.create(declared(b"x" * 10, length=None))
    upload.partial.write([b"x" * 5])
    upload.close()
    for length in (12, 10):
        again = uploads.create(declared(b"x" * 10, length=length))
        assert (again.declared.length, again.partial.offset) == (length, 5)
        again.close()
        assert uploads.look(again.token).length == length
        assert uploads.held_by(declared(b"x" * 10)) == length
    with pytest.raises(LengthMismatch):
        uploads.create(declared(b"x" * 10, length=4)).close()
    again = uploads.create(declared(b"x" * 10, length=None))
    assert (again.declared.length, again.partial.offset) == (10, 5)
    again.close()
    assert uploads.held_by(declared(b"another")) is None


def test_ended_and_cancelled_uploads(uploads: Uploads, store: Store) -> None:
    upload = uploads.create(declared(b"x"))
    upload.partial.write([b"x"])
    with upload.exclusive():
        uploads.end(upload, Answer(201, {"episode": "e"}))
    with pytest.raises(Superseded):
        upload.tell()
    upload.close()
    look = uploads.look(upload.token)
    assert (look.offset, look.ended) == (1, Answer(201, {"episode": "e"}))
    with pytest.raises(UnknownUpload):
        uploads.take(upload.token)
    uploads.cancel(upload.token)
    for call in (uploads.look, uploads.take, uploads.cancel):
        with pytest.raises(UnknownUpload):
            call(upload.token)
        with pytest.raises(UnknownUpload):
            call("../../etc/passwd")
    assert names(store.root) == {"secret"}


def test_keeping_a_cut_one_shot(uploads: Uploads) -> None:
    data = bytes(range(200))

    def keep(count: int) -> None:
        partial = uploads.one_shot(declared(data))
        partial.write([data[:count]])
        uploads.keep(declared(data), partial)
        partial.close()

    keep(100)
    token = uploads.token(declared(data))
    assert uploads.look(token).offset == 100
    keep(50)
    assert uploads.look(token).offset == 100
    keep(150)
    upload = uploads.take(token)
    assert upload.partial.offset == 150
    assert upload.partial.running is not None
    assert upload.partial.digest() == hashlib.sha256(data[:150]).hexdigest()
    upload.close()


def test_sweeping(store: Store, uploads: Uploads) -> None:
    root = store.root / "uploads"
    old = time.time() - 8 * 86400

    def age(path: Path) -> None:
        os.utime(path, (old, old))

    fresh = uploads.create(declared(b"fresh"))
    stale = uploads.create(declared(b"stale", episode="stale"))
    ended = uploads.create(declared(b"ended", episode="ended"))
    with ended.exclusive():
        uploads.end(ended, Answer(201, {}))
    writing, orphan, left = uploads.one_shot(), uploads.one_shot(), uploads.one_shot(declared(b"left"))
    orphan.close()
    left.close()
    for path in (
        *(stale.partial.path.with_suffix(suffix) for suffix in (".json", ".part")),
        root / "ended" / f"{ended.token}.json",
        writing.path,
        orphan.path,
        left.path,
    ):
        age(path)
    for name in (".tmp-left.1", "e.12.receipt", "0" * 64 + ".part"):
        (root / name).write_bytes(b"")
        age(root / name)
    interrupted = [store.root / f"{place}.tmp-{name}" for place in ("", "episodes/") for name in ("old", "young")]
    for path in interrupted:
        path.write_bytes(b"")
        if path.name.endswith("old"):
            age(path)
    store.mend()
    assert [path.name for path in interrupted if path.exists()] == [".tmp-young"] * 2
    kept = {f"{fresh.token}.{kind}" for kind in ("json", "part", "lock")} | {writing.path.name, "clock"}
    assert {path.name for path in root.rglob("*") if path.is_file()} == kept
    with pytest.raises(Superseded):
        stale.partial.write([b"x"])
    for upload in (fresh, stale, ended):
        upload.close()


def test_room_counts_what_others_will_send(store: Store, uploads: Uploads) -> None:
    mine, other = declared(b"mine", length=1 << 30), declared(b"other", length=1 << 40)
    upload = uploads.create(other)
    upload.partial.write([b"x" * 1000])
    upload.close()
    uploads.create(mine).close()
    assert uploads.declared_bytes() == (1 << 30) + (1 << 40) - 1000
    assert uploads.declared_bytes(uploads.token(mine)) == (1 << 40) - 1000
    assert uploads.declared_bytes(uploads.token(other)) == (1 << 30) - 1000
    assert store.room_bytes(uploads.token(mine)) < store.room_bytes(uploads.token(other))


# --- properties --------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 5000), max_size=4)),
        st.tuples(st.sampled_from(["tell", "look", "take", "create", "forget", "sync"]), st.just([])),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_an_offset_never_goes_back_and_any_split_gives_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int]]]
) -> None:
    data = random.Random(1).randbytes(40_000)
    settings = ReceiverSettings(root=str(tmp_path_factory.mktemp("root")))
    store = Store(settings)
    uploads = store.uploads
    upload = uploads.create(declared(data))
    told = 0
    for step, sizes in steps:
        if step == "write":
            end = upload.partial.offset
            chunks = []
            for size in sizes:
                chunks.append(data[end : end + size])
                end = min(len(data), end + size)
            upload.partial.write(chunks)
        elif step in ("take", "create"):
            uploads.remember(upload)
            upload.close()
            upload = uploads.take(upload.token) if step == "take" else uploads.create(declared(data))
        elif step == "forget":  # as after the process died
            upload.close()
            uploads = Store(settings).uploads
            upload = uploads.take(upload.token)
        elif step == "sync":
            upload.partial.sync()
        reached = upload.partial.offset
        if step == "tell":
            reached = upload.tell()
        elif step == "look":
            reached = uploads.look(upload.token).offset
        assert reached >= told
        told = reached
    upload.partial.write([data[upload.partial.offset :]])
    assert upload.partial.path.read_bytes() == data
    assert upload.partial.digest() == hashlib.sha256(data).hexdigest()
    upload.close()


@given(st.lists(st.binary(max_size=300), max_size=2500))
@settings(max_examples=20, deadline=None)
def test_many_chunks_in_one_write(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("partial") / "p"
    partial = Partial(path, os.open(path, os.O_RDWR | os.O_CREAT))
    partial.write(chunks)
    assert path.read_bytes() == b"".join(chunks)
    assert partial.digest() == hashlib.sha256(b"".join(chunks)).hexdigest()
    partial.close()


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., int] = os.pwritev

    def short(fd: int, buffers: list[bytes], offset: int) -> int:
        return real(fd, [b"".join(buffers)[:7]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    path = tmp_path / "p"
    partial = Partial(path, os.open(path, os.O_RDWR | os.O_CREAT))
    chunks = [b"0123456789", b"", b"abc", b"defghijklmnopqrstuvwxyz"]
    partial.write(chunks)
    assert path.read_bytes() == b"".join(chunks)
    partial.close()
