"""Tokens and commits: files that change while the receiver runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fastship.errors import ReceiverError
from fastship.receiver.access import Access


def test_no_files_let_everybody_in() -> None:
    access = Access("", "")
    assert access.allows(None)
    assert access.commits() is None


def test_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# a comment\n\n  one  \ntwo\n")
    access = Access(str(path), "")
    for value, allowed in (
        ("Bearer one", True),
        ("bearer two", True),
        ("Bearer  two ", True),
        ("Bearer three", False),
        ("Bearer # a comment", False),
        ("Bearer ", False),
        ("Basic one", False),
        ("one", False),
        ("Bearer \xff", False),
        (None, False),
    ):
        assert access.allows(value) is allowed, value


def test_an_empty_list_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# all revoked\n")
    assert not Access(str(path), "").allows("Bearer # all revoked")


def test_a_change_is_in_force_at_once_and_a_lost_file_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text("one")
    access = Access(str(path), "")
    path.write_text("other")
    assert (access.allows("Bearer one"), access.allows("Bearer other")) == (False, True)
    path.unlink()
    with caplog.at_level(logging.ERROR):
        assert access.allows("Bearer other")
        assert access.allows("Bearer other")
    assert len(caplog.records) == 1
    assert "other" not in caplog.text.replace(str(tmp_path), "")
    path.write_text("third")
    assert (access.allows("Bearer other"), access.allows("Bearer third")) == (False, True)


def test_commits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "commits"
    path.write_text(f"# list\n#remediation: first\n# Remediation: second\n{'AB' * 20}  main\nspoilt\n{'cd' * 20}\n")
    commits = Access("", str(path)).commits()
    assert commits is not None
    assert commits.commits == ("ab" * 20, "cd" * 20)
    assert commits.remediation == "first\nsecond"
    assert "spoilt" in caplog.text


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing", binary):
        with pytest.raises(ReceiverError, match=r"receiver\.token_file") as caught:
            Access(str(path), "")
        assert caught.value.remedy
