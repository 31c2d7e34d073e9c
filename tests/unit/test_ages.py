"""Ages under a clock that jumps, over runs and boots."""

from __future__ import annotations

import time as real_time
from pathlib import Path

import pytest

from fastship import ages as ages_module
from fastship import durable
from fastship.ages import AWAY_S, Ages

DAY_S = 86400.0
YEAR_S = 366 * DAY_S


class Clock:
    """The clocks of the module under test: `pass_time` moves both, `step` only the one that people set."""

    CLOCK_BOOTTIME = real_time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.wall = 1.8e9
        self.boottime = 5000.0
        self.boot_id = "first"

    def time(self) -> float:
        return self.wall

    def clock_gettime(self, clock: int) -> float:
        assert clock == self.CLOCK_BOOTTIME
        return self.boottime

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.boottime += seconds

    def step(self, seconds: float) -> None:
        self.wall += seconds

    def boot(self, off_s: float) -> None:
        self.wall += off_s
        self.boottime = 10.0
        self.boot_id += "+"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ages_module, "time", made)
    monkeypatch.setattr(durable, "boot_id", lambda: made.boot_id)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clock.json"


def age_after(path: Path, mtime: float) -> float:
    """As another run finds it."""
    ages = Ages(path)
    ages.look()
    return ages.age_s(mtime)


def test_a_clock_that_never_stepped_is_believed_from_the_first_look(path: Path, clock: Clock) -> None:
    ages = Ages(path)
    assert not ages.look()
    assert ages.age_s(clock.wall - YEAR_S) == YEAR_S
    assert ages.age_s(clock.wall + YEAR_S) == 0.0
    clock.pass_time(100 * DAY_S)  # suspended, say: boottime counts that
    assert not ages.look()
    assert ages.age_s(clock.wall - YEAR_S) == YEAR_S


@pytest.mark.parametrize("step_s", [YEAR_S, 50 * YEAR_S, DAY_S, -YEAR_S])
def test_a_step_makes_everything_new(path: Path, clock: Clock, step_s: float) -> None:
    ages = Ages(path)
    ages.look()
    mtime = clock.wall
    clock.pass_time(3600.0)
    clock.step(step_s)
    assert ages.look()
    assert ages.age_s(mtime) == 0.0
    clock.pass_time(2 * DAY_S)
    assert not ages.look()
    assert ages.age_s(mtime) <= 2 * DAY_S
    assert ages.age_s(clock.wall - YEAR_S) == 2 * DAY_S
    assert age_after(path, clock.wall - YEAR_S) == 2 * DAY_S  # nor does a restart forget it


def test_there_and_back_again_is_two_steps(path: Path, clock: Clock) -> None:
    ages = Ages(path)
    ages.look()
    mtime = clock.wall - 30 * DAY_S
    for step_s in (YEAR_S, -YEAR_S):
        clock.step(step_s)
        assert ages.look()
        assert ages.age_s(mtime) == 0.0


def test_a_correction_by_seconds_is_none(path: Path, clock: Clock) -> None:
    ages = Ages(path)
    ages.look()
    clock.step(30.0)
    assert not ages.look()
    assert ages.age_s(clock.wall - YEAR_S) == YEAR_S


def test_a_step_between_two_runs_of_one_boot_is_found(path: Path, clock: Clock) -> None:
    Ages(path).look()
    clock.pass_time(20 * DAY_S)
    assert age_after(path, clock.wall - YEAR_S) == YEAR_S
    clock.step(YEAR_S)
    assert age_after(path, clock.wall - YEAR_S) == 0.0


@pytest.mark.parametrize(
    ("off_s", "believed"), [(3600.0, True), (AWAY_S, True), (AWAY_S + 1, False), (-YEAR_S, False), (YEAR_S, False)]
)
def test_across_a_boot_a_week_is_believed_and_no_more(path: Path, clock: Clock, off_s: float, believed: bool) -> None:
    Ages(path).look()
    clock.boot(off_s)
    assert age_after(path, clock.wall - YEAR_S) == (YEAR_S if believed else 0.0)


def test_a_board_that_boots_in_1970_and_hears_the_time_then(path: Path, clock: Clock) -> None:
    Ages(path).look()
    clock.boot(-clock.wall)
    ages = Ages(path)
    ages.look()
    mtime = clock.wall
    clock.pass_time(60.0)
    clock.step(1.8e9)
    assert ages.look()
    assert ages.age_s(mtime) == 0.0


def test_what_cannot_be_written_is_as_if_it_was_not_there(path: Path, clock: Clock) -> None:
    assert age_after(path / "no" / "such", clock.wall - YEAR_S) == YEAR_S


def test_what_cannot_be_read_now_ages_nothing(path: Path, clock: Clock) -> None:
    """It may tell of a step."""
    path.mkdir()
    assert age_after(path, clock.wall - YEAR_S) == 0.0


@pytest.mark.parametrize("left", [b"", b"\0" * 80, b'{"wall": 1.8e9, "boot'])
def test_what_a_power_loss_left_of_it_ages_nothing(path: Path, clock: Clock, left: bytes) -> None:
    """It may have told of a step."""
    path.write_bytes(left)
    assert age_after(path, clock.wall - YEAR_S) == 0.0
    clock.pass_time(2 * DAY_S)
    assert age_after(path, clock.wall - YEAR_S) == 2 * DAY_S
