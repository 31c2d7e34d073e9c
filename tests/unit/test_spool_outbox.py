"""Artifacts in the outbox: what is believed, and what is removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest
from sample import manifest_of, put_artifact

from fastship import durable
from fastship.episode import Manifest
from fastship.spool import Outbox, Spool, is_intact


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool")
    made.create()
    return made


def place(outbox: Outbox, data: bytes, manifest: Manifest) -> None:
    outbox.artifact(manifest.episode).write_bytes(data)
    outbox.manifest(manifest.episode).write_bytes(msgspec.json.encode(manifest))


def test_a_committed_artifact_is_found(spool: Spool) -> None:
    manifest = put_artifact(spool, "ep", b"data")
    assert spool.outbox.peek("ep") == spool.outbox.find("ep") == manifest
    assert sorted(os.listdir(spool.paths.outbox)) == ["ep.manifest.json", "ep.tar.zst"]


def test_a_new_one_replaces_the_old(spool: Spool) -> None:
    put_artifact(spool, "ep", b"old!")
    manifest = put_artifact(spool, "ep", b"new!")
    assert spool.outbox.find("ep") == manifest
    assert spool.outbox.artifact("ep").read_bytes() == b"new!"


def test_what_an_interrupted_packing_left_is_there_to_be_read(spool: Spool) -> None:
    with spool.outbox.begin("ep") as file:
        file.write(b"a longer beginning")
    with spool.outbox.begin("ep") as file:
        assert os.pread(file.fileno(), 100, 0) == b"a longer beginning"
        file.write(b"short")
        file.truncate()
    assert spool.outbox.partial("ep").read_bytes() == b"short"


def test_what_stands_in_the_partials_place_is_replaced_or_told(spool: Spool, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"not ours")
    spool.outbox.partial("ep").symlink_to(elsewhere)
    with spool.outbox.begin("ep") as file:
        file.write(b"ours")
    assert elsewhere.read_bytes() == b"not ours"
    assert spool.outbox.partial("ep").read_bytes() == b"ours"
    spool.outbox.partial("dir").mkdir()
    with pytest.raises(OSError, match=r"dir\.tar\.zst\.partial"):
        spool.outbox.begin("dir")


def test_a_partial_that_cannot_be_used_takes_its_manifest_along(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it would say that the artifact was given up."""
    manifest = put_artifact(spool, "ep")
    os.rename(spool.outbox.artifact("ep"), spool.outbox.partial("ep"))  # a crash in `commit`
    assert spool.outbox._read_manifest("ep") == manifest

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(PermissionError):
            spool.outbox.begin("ep")
    assert spool.outbox.find_given_up("ep") is None


URL, AT = "http://there/v1/uploads/1", "http://there"


