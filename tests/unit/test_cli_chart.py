"""A chart fits its width, shows every point, and can be read without colour."""

from __future__ import annotations

import pytest

from fastship.cli.chart import ASCII, UNICODE, Point, Signs, chart

POINTS = [
    Point(600, 3.4, "1", False),
    Point(400, 3.5, "3", True),
    Point(40, 3.9, "12", False),
    Point(4, 4.6, "19", False),
]


def lines(points: list[Point], width: int = 70, signs: Signs = UNICODE) -> list[str]:
    return chart(points, width=width, height=12, signs=signs, x_title="MB/s packed", y_title="RATIO")


@pytest.mark.parametrize("width", [40, 79, 100])
@pytest.mark.parametrize("signs", [UNICODE, ASCII])
def test_every_point_is_there_within_the_width(width: int, signs: Signs) -> None:
    drawn = lines(POINTS, width, signs)
    assert max(map(len, drawn)) <= width
    text = "\n".join(drawn)
    assert f"{signs.marked}3" in text
    for label in ("1", "12", "19"):
        assert f"{signs.point}{label}" in text


def test_better_is_up_and_to_the_right() -> None:
    drawn = lines(POINTS)

    def place(sign: str) -> tuple[int, int]:
        return next((line.index(sign), -row) for row, line in enumerate(drawn) if sign in line)

    assert place("○19")[0] < place("○12")[0] < place("●3")[0]
    assert place("○19")[1] > place("○12")[1] > place("●3")[1]


@pytest.mark.parametrize("count", [1, 3])
def test_points_at_one_place_are_drawn_beside_each_other(count: int) -> None:
    drawn = "\n".join(lines([Point(100, 1.0, str(number), number == 0) for number in range(count)]))
    assert all(str(number) in drawn for number in range(count))


def test_ascii_is_ascii() -> None:
    assert "\n".join(lines(POINTS, signs=ASCII)).isascii()
