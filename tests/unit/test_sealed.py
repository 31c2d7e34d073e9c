"""A record is what was written, or it is said to be spoilt, whatever bit of it flips."""

from __future__ import annotations

import json

import msgspec
import pytest

from fastship import sealed

RECORD = b'{"episode":"run-17","sha256":"0123456789abcdef","bytes":3001411}'


def test_a_sealed_record_is_json_that_ends_with_its_seal() -> None:
    data = sealed.seal(RECORD)
    document = json.loads(data)
    assert list(document) == ["episode", "sha256", "bytes", "seal"]
    assert sealed.unseal(data) == RECORD
    assert sealed.unseal(data + b"\n") == RECORD


def test_no_flipped_bit_makes_another_record() -> None:
    data = sealed.seal(RECORD)
    for at in range(len(data)):
        for bit in range(8):
            spoilt = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            try:
                found = msgspec.json.decode(sealed.unseal(spoilt), type=dict[str, object])
            except (sealed.Spoilt, msgspec.MsgspecError, UnicodeDecodeError):
                continue
            found = {name: value for name, value in found.items() if name in ("episode", "sha256", "bytes")}
            assert found == json.loads(RECORD), (at, bit)


def test_a_record_of_before_is_taken_as_it_is() -> None:
    assert sealed.unseal(RECORD) == RECORD
    assert sealed.unseal(b"") == b""


def test_a_cut_record_is_no_record() -> None:
    data = sealed.seal(RECORD)
    for end in range(1, len(data)):
        with pytest.raises((sealed.Spoilt, msgspec.MsgspecError)):
            msgspec.json.decode(sealed.unseal(data[:end]))
