"""Sentences and settings made of figures."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from fastship.tune.model import CORES, LINK, Prediction
from fastship.tune.words import parse_link, settings_toml, tell_choice, tell_link, tell_prediction, tell_rate


def prediction(level: int, ratio: float, cores: float, link: float | None = None) -> Prediction:
    limits = {CORES: cores} | ({} if link is None else {LINK: link * ratio})
    bottleneck = min(limits, key=lambda name: limits[name])
    return Prediction(
        level=level,
        ratio=ratio,
        bytes_per_s=limits[bottleneck],
        bottleneck=bottleneck,
        limits=limits,
        zstd_share=0.8,
    )


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("100Mbit/s", 12.5e6), ("1Gbit", 125e6), ("12.5 MB/s", 12.5e6), ("56kbit/s", 7000), ("8bit/s", 1)],
)
def test_a_link_is_read_in_bits_and_bytes(text: str, bytes_per_s: float) -> None:
    assert parse_link(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize("text", ["", "100", "100Mb/s", "-1Mbit/s", "0Mbit/s", "fast", "1e9bit/s", "1Tbit/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="100Mbit/s"):
        parse_link(text)


def test_rates_have_three_digits() -> None:
    assert [tell_rate(rate) for rate in (1.234e6, 45.67e6, 512.3e6, 1512e6)] == [
        "1.23 MB/s",
        "45.7 MB/s",
        "512 MB/s",
        "1512 MB/s",
    ]
    assert [tell_link(rate) for rate in (1.25e6, 12.5e6, 125e6)] == ["10 Mbit/s", "100 Mbit/s", "1 Gbit/s"]


def test_a_prediction_names_the_bottleneck_and_what_is_next() -> None:
    told = tell_prediction(prediction(3, 4.0, 500e6, 200e6), 1.9)
    assert "500 MB/s" in told
    assert "the 1.9 cores" in told
    assert "next the link, at 800 MB/s" in told
    told = tell_prediction(prediction(3, 4.0, 500e6, 10e6), 1.9)
    assert "40 MB/s" in told
    assert "the bottleneck is the link" in told


def test_without_a_link_it_says_what_the_link_must_take() -> None:
    assert "if the link takes 1 Gbit/s" in tell_prediction(prediction(3, 4.0, 500e6), 2.0)


def test_the_choice_says_what_the_next_level_would_give_and_cost() -> None:
    levels = [prediction(1, 3.0, 600e6), prediction(3, 4.0, 500e6), prediction(9, 5.0, 100e6)]
    assert tell_choice(levels[0], levels) == (
        "Level 1 delivers most, 600 MB/s; the cores hold it back. "
        "Level 3 would make artifacts 25 % smaller and deliver 500 MB/s, 17 % less."
    )
    assert "no level that was measured packs smaller" in tell_choice(levels[2], levels[2:])


def test_settings_are_toml_that_reads_back() -> None:
    values: dict[str, dict[str, Any]] = {"spool": {"root": 'a "b" \\ c'}, "pack": {"level": 3, "frame_bytes": 8 << 20}}
    text = settings_toml(["what it is", "and from when"], values)
    assert text.startswith("# what it is\n# and from when\n")
    assert tomllib.loads(text) == {"spool": {"root": 'a "b" \\ c'}, "pack": {"level": 3, "frame_bytes": "8MiB"}}
