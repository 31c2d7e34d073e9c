"""Uploads in the making: what a stale memory, a disk that fails, or an odd order of requests may not do to them."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from receiver_process import make_artifact

from fastship import durable
from fastship.receiver.policy import answers
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.ending import Ending
from fastship.receiver.store.store import Store
from fastship.receiver.uploads import sweep
from fastship.receiver.uploads.lock import Superseded
from fastship.receiver.uploads.uploads import LengthMismatch, UnknownUpload, Uploads, WrongOffset
from fastship.settings import ReceiverSettings


def make_uploads(tmp_path: Path) -> Uploads:
    """Each call is another process on the same root."""
    return Store(ReceiverSettings(root=str(tmp_path / "root"))).uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return make_uploads(tmp_path)


def declared(data: bytes, **more: object) -> Declared:
    known = {"episode": "e", "sha256": hashlib.sha256(data).hexdigest(), "length": len(data)}
    return Declared(**{**known, **more})  # type: ignore[arg-type]


def send(uploads: Uploads, data: bytes, piece: bytes) -> str:
    """Create the upload of ``data`` and append ``piece`` in a request of its own, as HTTP does it."""
    uploads.create(declared(data)).close()
    upload = uploads.take(uploads.token(declared(data)))
    upload.partial.write([piece])
    upload.tell()
    uploads.remember(upload)
    upload.close()
    return upload.token


def test_a_digest_remembered_of_an_upload_that_was_cancelled_elsewhere_is_not_used(
    uploads: Uploads, tmp_path: Path
) -> None:
    """Process A remembers the digest of right bytes; B forgets the upload and takes as many wrong ones in its stead."""
    data = b"0123456789"
    token = send(uploads, data, data)
    elsewhere = make_uploads(tmp_path)
    elsewhere.cancel(token)
    send(elsewhere, data, b"xxxxxxxxxx")
    upload = uploads.take(token)
    assert upload.partial.digest() == hashlib.sha256(b"xxxxxxxxxx").hexdigest()
    upload.close()


def test_nothing_is_remembered_of_an_upload_that_ended(uploads: Uploads) -> None:
    upload = uploads.create(declared(b"x"))
    upload.partial.write([b"x"])
    with upload.exclusive():
        uploads.end(upload, None)
    uploads.remember(upload)
    upload.close()
    assert not uploads._running


def test_an_append_at_a_wrong_offset_declares_no_length(uploads: Uploads) -> None:
    unknown = declared(b"x" * 20, length=None)
    uploads.create(unknown).close()
    upload = uploads.take(uploads.token(unknown))
    with pytest.raises(LengthMismatch):
        uploads.declare_length(upload, -1)
    uploads.declare_length(upload, 20)
    with pytest.raises(LengthMismatch):
        uploads.declare_length(upload, 15)
    assert upload.declared.length == 20
    upload.close()
    assert uploads.look(upload.token).length == 20


def test_an_upload_whose_part_is_gone_has_ended(uploads: Uploads) -> None:
    """So stands one whose publishing was cut by a crash after its name was given."""
    token = send(uploads, b"0123", b"01")
    (uploads._directory / f"{token}.part").unlink()
    with pytest.raises(UnknownUpload):
        uploads.look(token)
    upload = uploads.create(declared(b"0123"))
    assert upload.partial.offset == 0
    upload.close()


@pytest.mark.parametrize("when", ["tell", "look", "take"])
def test_bytes_that_failed_to_sync_are_never_told(uploads: Uploads, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Linux reports a lost write to one fsync only; the next one says that all is well (fsync(2), Errors)."""
    data = b"0123456789"
    upload = uploads.create(declared(data))
    upload.partial.write([data[:5]])
    real, failures = os.fdatasync, [OSError(errno.EIO, "Input/output error")]

    def fails_once(fd: int) -> None:
        if failures and os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            raise failures.pop()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    calls: dict[str, Callable[[], object]] = {
        "tell": upload.tell,
        "look": lambda: uploads.look(upload.token),
        "take": lambda: uploads.take(upload.token),
    }
    with pytest.raises(OSError, match="Input/output"):
        calls[when]()
    with pytest.raises(UnknownUpload):
        uploads.look(upload.token)
    with pytest.raises(Superseded):
        upload.partial.write([b"more"])
    upload.close()
    again = uploads.create(declared(data))
    assert again.partial.offset == 0
    again.close()


def test_a_request_that_is_late_takes_nothing_over(uploads: Uploads) -> None:
    """An append that was sent twice on its way, or held up, comes while the next one is being written."""
    data = b"0123456789"
    token = send(uploads, data, b"012")
    upload = uploads.take(token, offset=3)
    upload.partial.write([b"34"])
    for late in (0, 3, 9):
        with pytest.raises(WrongOffset) as found:
            uploads.take(token, offset=late)
        assert found.value.offset == 5
    upload.partial.write([b"56789"])  # it is this one's still
    assert upload.partial.digest() == declared(data).sha256
    upload.close()


