"""Sizes and times as people write them: ``8MiB``, ``500ms``."""

from __future__ import annotations

import re
from decimal import Decimal


def format_size(size: int) -> str:
    """``8388608`` -> ``8MiB``: the shortest exact form that `Settings.load` reads back."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def format_duration(seconds: float) -> str:
    """``300.0`` -> ``5min``: the shortest exact form that `Settings.load` reads back."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds and seconds % factor == 0:
            return f"{seconds // factor:.0f}{unit}"
    if 0 < seconds < 1 and (seconds * 1000).is_integer():
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.12g}s"


def parse_size(text: str) -> int:
    """``8MiB`` -> 8388608; decimal units are powers of 1000, ``/s`` may follow. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kKMGT]?)(i?)(B?)(?:/s)?\s*", text)
    if not match or (match[3] and not match[2]):
        raise ValueError("8MiB, 500kB")
    number = Decimal(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    if 0 < number < 1:  # would silently become 0, which often means "no limit"
        raise ValueError("8MiB, 500kB")
    return int(number)


_TIME_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """``30s`` -> 30.0. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(ms|s|min|h|d)?\s*", text)
    if not match:
        raise ValueError("30s, 500ms, 5min, 2h, 7d")
    return float(match[1]) * _TIME_UNITS[match[2] or "s"]
