"""The level that is chosen: a pipeline of cores and a link is played through, with every level's true cost and ratio.

What a run is compared with is the best of all fixed levels in the same pipeline.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.frames import LevelChoice
from fastship.pack.level import UNKNOWN_LEVEL, Flow, LevelControl, level_without_link

FRAME = 8 << 20
READ_S = 0.003  # a frame, from the page cache

MIX = {
    1: (2.4, 3.42),
    3: (3.9, 3.33),
    6: (9.9, 3.63),
    9: (17.5, 3.72),
    12: (43.6, 3.75),
    15: (272, 3.78),
    19: (431, 4.59),
}
TEXT = {
    1: (2.0, 5.0),
    3: (3.0, 6.0),
    6: (9.0, 7.5),
    9: (20.0, 8.0),
    12: (60.0, 8.1),
    15: (250.0, 8.4),
    19: (500.0, 9.5),
}
"""Nanoseconds a byte, and ratio; what lies between is interpolated."""


def truth(content: dict[int, tuple[float, float]], level: int) -> tuple[float, float]:
    below = max(known for known in content if known <= level)
    above = min((known for known in content if known >= level), default=below)
    part = (level - below) / (above - below) if above > below else 0.0
    cost, ratio = (
        math.exp(math.log(content[below][i]) * (1 - part) + math.log(content[above][i]) * part) for i in (0, 1)
    )
    return cost * 1e-9, ratio


class Fixed:
    def __init__(self, level: int) -> None:
        self._level = level

    def next_level(self, _threads: int, _content_bytes: int, _filled_s: float) -> int:
        return self._level

    def told(self, level: int, content_bytes: int, compressed_bytes: int, seconds: float) -> None:
        pass


class Run(NamedTuple):
    seconds: float  # until the last byte is sent
    levels: list[int]


class Pipeline:
    """Two threads that compress in turn, and a link whose rate may change over time."""

    def __init__(
        self, link: Callable[[float], float], content: Callable[[int], dict[int, tuple[float, float]]]
    ) -> None:
        self._link = link
        self._content = content
        self.now = 0.0
        self.waiting = 0.0
        self.rate: float | None = None

    def flow(self) -> Flow:
        return Flow(self.rate, int(self.waiting))

    def run(self, choice: LevelChoice, frames: int, threads: int = 2) -> Run:
        levels = []
        for number in range(frames):
            level = choice.next_level(threads, FRAME, READ_S)
            cost, ratio = truth(self._content(number), level)
            packed_s = max(FRAME * cost / threads, READ_S)
            self._send(packed_s)
            self.waiting += FRAME / ratio
            choice.told(level, FRAME, int(FRAME / ratio), FRAME * cost)
            levels.append(level)
        while self.waiting > 0:
            self._send(0.05)
        return Run(self.now, levels)

    def _send(self, seconds: float) -> None:
        rate = self._link(self.now)
        if self.waiting and self.now > 0.15:
            self.rate = rate
        sent = min(self.waiting, rate * seconds)
        self.now += seconds if self.waiting > sent or seconds != 0.05 else sent / rate
        self.waiting -= sent


def compare(
    link: Callable[[float], float],
    frames: int,
    content: Callable[[int], dict[int, tuple[float, float]]] = lambda _number: MIX,
    highest: int = 19,
) -> tuple[float, Run]:
    """Of the adaptive run's time over the best fixed level's."""
    fixed = {level: Pipeline(link, content).run(Fixed(level), frames).seconds for level in MIX if level <= highest}
    pipeline = Pipeline(link, content)
    run = pipeline.run(LevelControl(1, highest, pipeline.flow), frames)
    return run.seconds / min(fixed.values()), run


MEGABIT = 1e6 / 8


@pytest.mark.parametrize("content", [MIX, TEXT], ids=["mix", "text"])
@pytest.mark.parametrize(
    ("megabits", "frames"), [(1, 80), (10, 60), (100, 300), (300, 500), (1000, 1500), (10_000, 1500)]
)
def test_within_a_tenth_of_the_best_fixed_level(
    megabits: float, frames: int, content: dict[int, tuple[float, float]]
) -> None:
    ratio, run = compare(lambda _now: megabits * MEGABIT, frames, lambda _number: content)
    assert ratio <= 1.1, run.levels


def test_a_fast_link_gets_the_lowest_level_and_a_slow_one_the_highest() -> None:
    _, fast = compare(lambda _now: 10_000 * MEGABIT, 200)
    assert sum(level == 1 for level in fast.levels[50:]) >= 0.8 * 150
    _, slow = compare(lambda _now: 1 * MEGABIT, 60)
    assert sum(level >= 18 for level in slow.levels[30:]) >= 0.8 * 30


def test_it_is_never_stuck_when_the_link_gets_better_or_worse() -> None:
    """What `zstd --adapt` is known for: low for ever after a moment in which nothing was waiting."""
    edges = [0.0, 60.0, 90.0, 150.0]

    def link(now: float) -> float:
        return (20 if sum(now >= edge for edge in edges) % 2 else 2000) * MEGABIT

    pipeline = Pipeline(link, lambda _number: MIX)
    control = LevelControl(1, 12, pipeline.flow)
    phases: dict[int, list[int]] = {}
    for _ in range(4000):
        if pipeline.now > 170:
            break
        phase = sum(pipeline.now >= edge for edge in edges)
        level = control.next_level(2, FRAME, READ_S)
        cost, ratio = truth(MIX, level)
        pipeline._send(FRAME * cost / 2)
        while pipeline.waiting > 40 << 20:  # the outbox is bounded: packing waits for the link
            pipeline._send(0.1)
        pipeline.waiting += FRAME / ratio
        control.told(level, FRAME, int(FRAME / ratio), FRAME * cost)
        phases.setdefault(phase, []).append(level)
    last = {phase: levels[len(levels) // 2 :] for phase, levels in phases.items()}
    assert {phase: max(set(levels), key=levels.count) >= 8 for phase, levels in last.items()} == {
        1: True,
        2: False,
        3: True,
        4: False,
    }


def test_a_content_that_changes_is_followed() -> None:
    ratio, run = compare(lambda _now: 300 * MEGABIT, 600, lambda number: TEXT if number // 100 % 2 else MIX)
    assert ratio <= 1.1, run.levels


def test_a_slow_disk_leaves_time_for_a_higher_level() -> None:
    control = LevelControl(1, 9, lambda: Flow(1e9, 0))
    levels = []
    for _ in range(60):
        level = control.next_level(2, FRAME, FRAME / 100e6)  # 100 MB/s are read: one core packs more at level 6
        cost, ratio = truth(MIX, level)
        control.told(level, FRAME, int(FRAME / ratio), FRAME * cost)
        levels.append(level)
    assert statistics.median(levels[10:]) >= 6


def test_nothing_is_known_of_the_link_at_first() -> None:
    assert LevelControl(1, 19, lambda: Flow(None, 1 << 20)).next_level(2, FRAME, 0.01) == 1
    assert LevelControl(1, 19, lambda: Flow(None, 1 << 26)).next_level(2, FRAME, 0.01) == UNKNOWN_LEVEL
    assert LevelControl(5, 9, lambda: Flow(None, 0)).next_level(2, FRAME, 0.01) == 5
    assert LevelControl(-7, -1, lambda: Flow(None, 0)).next_level(2, FRAME, 0.01) == -7
    assert (level_without_link(1, 9), level_without_link(6, 9), level_without_link(-5, 2)) == (3, 6, 2)


def test_frames_that_say_nothing_are_not_learned_from() -> None:
    control = LevelControl(1, 9, lambda: Flow(1e6, 0))
    before = [(control.ratio(level), control.cost_s_per_byte(level)) for level in range(1, 10)]
    control.told(3, FRAME, FRAME + 20, 0.002)  # incompressible
    control.told(3, 100, 90, 0.002)  # tiny
    control.told(-5, FRAME, FRAME // 2, 0.002)  # not one of its levels
    control.told(3, FRAME, FRAME // 2, 0.0)
    assert [(control.ratio(level), control.cost_s_per_byte(level)) for level in range(1, 10)] == before


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-7, 22),
    st.integers(0, 29),
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0, 1e12)),
            st.integers(-(1 << 40), 1 << 50),
            st.integers(1, 128),
            st.integers(0, 1 << 30),
            st.floats(0, 1e4),
            st.integers(0, 1 << 31),
            st.floats(0, 1e5),
        ),
        max_size=40,
    ),
)
def test_whatever_it_is_told_the_level_is_within_its_bounds(
    lowest: int, more: int, told: list[tuple[float | None, int, int, int, float, int, float]]
) -> None:
    highest = min(22, lowest + more)
    flow = Flow(None, 0)
    control = LevelControl(lowest, highest, lambda: flow)
    for link, waiting, threads, content_bytes, filled_s, compressed_bytes, seconds in told:
        flow = Flow(link, waiting)
        level = control.next_level(threads, content_bytes, filled_s)
        assert lowest <= level <= highest
        control.told(level, content_bytes, compressed_bytes, seconds)
