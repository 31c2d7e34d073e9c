"""One-shot bodies beside requests on their upload: the newer has it."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.store import Store
from fastship.receiver.uploads.lock import Busy, Superseded
from fastship.receiver.uploads.partial import Partial
from fastship.receiver.uploads.uploads import Uploads
from fastship.settings import ReceiverSettings

DATA = bytes(range(250))
ALL = Declared(episode="e", sha256=hashlib.sha256(DATA).hexdigest(), length=len(DATA))


def make_uploads(tmp_path: Path) -> Uploads:
    """Each call is another process on the same root."""
    return Store(ReceiverSettings(root=str(tmp_path / "root"))).uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return make_uploads(tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path, uploads: Uploads) -> Uploads:
    return make_uploads(tmp_path)


def begin(uploads: Uploads, count: int) -> Partial:
    partial = uploads.one_shot(ALL)
    partial.write([DATA[:count]])
    return partial


def files(uploads: Uploads) -> list[str]:
    return sorted(path.suffix for path in uploads._directory.rglob("*") if path.is_file())


def test_a_creation_takes_a_body_over_with_its_bytes(uploads: Uploads, elsewhere: Uploads) -> None:
    body = begin(uploads, 100)
    upload = elsewhere.create(ALL)
    assert upload.partial.offset == 100
    with pytest.raises(Superseded):
        body.write([DATA[100:]])
    with pytest.raises(Superseded), body.exclusive():
        pass
    uploads.keep(ALL, body)
    upload.partial.write([DATA[100:]])  # it is this one's still
    assert upload.partial.digest() == ALL.sha256
    upload.close()
    body.close()


def test_an_append_takes_a_body_over_and_goes_on_at_its_own_offset(uploads: Uploads) -> None:
    first = uploads.create(ALL)
    first.partial.write([DATA[:120]])
    body = begin(uploads, 100)
    upload = uploads.take(first.token)
    assert upload.partial.offset == 120
    with pytest.raises(Superseded):
        body.write([b"x"])
    with pytest.raises(Superseded):
        first.partial.write([b"x"])
    for each in (first.partial, upload.partial, body):
        each.close()


def test_the_most_of_several_bodies_counts(uploads: Uploads) -> None:
    bodies = [begin(uploads, count) for count in (50, 200, 100)]
    upload = uploads.create(ALL)
    assert upload.partial.offset == 200
    assert upload.partial.digest() == hashlib.sha256(DATA[:200]).hexdigest()
    for body in bodies:
        with pytest.raises(Superseded):
            body.write([b"x"])
        body.close()
    upload.close()
    assert files(uploads) == [".json", ".lock", ".part"]


def test_a_body_that_is_kept_takes_no_newer_one_over(uploads: Uploads) -> None:
    older, newer = begin(uploads, 50), begin(uploads, 100)
    uploads.keep(ALL, older)
    newer.write([DATA[100:]])
    assert newer.digest() == ALL.sha256
    with newer.exclusive():
        pass
    older.close()
    newer.drop()


def test_a_body_kept_after_the_upload_it_was_taken_for_has_ended_leaves_nothing(uploads: Uploads) -> None:
    body = begin(uploads, 50)
    upload = uploads.create(ALL)
    with upload.exclusive():
        uploads.end(upload, None)
    uploads.keep(ALL, body)
    upload.close()
    body.close()
    assert files(uploads) == []


def test_what_never_was_on_disk_only_begins(uploads: Uploads) -> None:
    first = uploads.create(ALL)
    late = begin(uploads, 100)
    uploads.keep(ALL, late, begin_only=True)
    first.partial.write([DATA[:20]])  # it is this one's still
    first.close()
    uploads.cancel(first.token)
    uploads.keep(ALL, late, begin_only=True)
    assert uploads.look(first.token).offset == 100
    late.close()


def test_a_body_that_is_being_published_is_waited_for(uploads: Uploads, elsewhere: Uploads) -> None:
    body = begin(uploads, len(DATA))
    publishing, published = threading.Event(), threading.Event()

    def publish() -> None:
        with body.exclusive():
            publishing.set()
            published.wait(30)
            os.unlink(body.path)

    thread = threading.Thread(target=publish)
    thread.start()
    publishing.wait(30)
    with pytest.raises(Busy):
        elsewhere.create(ALL, wait_s=0.01)
    published.set()
    thread.join()
    upload = elsewhere.create(ALL)
    assert upload.partial.offset == 0
    upload.close()
    body.close()


def test_a_body_of_more_than_the_upload_may_have_is_not_taken(uploads: Uploads) -> None:
    body = begin(uploads, len(DATA))
    body.write([b"more"])
    upload = uploads.create(ALL)
    assert upload.partial.offset == 0
    upload.close()
    body.close()


def test_a_body_of_another_boot_is_not_taken(uploads: Uploads, elsewhere: Uploads) -> None:
    body = begin(uploads, 100)
    elsewhere._bodies._boot = "another"
    upload = elsewhere.create(ALL)
    assert upload.partial.offset == 0
    upload.close()
    body.drop()


def test_a_body_that_the_disk_did_not_take_is_not_taken_over(
    uploads: Uploads, elsewhere: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = begin(uploads, 100)
    real = os.fdatasync

    def fails(fd: int) -> None:
        if "/bodies/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fails)
    upload = elsewhere.create(ALL)
    assert upload.partial.offset == 0
    with pytest.raises(Superseded):
        body.write([DATA[100:]])
    upload.close()
    body.close()
