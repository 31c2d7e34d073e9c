"""The prediction: the least of the limits; the choice: what delivers most, then what is smallest."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastship.tune.model import (
    CORES,
    LINK,
    NEAR,
    OUTBOX,
    READING,
    Host,
    LevelCost,
    best,
    calibrated,
    least_near_best,
    predict,
    worker_count,
)

MB = 1_000_000
HOST = Host(cores=2.0, around_cpu_s=0.5e-9, artifact_cpu_s=1e-9)
LEVEL_3 = LevelCost(level=3, ratio=4.0, zstd_cpu_s=3.25e-9)  # with its artifact's 0.25: 4 CPU seconds a GB

positive = st.floats(1e-12, 1e12)
hosts = st.builds(
    Host,
    cores=st.floats(0.1, 256),
    around_cpu_s=st.floats(0, 1e-6),
    artifact_cpu_s=st.floats(0, 1e-6),
    read_bytes_per_s=st.none() | positive,
    write_bytes_per_s=st.none() | positive,
    link_bytes_per_s=st.none() | positive,
)
costs = st.builds(LevelCost, level=st.integers(-7, 22), ratio=st.floats(0.9, 1e4), zstd_cpu_s=st.floats(1e-12, 1e-5))


def test_what_is_not_known_does_not_limit() -> None:
    found = predict(HOST, LEVEL_3)
    assert found.bytes_per_s == pytest.approx(500 * MB)
    assert (found.bottleneck, list(found.limits), found.next_limit) == (CORES, [CORES], None)
    assert found.zstd_share == pytest.approx(3.25 / 4)


@pytest.mark.parametrize(
    ("changed", "bottleneck", "rate"),
    [
        ({"read_bytes_per_s": 100 * MB}, READING, 100 * MB),
        ({"write_bytes_per_s": 100 * MB}, OUTBOX, 400 * MB),
        ({"link_bytes_per_s": 10 * MB}, LINK, 40 * MB),
        ({"link_bytes_per_s": 10 * MB, "read_bytes_per_s": 100 * MB}, LINK, 40 * MB),
        ({"episode_cpu_s": 4e-3, "episode_bytes": 1.0 * MB}, CORES, 250 * MB),
    ],
)
def test_the_least_of_the_limits_is_what_is_delivered(changed: dict[str, float], bottleneck: str, rate: float) -> None:
    found = predict(msgspec.structs.replace(HOST, **changed), LEVEL_3)
    assert found.bottleneck == bottleneck
    assert found.bytes_per_s == pytest.approx(rate)


@given(hosts, costs)
def test_a_prediction_is_one_of_its_limits_and_none_is_below(host: Host, cost: LevelCost) -> None:
    found = predict(host, cost)
    assert found.bytes_per_s == found.limits[found.bottleneck] == min(found.limits.values())


@given(hosts, st.lists(costs, min_size=1, max_size=9))
def test_the_best_is_near_the_fastest_and_nothing_near_it_is_smaller(host: Host, levels: list[LevelCost]) -> None:
    found = [predict(host, cost) for cost in levels]
    chosen = best(found)
    most = max(one.bytes_per_s for one in found)
    assert chosen.bytes_per_s >= NEAR * most
    assert all(one.ratio <= chosen.ratio for one in found if one.bytes_per_s >= NEAR * most)


def test_a_slow_link_asks_for_a_higher_level_and_a_fast_one_for_a_lower() -> None:
    levels = [
        LevelCost(level=1, ratio=3.0, zstd_cpu_s=2e-9),
        LevelCost(level=9, ratio=4.0, zstd_cpu_s=20e-9),
        LevelCost(level=19, ratio=5.0, zstd_cpu_s=500e-9),
    ]

    def chosen_at(link: float) -> int:
        host = msgspec.structs.replace(HOST, link_bytes_per_s=link)
        return best([predict(host, cost) for cost in levels]).level

    assert [chosen_at(link) for link in (1000 * MB, 20 * MB, 0.5 * MB)] == [1, 9, 19]


def test_levels_that_deliver_about_as_much_are_told_apart_by_their_artifacts() -> None:
    levels = [LevelCost(level=1, ratio=3.0, zstd_cpu_s=3.25e-9), LevelCost(level=2, ratio=3.1, zstd_cpu_s=3.3e-9)]
    assert best([predict(HOST, cost) for cost in levels]).level == 2


def test_the_fewest_that_come_near_the_best() -> None:
    assert least_near_best([(1, 100.0), (4, 198.0), (8, 200.0)]) == 4
    assert least_near_best([(1, 100.0), (2, 90.0)]) == 1


def test_a_part_that_is_harder_than_the_whole_is_set_right() -> None:
    whole = LevelCost(level=1, ratio=4.0, zstd_cpu_s=2.0)
    part = LevelCost(level=1, ratio=2.0, zstd_cpu_s=4.0)
    found = calibrated(whole, part, LevelCost(level=19, ratio=3.0, zstd_cpu_s=40.0))
    assert (found.level, found.ratio, found.zstd_cpu_s) == (19, 6.0, 20.0)


def test_workers_are_as_many_as_threads_where_memory_is_enough_for_them() -> None:
    assert worker_count(8, 16 << 30, 8 << 20) == 8
    assert 1 < worker_count(8, 1 << 30, 8 << 20) < 8
    assert worker_count(8, 1 << 20, 8 << 20) == 1
