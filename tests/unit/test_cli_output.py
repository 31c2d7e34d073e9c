"""What the command line prints: amounts, names, tables."""

from __future__ import annotations

import json
import os
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.cli import output


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (123_456, "123 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (5_000_000_000_000, "5.0 TB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert output.format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.254, "0.25 s"), (12.3, "12 s"), (59.7, "1:00"), (75, "1:15"), (3700, "1:01:40"), (200_000, "2 d 7 h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert output.format_seconds(seconds) == text


def test_a_rate_or_ratio_of_nothing_is_a_dash() -> None:
    assert output.format_rate(10, 0) == output.format_rate(0, 10) == output.format_ratio(5, 0) == "-"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain name.txt", "plain name.txt"),
        ("grün".encode(), "grün"),
        (b"a\nb\tc\\d", "a\\nb\\tc\\\\d"),
        (b"\xff.bin", "\\377.bin"),
        (b"\x1b[31mred", "\\033[31mred"),
        ("\u202egnp.exe".encode(), "\\342\\200\\256gnp.exe"),
        (b"\xc2\x9b2J", "\\302\\2332J"),  # U+009B: a control sequence introducer of one character
    ],
)
def test_names_cannot_speak_to_the_terminal(name: bytes, text: str) -> None:
    assert output.printable(name) == text


def unescape(shown: str) -> bytes:
    """The inverse of `printable`, written apart from it."""
    found = bytearray()
    at = 0
    while at < len(shown):
        if shown[at] != "\\":
            found += shown[at].encode()
            at += 1
        elif shown[at + 1] in "ntr\\":
            found += {"n": b"\n", "t": b"\t", "r": b"\r", "\\": b"\\"}[shown[at + 1]]
            at += 2
        else:
            found.append(int(shown[at + 1 : at + 4], 8))
            at += 4
    return bytes(found)


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))
def test_printable_names_are_one_line_and_reversible(name: bytes) -> None:
    shown = output.printable(name)
    assert not any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in shown)
    assert unescape(shown) == name


def test_lines_of_a_body_stay_lines_without_escapes() -> None:
    assert output.printable_lines("do:\n\tgit pull\x1b[2J") == "do:\n\tgit pull\\033[2J"


def test_a_table_on_a_pipe_is_aligned_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_table(["NAME", "N"], [["x" * 300, "7"], ["two\nlines", "1234"]], right=frozenset({1}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NAME  ")
    assert lines[1] == "x" * 300 + "     7"
    assert lines[2].split() == ["two", "lines", "1234"]
    assert len(lines) == 3


def test_json_is_ascii_and_holds_undecodable_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\xc3\xbc")
    output.write_json({"name": name})
    text = capsys.readouterr().out
    assert text.isascii()
    assert os.fsencode(json.loads(text)["name"]) == b"\xff\xc3\xbc"


def test_a_line_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        output.write_line("grün")  # would raise UnicodeEncodeError


@pytest.mark.parametrize("columns", [20, 38, 60, 120])
def test_no_column_vanishes_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.write_table(["EPISODE", "RAW", "VERDICT"], [["first-one", "125 kB", "equal"]], right=frozenset({1}))
    shown = capsys.readouterr().out
    for part in ("EPISODE", "RAW", "VERDICT", "first-one", "125 kB", "equal"):
        assert part in shown
