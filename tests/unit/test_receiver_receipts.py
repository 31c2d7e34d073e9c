"""Receipts as files: written, waiting, spoilt, and of an artifact of another length."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from sample import manifest_of, receipt_of

from fastship.receiver.store.receipts import Receipts, encode

ARTIFACT = b"artifact"
RECEIPT = receipt_of(manifest_of("e", artifact=ARTIFACT))


@pytest.fixture
def receipts(tmp_path: Path) -> Receipts:
    (tmp_path / "e.tar.zst").write_bytes(ARTIFACT)
    return Receipts(tmp_path, tmp_path)


def test_what_was_written_is_read(receipts: Receipts) -> None:
    assert receipts.read("e") is None
    receipts.write(RECEIPT)
    assert receipts.read("e") == receipts.written("e") == RECEIPT
    assert receipts.path("e").read_bytes() == encode(RECEIPT)


def test_of_an_artifact_of_another_length_it_is_only_what_was_written(receipts: Receipts, tmp_path: Path) -> None:
    receipts.write(RECEIPT)
    os.truncate(tmp_path / "e.tar.zst", 3)
    assert receipts.read("e") is None
    assert receipts.written("e") == RECEIPT


def test_one_that_is_spoilt_or_of_another_id_is_none(receipts: Receipts) -> None:
    spoilt = encode(RECEIPT).replace(b'"members": 3', b'"members": 4')
    for data in (spoilt, b"", b"{}", encode(receipt_of(manifest_of("f", artifact=ARTIFACT)))):
        receipts.path("e").write_bytes(data)
        assert receipts.written("e") is None


def test_whose_it_is_stands_in_the_file_alone_and_stays(receipts: Receipts, tmp_path: Path) -> None:
    assert receipts.owned("e") == ("", 0)
    waiting = receipts.waiting("e", os.stat(tmp_path / "e.tar.zst").st_ino)
    waiting.write_bytes(encode(RECEIPT, "name:host-a"))
    assert receipts.owned("e") == ("name:host-a", len(ARTIFACT))
    with open(tmp_path / "e.tar.zst", "rb") as file:
        receipts.place("e", file.fileno())
    receipts.write(RECEIPT)
    assert receipts.owned("e") == ("name:host-a", len(ARTIFACT))
    read = receipts.read("e")
    assert read == RECEIPT
    assert "host-a" not in str(msgspec.to_builtins(read))
    receipts.path("e").write_bytes(encode(RECEIPT))
    assert receipts.owned("e") == ("", len(ARTIFACT))
    receipts.path("e").write_bytes(encode(RECEIPT, "name:host-a").replace(b"host-a", b"host-b"))  # a flipped bit
    assert receipts.owned("e") == ("", 0)
    (tmp_path / "e.tar.zst").unlink()
    assert receipts.owned("f") == ("", 0)


def test_one_that_is_put_in_its_place_just_now_is_found(
    receipts: Receipts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = os.stat(tmp_path / "e.tar.zst").st_ino
    looked_for = receipts.waiting
    receipts.waiting("e", inode).write_bytes(encode(RECEIPT, "name:host-a"))

    def waiting(episode: str, inode: int) -> Path:
        with open(tmp_path / "e.tar.zst", "rb") as file:
            monkeypatch.undo()
            receipts.place(episode, file.fileno())
        return looked_for(episode, inode)

    monkeypatch.setattr(receipts, "waiting", waiting)
    assert receipts.owned("e") == ("name:host-a", len(ARTIFACT))


def test_one_that_waits_goes_to_the_artifact_of_its_inode(receipts: Receipts, tmp_path: Path) -> None:
    with open(tmp_path / "e.tar.zst", "rb") as file:
        receipts.waiting("e", os.fstat(file.fileno()).st_ino + 1).write_bytes(b"another's")
        receipts.place("e", file.fileno())
        assert receipts.read("e") is None
        receipts.waiting("e", os.fstat(file.fileno()).st_ino).write_bytes(encode(RECEIPT))
        receipts.place("e", file.fileno())
    assert receipts.read("e") == RECEIPT
