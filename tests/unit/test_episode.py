"""Ids, the recorder's commit, and that the values survive JSON and msgpack."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample import manifest_of, receipt_of, shipped

from fastship.episode import Manifest, Receipt, Verdict, is_episode_id, read_code_commit
from fastship.errors import EpisodeUnreadable
from fastship.pack import code_commit

COMMIT = "0123456789abcdef0123456789ABCDEF01234567"


@pytest.mark.parametrize("name", ["a", "0", "ep-1_2.3", "A" * 200, "x..y", "ep."])
def test_ids(name: str) -> None:
    assert is_episode_id(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "_a", "a" * 201, "a/b", "a b", "a\n", "\n", "é", "a~1", "a\0", "٣"]
)
def test_what_is_no_id(name: str) -> None:
    assert not is_episode_id(name)


@given(st.text(max_size=210))
def test_an_id_is_one_safe_path_component(name: str) -> None:
    if is_episode_id(name):
        assert os.path.basename(name) == name
        assert name.isascii()
        assert not name.startswith(".")
        assert len(f"{name}.tar.zst.partial") <= 255


@pytest.mark.parametrize("commit", [COMMIT, COMMIT.lower(), COMMIT.upper()])
def test_a_commit_is_lower_cased(tmp_path: Path, commit: str) -> None:
    (tmp_path / "meta.json").write_text(msgspec.json.encode({"code_version": {"commit": commit, "x": 1}}).decode())
    assert read_code_commit(tmp_path) == COMMIT.lower()


MALFORMED = [
    b"", b"{", b"null", b"[]", b'"text"', b"{}", b'{"code_version": null}', b'{"code_version": []}',
    b'{"code_version": "x"}', b'{"code_version": {}}', b'{"code_version": {"commit": null}}',
    b'{"code_version": {"commit": 1234567890123456789012345678901234567890}}',
    b'{"code_version": {"commit": "%s"}}' % COMMIT[:39].encode(),
    b'{"code_version": {"commit": "%s0"}}' % COMMIT.encode(),
    b'{"code_version": {"commit": "%s\\n"}}' % COMMIT.encode(),
    b'{"code_version": {"commit": "%sg"}}' % COMMIT[:39].encode(),
    b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"notes": "%s", "code_version": {"commit": "%s"}}' % (b"x" * (1 << 20), COMMIT.encode()),  # too long to be one
]  # fmt: skip


@pytest.mark.parametrize("raw", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_commit_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "meta.json").write_bytes(raw)
    assert read_code_commit(tmp_path) is None


def test_a_missing_or_strange_meta_is_none(tmp_path: Path) -> None:
    assert read_code_commit(tmp_path) is None
    assert read_code_commit(tmp_path / "nothing") is None
    (tmp_path / "meta.json").mkdir()
    assert read_code_commit(tmp_path) is None
    (tmp_path / "meta.json").rmdir()
    os.mkfifo(tmp_path / "meta.json")  # nobody writes: it must not wait
    assert read_code_commit(tmp_path) is None


def test_a_meta_that_cannot_be_read_now_is_no_missing_one(tmp_path: Path) -> None:
    """Without its commit the episode would be sent, refused and quarantined for what is the host's trouble."""
    (tmp_path / "meta.json").write_bytes(msgspec.json.encode({"code_version": {"commit": COMMIT}}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_code_commit(tmp_path)
        with pytest.raises(EpisodeUnreadable, match=r"meta\.json"):
            code_commit(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_code_commit(tmp_path) == code_commit(tmp_path) == COMMIT.lower()


@given(st.binary(max_size=200))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "meta.json").write_bytes(raw)
    commit = read_code_commit(directory)
    assert commit is None or re.fullmatch("[0-9a-f]{40}", commit)


def test_values_survive_json_and_msgpack() -> None:
    manifest = manifest_of("ep")
    for value in (manifest, receipt_of(manifest), shipped(manifest)):
        kind: type[Manifest | Receipt | Verdict] = type(value)
        assert msgspec.json.decode(msgspec.json.encode(value), type=kind) == value
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind) == value
