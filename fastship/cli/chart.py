"""A chart of points in a terminal: what `tune` shows of its levels.

What always holds: lines of plain text no wider than asked for, in ASCII where the encoding has no more; the marked
point can be told without colour.

Imports nothing of fastship; only ``cli`` imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    x: float  # above 0
    y: float
    label: str
    marked: bool


class Signs(NamedTuple):
    point: str
    marked: str
    corner: str
    across: str
    down: str


UNICODE = Signs("○", "●", "└", "─", "│")
ASCII = Signs("o", "*", "+", "-", "|")

_MARGIN = 7  # of the numbers at the left


def chart(points: Sequence[Point], *, width: int, height: int, signs: Signs, x_title: str, y_title: str) -> list[str]:
    """``points`` over a logarithmic x and a linear y; the labels stand beside them. ``width`` is at least 30."""
    room = width - _MARGIN - 1
    longest = max(len(point.label) for point in points) + 1
    x_scale = _Scale([math.log(point.x) for point in points], room - longest)
    y_scale = _Scale([point.y for point in points], height)
    grid = [[" "] * room for _ in range(height)]
    for point in sorted(points, key=lambda one: not one.marked):  # the marked one has its place for sure
        text = (signs.marked if point.marked else signs.point) + point.label
        column, row = x_scale.place(math.log(point.x)), height - 1 - y_scale.place(point.y)
        for near in (row, row - 1, row + 1, row - 2, row + 2):  # where another one stands there
            if 0 <= near < height and not any(
                cell != " " for cell in grid[near][max(0, column - 1) : column + len(text) + 1]
            ):
                grid[near][column : column + len(text)] = text
                break
    lines = [f"{y_title:>{_MARGIN - 1}}"]
    for number, cells in enumerate(grid):
        value = y_scale.value(height - 1 - number)
        told = f"{value:.2f}" if number in (0, height // 2, height - 1) else ""
        lines.append(f"{told:>{_MARGIN - 1}} {signs.down}{''.join(cells).rstrip()}")
    lines.append(f"{'':{_MARGIN}}{signs.corner}{signs.across * room}")
    lines.append(f"{'':{_MARGIN}} {_axis(x_scale, room, x_title)}")
    return lines


class _Scale:
    """Values on ``cells`` places."""

    def __init__(self, values: Sequence[float], cells: int) -> None:
        self._low, high = min(values), max(values)
        self._span = high - self._low
        self._last = cells - 1

    def place(self, value: float) -> int:
        return round((value - self._low) / self._span * self._last) if self._span else self._last // 2

    def value(self, place: int) -> float:
        return self._low + (place / self._last - (0 if self._span else 0.5)) * (self._span or 1.0)


def _axis(scale: _Scale, room: int, title: str) -> str:
    """Numbers below the axis, as many as have room before the title."""
    cells = [" "] * room
    free = 0
    last = room - len(title) - 1
    for place in range(0, last, max(10, room // 6)):
        text = f"{math.exp(scale.value(place)):.3g}"
        if place >= free and place + len(text) < last:
            cells[place : place + len(text)] = text
            free = place + len(text) + 2
    cells[last + 1 :] = title
    return "".join(cells).rstrip()
