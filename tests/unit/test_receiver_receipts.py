"""Receipts as files: written, waiting, spoilt, and of an artifact of another length."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_one_that_waits_goes_to_the_artifact_of_its_inode(receipts: Receipts, tmp_path: Path) -> None:
    with open(tmp_path / "e.tar.zst", "rb") as file:
        receipts.waiting("e", os.fstat(file.fileno()).st_ino + 1).write_bytes(b"another's")
        receipts.place("e", file.fileno())
        assert receipts.read("e") is None
        receipts.waiting("e", os.fstat(file.fileno()).st_ino).write_bytes(encode(RECEIPT))
        receipts.place("e", file.fileno())
    assert receipts.read("e") == RECEIPT
