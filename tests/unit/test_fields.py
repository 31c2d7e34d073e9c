"""HTTP fields: what is written is read again, and nothing that a peer sends raises."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship import fields

HELLO = hashlib.sha256(b"hello").hexdigest()
VALUE = f"sha-256=:{base64.b64encode(bytes.fromhex(HELLO)).decode()}:"


def test_rfc_9530_example() -> None:
    """Appendix B.1: `{"hello": "world"}` and a newline."""
    digest = hashlib.sha256(b'{"hello": "world"}\n').hexdigest()
    value = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
    assert fields.format_digest("sha-256", digest) == value
    assert fields.parse_digest(value, "sha-256") == digest


@pytest.mark.parametrize(
    "value",
    [
        VALUE,
        f"  {VALUE}  ",
        f"sha-512=:AAAA:, {VALUE}",
        f"{VALUE},md5=:AAAA:",
        f"{VALUE};q=1, x",
        f"blake3=:////:,{VALUE};a;b=2",
        f"sha-256=:AAAA:, {VALUE}",  # RFC 9651, 4.2.2: the last one counts
    ],
)
def test_digests_that_are_read(value: str) -> None:
    assert fields.parse_digest(value, "sha-256") == HELLO


@pytest.mark.parametrize(
    "value",
    [
        None, "", "sha-256", "sha-256=", "sha-256=abc", 'sha-256="abc"', "sha-256=:abc", "sha-256=:a:", "sha-256=:*:",
        "SHA-256=:AAAA:", "sha-512=:AAAA:", "sha-256=:AA=A:", "sha-256=:====:", ",,,", f"x{VALUE}", f"{VALUE}x",
    ],
)  # fmt: skip
def test_digests_that_are_none(value: str | None) -> None:
    assert fields.parse_digest(value, "sha-256") is None


@given(st.binary(max_size=64), st.sampled_from(["sha-256", "blake3", "sha-512"]))
def test_a_digest_comes_back(digest: bytes, algorithm: str) -> None:
    assert fields.parse_digest(fields.format_digest(algorithm, digest.hex()), algorithm) == digest.hex()


@pytest.mark.parametrize(("value", "read"), [("?1", True), ("?0", False), (" ?1 ", True), ("?1;a=b", True)])
def test_booleans(value: str, read: bool) -> None:
    assert fields.parse_boolean(value) is read
    assert fields.parse_boolean(fields.format_boolean(read)) is read


@pytest.mark.parametrize("value", [None, "", "1", "true", "?", "?2", "?1?1", "?1,?0", "\\?1"])
def test_what_is_no_boolean(value: str | None) -> None:
    assert fields.parse_boolean(value) is None


@pytest.mark.parametrize(("value", "read"), [("0", 0), ("007", 7), (" 12 ", 12), ("5;a=1", 5), ("9" * 15, 10**15 - 1)])
def test_integers(value: str, read: int) -> None:
    assert fields.parse_integer(value) == read


@pytest.mark.parametrize(
    "value", [None, "", "-1", "+1", "1.0", "1e3", "0x1", "9" * 16, "1 2", "1,2", "٣", "1_000", "²"]
)
def test_what_is_no_integer(value: str | None) -> None:
    assert fields.parse_integer(value) is None


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True), st.integers(0, 10**15 - 1), max_size=6))
def test_limits_come_back(limits: dict[str, int]) -> None:
    assert fields.parse_limits(fields.format_limits(limits)) == limits


def test_odd_limits_drop_out() -> None:
    assert fields.parse_limits("max-size=10, max-age=x, , a, =, expires=-1, min-size = 3;p=1") == {
        "max-size": 10,
        "min-size": 3,
    }
    assert fields.parse_limits(None) == {}


@given(st.text(max_size=80) | st.text("sha-256=:AZaz09+/;,? ", max_size=80))
def test_nothing_raises(value: str) -> None:
    digest = fields.parse_digest(value, "sha-256")
    assert digest is None or bytes.fromhex(digest).hex() == digest
    assert fields.parse_boolean(value) in (None, True, False)
    number = fields.parse_integer(value)
    assert number is None or 0 <= number < 10**15
    assert all(isinstance(one, int) for one in fields.parse_limits(value).values())
