"""What was found, in sentences: the bottleneck, the choice, and the settings file that ``--write`` makes.

What always holds: pure functions of values. Imports `model` and ``settings``; ``tune`` imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastship.settings import format_size
from fastship.tune.model import CORES, LINK, NEAR, OUTBOX, READING, Prediction

_HELD_BACK_BY = {
    READING: "reading the episodes from their disk",
    OUTBOX: "writing artifacts to the outbox",
    LINK: "the link to the destination",
}


def tell_rate(bytes_per_s: float) -> str:
    """``512.3e6`` -> ``512 MB/s``."""
    rate = bytes_per_s / 1e6
    return f"{rate:.0f} MB/s" if rate >= 99.5 else f"{rate:.3g} MB/s"


def tell_link(bytes_per_s: float) -> str:
    """As links are named: ``12.5e6`` -> ``100 Mbit/s``."""
    rate = bytes_per_s * 8 / 1e6
    return f"{rate / 1000:.3g} Gbit/s" if rate >= 1000 else f"{rate:.3g} Mbit/s"


def parse_link(text: str) -> float:
    """``100Mbit/s``, ``1Gbit``, ``12.5MB/s`` -> bytes a second. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([kMG]?)(bit|B)(?:/s)?\s*", text)
    rate = float(match[1]) * 1000 ** " kMG".index(match[2] or " ") / (8 if match[3] == "bit" else 1) if match else 0.0
    if rate <= 0:
        raise ValueError("100Mbit/s, 1Gbit/s, 12MB/s")
    return rate


def tell_bottleneck(one: Prediction, cores: float) -> str:
    """One sentence: what holds a prediction back, and what would be next."""
    next_limit = one.next_limit
    if one.bottleneck == CORES:
        what = f"the {cores:.3g} cores that it gets, of whose time zstd takes {100 * one.zstd_share:.0f} %"
    else:
        what = _HELD_BACK_BY[one.bottleneck]
    after = f", and next {_short(next_limit[0])}, at {tell_rate(next_limit[1])}" if next_limit else ""
    return f"the bottleneck is {what}{after}"


def tell_prediction(one: Prediction, cores: float) -> str:
    """``level 3 delivers 512 MB/s end to end at ratio 3.91; the bottleneck is ...``"""
    unknown = "" if LINK in one.limits else f", if the link takes {tell_link(one.bytes_per_s / one.ratio)}"
    delivered = f"level {one.level} ({one.ratio:.2f}x) delivers {tell_rate(one.bytes_per_s)} end to end{unknown}"
    return f"{delivered}; {tell_bottleneck(one, cores)}"


def tell_choice(chosen: Prediction, levels: Sequence[Prediction]) -> str:
    """Two sentences: why this level, and why not the next one."""
    most = max(levels, key=lambda one: one.bytes_per_s)
    if chosen.level == most.level:
        first = f"Level {chosen.level} delivers most, {tell_rate(chosen.bytes_per_s)}"
    else:
        first = (
            f"Level {most.level} delivers most, {tell_rate(most.bytes_per_s)}, and level {chosen.level} is within"
            f" {100 * (1 - NEAR):.0f} % of it with smaller artifacts"
        )
    held = "the cores hold it back" if chosen.bottleneck == CORES else f"{_short(chosen.bottleneck)} holds it back"
    smaller = [one for one in levels if one.ratio > chosen.ratio]
    if not smaller:
        return f"{first}. It is held back by {_short(chosen.bottleneck)}, and no level that was measured packs smaller."
    following = min(smaller, key=lambda one: one.ratio)
    saved = 100 * (1 - chosen.ratio / following.ratio)
    return (
        f"{first}; {held}. Level {following.level} would make artifacts {saved:.0f} % smaller and deliver"
        f" {tell_rate(following.bytes_per_s)}, {100 * (1 - following.bytes_per_s / chosen.bytes_per_s):.0f} % less."
    )


def _short(limit: str) -> str:
    return {CORES: "the cores", READING: "reading", OUTBOX: "the outbox", LINK: "the link"}[limit]


def settings_toml(comments: Sequence[str], values: Mapping[str, Mapping[str, Any]]) -> str:
    """A settings file that `fastship.settings` reads back; keys that end in ``_bytes`` as sizes."""
    lines = [f"# {line}" for line in comments]
    for section, keys in values.items():
        lines += ["", f"[{section}]"]
        for key, value in keys.items():
            if isinstance(value, str):
                text = json.dumps(value)  # a TOML basic string, too
            elif key.endswith("_bytes") and not format_size(value).isdigit():
                text = f'"{format_size(value)}"'
            else:
                text = str(value)
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"
