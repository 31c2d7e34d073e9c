"""Tokens and commits: files that change while the receiver runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fastship.errors import ReceiverError
from fastship.receiver.policy.access import Access, Caller, Limits


def test_no_files_let_everybody_in() -> None:
    access = Access("", "")
    assert access.caller(None)
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
        assert (access.caller(value) is not None) is allowed, value


def test_an_empty_list_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# all revoked\n")
    assert not Access(str(path), "").caller("Bearer # all revoked")


def test_a_change_is_in_force_at_once_and_a_lost_file_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text("one")
    access = Access(str(path), "")
    path.write_text("other")
    assert access.caller("Bearer one") is None
    assert access.caller("Bearer other") is not None
    path.unlink()
    with caplog.at_level(logging.ERROR):
        assert access.caller("Bearer other")
        assert access.caller("Bearer other")
    assert len(caplog.records) == 1
    assert "other" not in caplog.text.replace(str(tmp_path), "")
    path.write_text("third")
    assert access.caller("Bearer other") is None
    assert access.caller("Bearer third") is not None


def test_what_may_stand_after_a_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(
        "one  name=host-a  rate=2.5/s uploads=3 upload-bytes=2TB stored-bytes=5TB  # its disk is small\n"
        "two name=host-a # the next one\n"
        "three\n"
        "four # rate=1/s\n"
    )
    usual = Limits(rate=1.0, uploads=7)
    access = Access(str(path), "", b"key", usual)
    one, two, three, four = (access.caller(f"Bearer {token}") for token in ("one", "two", "three", "four"))
    assert one == Caller("name:host-a", Limits(2.5, 3, 2 * 10**12, 5 * 10**12))
    assert two == Caller("name:host-a", usual)
    assert three is not None
    assert four is not None
    assert three.limits == four.limits == usual
    assert three.owner != four.owner
    assert access.several()
    elsewhere = Access(str(path), "", b"another key").caller("Bearer three")
    assert elsewhere is not None
    assert elsewhere.owner != three.owner  # it cannot be made from the token alone


@pytest.mark.parametrize(
    "line",
    [
        "sec-ret nmae=x",
        "sec-ret rate=5",
        "sec-ret rate=-1/s",
        "sec-ret uploads=x",
        "sec-ret upload-bytes=1XB",
        "sec-ret stored-bytes=-1",
        "sec-ret stored-bytes",
        "a sec-ret",
    ],
)
def test_what_cannot_stand_there_is_refused_without_telling_it(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"fine\n{line}\n")
    with pytest.raises(ReceiverError, match="line 2") as caught:
        Access(str(path), "")
    assert caught.value.remedy == "mend what is written there"
    path.write_text("fine\n")
    access = Access(str(path), "")
    path.write_text(f"other\n{line}\n")
    assert access.caller("Bearer fine") is not None
    assert access.caller("Bearer other") is None
    assert "line 2" in caplog.text
    assert "sec-ret" not in caplog.text + str(caught.value)


def test_what_may_be_stored_is_a_names_and_the_most_that_a_line_of_it_says(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(
        "1 name=a stored-bytes=5MB\n2 name=a stored-bytes=7MB\n3 name=b stored-bytes=0\n4 name=b stored-bytes=7MB\n"
        "5 name=c\n6 name=c stored-bytes=1MB\n"
    )
    access = Access(str(path), "", b"key", Limits(stored_bytes=3_000_000))
    assert [access.stored_bytes(f"name:{name}") for name in "abcd"] == [7_000_000, 0, 3_000_000, 0]
    assert access.limits_what_is_stored()
    path.write_text("1 name=a stored-bytes=0\n")
    assert access.caller("Bearer 1") is not None
    assert not access.limits_what_is_stored()
    assert Access("", "").stored_bytes("") == 0


def test_what_is_stored_is_not_limited_without_tokens() -> None:
    with pytest.raises(ReceiverError, match="token_stored_bytes") as caught:
        Access("", "", limits=Limits(stored_bytes=1))
    assert "token_file" in caught.value.remedy


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