def test_an_upload_is_remembered_for_its_destination_and_boot(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = spool.outbox
    assert outbox.find_upload("ep", AT) == ""
    outbox.note_upload("ep", URL, AT)
    assert outbox.find_upload("ep", AT) == URL
    assert outbox.find_upload("ep", "http://elsewhere") == ""
    assert "ep" in outbox.episodes()
    monkeypatch.setattr(durable, "boot_id", lambda: "another")
    assert outbox.find_upload("ep", AT) == ""
    monkeypatch.undo()
    outbox.note_upload("ep", "", AT)
    assert outbox.find_upload("ep", AT) == ""
    outbox.upload_note("ep").write_bytes(b"{damaged")
    assert outbox.find_upload("ep", AT) == ""
    outbox.remove("ep")
    assert outbox.episodes() == set()


def test_an_upload_is_forgotten_with_its_partial_and_kept_with_it(spool: Spool) -> None:
    outbox = spool.outbox
    outbox.note_upload("ep", URL, AT)
    with outbox.begin("ep") as file:
        file.write(b"some")
    assert outbox.find_upload("ep", AT) == ""
    outbox.note_upload("ep", URL, AT)
    outbox.begin("ep").close()
    assert outbox.find_upload("ep", AT) == URL
    assert spool.outbox.find("ep") is None


def test_an_artifact_of_this_boot_is_believed_by_its_size(spool: Spool) -> None:
    manifest = manifest_of("ep", artifact=b"data", boot_id=durable.boot_id())
    place(spool.outbox, b"DATA", manifest)
    assert spool.outbox.find("ep") == manifest


@pytest.mark.parametrize("boot_id", ["", "another-boot"])
def test_an_artifact_of_another_boot_is_digested_first(spool: Spool, boot_id: str) -> None:
    manifest = manifest_of("ep", artifact=b"data", boot_id=boot_id)
    place(spool.outbox, b"data", manifest)
    assert spool.outbox.find("ep") == manifest
    place(spool.outbox, b"dat\0", manifest)  # the right size, and zeros: a power loss
    assert spool.outbox.find("ep") is None
    assert spool.outbox.peek("ep") == manifest


def test_what_does_not_fit_together_is_not_found(spool: Spool) -> None:
    outbox = spool.outbox
    assert outbox.find("ep") is None
    manifest = manifest_of("ep", artifact=b"data")
    for data in (b"dat", b"data+", b""):
        place(outbox, data, manifest)
        assert outbox.find("ep") is None
    place(outbox, b"data", manifest_of("other", artifact=b"data"))
    os.rename(outbox.artifact("other"), outbox.artifact("ep"))
    os.rename(outbox.manifest("other"), outbox.manifest("ep"))
    assert outbox.find("ep") is None, "the manifest of another episode"
    place(outbox, b"data", manifest)
    for raw in (b"", b"{", b"{}", b"\xff"):
        outbox.manifest("ep").write_bytes(raw)
        assert outbox.find("ep") is None
    place(outbox, b"data", manifest)
    outbox.artifact("ep").unlink()
    assert outbox.find("ep") is None


def test_is_intact(tmp_path: Path) -> None:
    manifest = manifest_of("ep", artifact=b"data")
    (tmp_path / "a").write_bytes(b"data")
    assert is_intact(tmp_path / "a", manifest)
    (tmp_path / "a").write_bytes(b"date")
    assert not is_intact(tmp_path / "a", manifest)
    assert not is_intact(tmp_path / "nothing", manifest)
    assert not is_intact(tmp_path, manifest)


def test_what_was_given_up_for_room_leaves_its_manifest(spool: Spool) -> None:
    manifest = put_artifact(spool, "ep", b"data")
    assert spool.outbox.find_given_up("ep") is None
    spool.outbox.note_upload("ep", "http://upload", "here")
    spool.outbox.give_up("ep")
    assert os.listdir(spool.paths.outbox) == ["ep.manifest.json"]
    assert spool.outbox.find("ep") is None
    assert spool.outbox.find_given_up("ep") == manifest
    with spool.outbox.begin("ep"):  # it is packed again
        assert spool.outbox.find_given_up("ep") is None


def test_what_could_not_be_given_its_name_is_not_taken_for_given_up(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for at the receiver, which never had it, and packed only after that."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    manifest = put_artifact(spool, "ep", b"data")
    spool.outbox.remove("ep")
    spool.outbox.begin("ep").close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space"):
            spool.outbox.commit(manifest)
    assert spool.outbox.find_given_up("ep") is None
    spool.outbox.drop_partial("ep")
    assert os.listdir(spool.paths.outbox) == []
    put_artifact(spool, "ep", b"data")
    spool.outbox.drop_partial("ep")
    assert spool.outbox.find("ep") is not None


def test_what_was_given_up_stays_so_where_packing_was_not_even_begun(spool: Spool) -> None:
    """An episode that cannot be read now is packed by nobody; once it can, the receiver is asked by this manifest."""
    manifest = put_artifact(spool, "ep")
    spool.outbox.give_up("ep")
    spool.outbox.drop_partial("ep")
    assert spool.outbox.find_given_up("ep") == manifest


def test_what_one_worker_did_not_write_to_its_end_goes_alone(spool: Spool) -> None:
    put_artifact(spool, "ep")
    before = set(os.listdir(spool.paths.outbox))
    for name in (".tmp-ep.upload.json.123", ".tmp-ep2.upload.json.123", ".tmp-ep.upload.json.1123", "ep.upload.json"):
        (spool.paths.outbox / name).touch()
    spool.outbox.drop_temporaries(123)
    assert set(os.listdir(spool.paths.outbox)) == {*before, ".tmp-ep.upload.json.1123", "ep.upload.json"}


def test_removing_takes_all_of_one_and_may_be_repeated(spool: Spool) -> None:
    for name in ("ep", "ep.tar", "ep-2"):
        put_artifact(spool, name)
        spool.outbox.begin(name).close()
    for _ in range(2):
        spool.outbox.remove("ep")
        assert spool.outbox.episodes() == {"ep.tar", "ep-2"}
    assert len(os.listdir(spool.paths.outbox)) == 6


def test_only_files_of_ours_count_as_episodes(spool: Spool) -> None:
    for name in ("README", ".tmp-ep.manifest.json.12", "x.tar", "a.tar.zst", "b.tar.zst.partial", "c.manifest.json"):
        (spool.paths.outbox / name).touch()
    assert spool.outbox.episodes() == {"a", "b", "c"}
