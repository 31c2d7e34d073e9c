"""Copies in ``shipped/``: which there are, and how one goes."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from sample import make_episode, manifest_of, receipt_of

from fastship import durable
from fastship.spool import Shelf, Spool
from fastship.spool.journal import Line


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool")
    made.create()
    return made


def note(spool: Spool, episode: str, wall: str) -> None:
    line = Line(receipt=receipt_of(manifest_of(episode)), retired_at=wall, fingerprint=f"of {episode}")
    durable.append_lines(spool.paths.receipts / f"{wall[:10]}.jsonl", [msgspec.json.encode(line)])


def test_copies_are_the_directories_that_have_a_receipt_the_oldest_first(spool: Spool) -> None:
    shipped = spool.paths.shipped
    for name in ("new", "old", "old~1", "undated", "without", ".retired-gone"):
        make_episode(shipped, name)
    (shipped / "file").touch()
    (shipped / "link").symlink_to("new")
    for episode, wall in (("old", "2025-01-01T00:00:00Z"), ("new", "2026-01-01T00:00:00Z"), ("undated", "2024")):
        note(spool, episode, wall)
    for episode in ("file", "link"):
        note(spool, episode, "2020-01-01T00:00:00Z")
    found = Shelf(spool.paths).copies()
    assert [one.name for one in found] == ["old", "old~1", "new", "undated"]
    assert found[0].bytes == manifest_of("old").content_bytes
    assert found[0].retired_at == 1735689600.0
    assert found[-1].retired_at == float("inf")
    assert found[0].fingerprint == "of old"


def test_one_is_removed_whole_and_its_receipt_stays(spool: Spool) -> None:
    shelf = Shelf(spool.paths)
    for name in ("a", "b"):
        make_episode(spool.paths.shipped, name)
        note(spool, name, "2026-01-01T00:00:00Z")
    os.chmod(spool.paths.shipped / "a" / "sub", 0o500)
    make_episode(spool.paths.shipped, ".retired-a")  # that did not go before
    assert shelf.remove("a")
    assert sorted(os.listdir(spool.paths.shipped)) == [".retired-a", "b"]
    shelf.finish_removals()
    assert os.listdir(spool.paths.shipped) == ["b"]
    assert len(list(spool.paths.receipts.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        shelf.remove("a")
