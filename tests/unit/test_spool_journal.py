"""The receipts of a spool, read: the last one counts, and what is spoilt is named."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sample import manifest_of, receipt_of

from fastship.episode import MARKER
from fastship.spool import Journal, Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.create()
    return spool


def retire(spool: Spool, *episodes: str) -> None:
    for episode in episodes:
        (spool.paths.episodes / episode).mkdir()
        (spool.paths.episodes / episode / MARKER).touch()
    manifests = [manifest_of(episode) for episode in episodes]
    assert spool.retire([(one.episode, receipt_of(one), one) for one in manifests]) == {}


def journal_of(spool: Spool) -> Path:
    (path,) = spool.paths.receipts.iterdir()
    return path


def test_receipts_that_cannot_be_looked_for_are_not_taken_for_none(spool: Spool) -> None:
    spool.paths.receipts.rmdir()
    spool.paths.receipts.touch()
    with pytest.raises(NotADirectoryError):  # as where they may not be listed, which stops no root
        Journal(spool.paths.receipts)


def test_each_retired_episode_has_its_line(spool: Spool) -> None:
    retire(spool, "b", "a")
    journal = Journal(spool.paths.receipts)
    assert list(journal.episodes()) == ["a", "b"]
    line = journal.find("a")
    assert line is not None
    assert line.receipt == receipt_of(manifest_of("a"))
    assert line.fingerprint == manifest_of("a").fingerprint
    assert journal.find("c") is None
    assert journal.spoilt == []


def test_lines_of_before_seals_are_read(spool: Spool) -> None:
    path = spool.paths.receipts / "2020-01-01.jsonl"
    old = {"retired_at": "then", "receipt": receipt_of(manifest_of("old")), "fingerprint": "f00d"}
    path.write_bytes(msgspec.json.encode(old) + b"\n")
    line = Journal(spool.paths.receipts).find("old")
    assert line is not None
    assert line.retired_at == "then"


def test_no_flipped_bit_of_a_line_is_taken_for_another_receipt(spool: Spool) -> None:
    retire(spool, "a", "b")
    path = journal_of(spool)
    data = path.read_bytes()
    right = {name: Journal(spool.paths.receipts).find(name) for name in ("a", "b")}
    end = data.index(b"\n")
    for at in range(end):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        journal = Journal(spool.paths.receipts)
        assert journal.find("b") == right["b"]
        assert journal.find("a") in (None, right["a"]), at
        assert set(journal.episodes()) <= {"a", "b"}
        if journal.find("a") is None:
            assert journal.spoilt[0] == f"{path.name}, line 1"


def test_a_torn_line_is_named(spool: Spool) -> None:
    retire(spool, "a")
    path = journal_of(spool)
    with path.open("ab") as file:
        file.write(b'{"retired_at":"2')
    journal = Journal(spool.paths.receipts)
    assert journal.spoilt == [f"{path.name}, line 2"]
    retire(spool, "b")
    assert list(Journal(spool.paths.receipts).episodes()) == ["a", "b"]