def test_a_late_request_disturbs_no_append_with_a_digest_of_its_own(uploads: Uploads) -> None:
    token = send(uploads, b"0123456789", b"012")
    upload = uploads.take(token, offset=3)
    upload.hold(3)
    upload.partial.write([b"34"])
    with pytest.raises(WrongOffset):
        uploads.take(token, offset=5)  # its bytes do not count yet
    upload.hold(-1)
    assert upload.tell() == 5
    newer = uploads.take(token, offset=5)
    assert newer.partial.offset == 5
    upload.close()
    newer.close()


def test_what_others_will_send_is_known_without_reading_every_record_again(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        uploads.create(declared(b"x" * 100, episode=f"e{number}")).close()
    assert uploads.declared_bytes() == 2000
    reads: list[Path] = []
    real = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert uploads.declared_bytes() == 2000
    make_uploads(tmp_path).create(declared(b"x" * 50, episode="elsewhere")).close()
    reads.clear()
    assert uploads.declared_bytes(fresh=True) == 2050
    assert len(reads) <= 1
    uploads.cancel(uploads.token(declared(b"x" * 100, episode="e3")))
    assert uploads.declared_bytes(fresh=True) == 1950


def test_an_upload_of_an_episode_that_is_stored_promises_room_for_an_hour_only(uploads: Uploads) -> None:
    stale, fresh = declared(b"x" * 100, episode="stored"), declared(b"y" * 100, episode="stored")
    open_still = declared(b"z" * 100, episode="not stored")
    for each in (stale, fresh, open_still):
        uploads.create(each).close()
    for each in (stale, open_still):
        for kind in ("json", "part"):
            path = uploads._directory / f"{uploads.token(each)}.{kind}"
            os.utime(path, (path.stat().st_mtime - 7200,) * 2)
    assert uploads.held("", fresh=True) == (3, 300, 3)
    uploads.sweep(lambda episode: episode == "stored")
    assert uploads.held("", fresh=True) == (2, 200, 2)
    assert uploads.declared_bytes(fresh=True) == 100  # of the one of which something came within the hour
    with pytest.raises(UnknownUpload):
        uploads.look(uploads.token(stale))
    assert uploads.look(uploads.token(fresh)).offset == uploads.look(uploads.token(open_still)).offset == 0


def test_a_one_shot_of_which_nothing_came_is_not_kept(uploads: Uploads) -> None:
    uploads.keep(declared(b"x" * 100), uploads.one_shot(declared(b"x" * 100)))
    assert uploads.declared_bytes(fresh=True) == 0


def test_an_artifact_that_cannot_be_read_stops_no_mending(tmp_path: Path) -> None:
    store = Store(ReceiverSettings(root=str(tmp_path / "root")))
    (store.root / "episodes" / "bad.tar.zst").mkdir()  # reading it is an error of the system
    (store.root / "episodes" / "good.tar.zst").write_bytes(make_artifact("good"))
    stale = store.uploads.one_shot()
    stale.close()
    os.utime(stale.path, (0, 0))
    store.mend()
    assert (store.root / "episodes" / "good.receipt.json").exists()
    assert not stale.path.exists()


# --- power losses and names --------------------------------------------------------------------------------------

RESUMED: dict[str, Callable[[Uploads, str], object]] = {
    "look": lambda uploads, token: uploads.look(token),
    "take": lambda uploads, token: uploads.take(token),
    "create": lambda uploads, token: uploads.create(declared(b"0123456789")).close(),
}


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("how", RESUMED)
def test_a_published_part_is_never_touched_again(tmp_path: Path, how: str, record: bool) -> None:
    """Of what publishing removes a power loss gives back what it likes; the rest of the upload had not been told of."""
    data = b"0123456789"
    uploads = make_uploads(tmp_path)
    token = send(uploads, data, data[:4])
    part = uploads._directory / f"{token}.part"
    artifact = tmp_path / "root" / "episodes" / "e.tar.zst"
    with part.open("ab") as file:
        file.write(data[4:])
    os.link(part, artifact)
    if not record:
        (uploads._directory / f"{token}.json").unlink()
    after = make_uploads(tmp_path)
    after._boot = "another"
    try:
        RESUMED[how](after, token)
    except UnknownUpload:
        assert how != "create"
    else:
        assert how == "create"
        assert after.look(token).offset == 0
    assert artifact.read_bytes() == data
    assert artifact.stat().st_nlink == (1 if record or how == "create" else 2)


def test_a_creation_forgets_how_an_older_upload_of_its_token_ended(uploads: Uploads) -> None:
    """Also where it finds one begun: a power loss may have brought the older end back."""
    data = b"0123456789"
    token = send(uploads, data, data[:4])
    (uploads._ended / f"{token}.json").write_bytes(b'{"offset":10,"length":10,"ended":{"status":400}}')
    assert uploads.ended(token) is not None
    uploads.create(declared(data)).close()
    assert uploads.ended(token) is None
    assert uploads.look(token).offset == 4


class Died(BaseException):
    """The process was killed here."""


def test_names_that_a_killed_process_did_not_sync_are_synced_before_an_offset_is_told(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"0123456789"
    synced: list[Path] = []

    def die(path: Path) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_directory", die)
        with pytest.raises(Died):
            uploads.create(declared(data))
    assert (uploads._directory / f"{uploads.token(declared(data))}.json").exists()
    after = make_uploads(tmp_path)
    monkeypatch.setattr(durable, "sync_directory", lambda path: synced.append(path))
    send(after, data, data[:4])
    assert synced == [after._directory]


def test_a_kept_body_whose_new_name_was_not_synced_counts_only_once_it_is(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"0123456789"
    token = send(uploads, data, data[:2])
    partial = uploads.one_shot(declared(data))
    partial.write([data[:7]])

    def die(path: Path) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_directory", die)
        with pytest.raises(Died):
            uploads.keep(declared(data), partial)
    assert (uploads._directory / f"{token}.part").read_bytes() == data[:7]
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", lambda path: synced.append(path))
    after = make_uploads(tmp_path)
    synced.clear()
    assert after.look(token).offset == 2
    assert synced == [after._directory]


def test_an_end_before_the_declared_length_tells_only_of_what_is_durable(tmp_path: Path) -> None:
    store = Store(ReceiverSettings(root=str(tmp_path / "root")))
    upload = store.uploads.create(declared(b"0123456789"))
    upload.partial.write([b"0123"])
    answer = Ending(store).finish(upload)
    assert isinstance(answer, Answer)
    assert ("Upload-Offset", "4") in answer.fields
    assert upload._lock.read().synced == 4
    upload.close()


def test_a_clock_that_jumps_forgets_no_upload(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"0123456789"
    token = send(uploads, data, data[:5])
    (uploads._directory / ".tmp-in-use").touch()
    assert uploads.sweep() == 0
    now = time.time()
    for years in (3, -5, 30):
        wall = now + years * 366 * 86400.0
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        assert uploads.sweep() == 0
        assert make_uploads(uploads._directory.parent.parent).sweep() == 0  # nor does another process
    assert uploads.look(token).offset == 5


def test_what_a_clock_left_in_the_future_is_of_now(uploads: Uploads) -> None:
    token = send(uploads, b"0123456789", b"01234")
    for path in uploads._directory.glob(f"{token}.*"):
        os.utime(path, (time.time() + 1e9,) * 2)
    assert uploads.sweep() == 0
    assert all(path.stat().st_mtime <= time.time() for path in uploads._directory.glob(f"{token}.*"))


def test_tombstones_are_bounded(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MOST_TOMBSTONES", 2)
    for number in range(4):
        upload = uploads.create(declared(b"x", episode=f"e{number}"))
        with upload.exclusive():
            uploads.end(upload, answers.digest_mismatch("it was not"))
        upload.close()
        path = uploads._ended / f"{upload.token}.json"
        os.utime(path, (path.stat().st_mtime - 100 * (4 - number),) * 2)
    assert uploads.sweep() == 2
    left = [uploads.ended(uploads.token(declared(b"x", episode=f"e{number}"))) is not None for number in range(4)]
    assert left == [False, False, True, True]


def test_cancelling_takes_an_upload_with_the_tombstone_that_a_crash_left_beside_it(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = uploads.create(declared(b"x" * 10))
    with monkeypatch.context() as crash, upload.exclusive():
        crash.setattr(uploads, "_remove", lambda _token: None)
        uploads.end(upload, Answer(201, {}))
    upload.close()
    uploads.cancel(upload.token)
    with pytest.raises(UnknownUpload):
        uploads.look(upload.token)
    with pytest.raises(UnknownUpload):
        uploads.cancel(upload.token)


def test_an_upload_is_its_owners(uploads: Uploads) -> None:
    mine = msgspec.structs.replace(declared(b"x" * 10), owner="name:a")
    token = uploads.token(mine)
    uploads.create(mine).close()
    assert uploads.token(msgspec.structs.replace(mine, owner="name:b")) != token
    for act in (uploads.take, uploads.look, uploads.cancel):
        with pytest.raises(UnknownUpload):
            act(token, "name:b")
    assert uploads.look(token, "name:a").offset == 0
    uploads.take(token, "name:a").close()
    uploads.cancel(token, "name:a")
