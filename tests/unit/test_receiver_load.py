"""Counts of what is being done, and for whom."""

from __future__ import annotations

import contextlib

from fastship.receiver.policy.access import Caller, Limits
from fastship.receiver.policy.load import Load

A, B = Caller("a"), Caller("b")


def test_one_of_several_has_three_quarters() -> None:
    load = Load(4)
    with contextlib.ExitStack() as bodies:
        for _ in range(3):
            assert not load.is_full(A, several=True)
            bodies.enter_context(load.body(A))
        assert load.is_full(A, several=True)
        assert not load.is_full(A, several=False)
        assert not load.is_full(B, several=True)
        bodies.enter_context(load.body(B))
        assert load.is_full(B, several=True)
        assert load.is_full(A, several=False)
    assert not load.is_full(A, several=True)


def test_one_at_all_is_never_none() -> None:
    load = Load(1)
    assert not load.is_full(A, several=True)
    with load.body(A):
        assert load.is_full(A, several=True)
        assert load.is_full(B, several=True)


def test_a_rate_is_each_callers_own() -> None:
    load = Load(1)
    slow, slower = Caller("a", Limits(rate=0.001)), Caller("b", Limits(rate=0.002))
    assert load.wait_s(slow) == 0
    assert 990 < load.wait_s(slow) <= 1000
    assert load.wait_s(slower) == 0
    assert 490 < load.wait_s(slower) <= 500
    fast = Caller("c", Limits(rate=1000.0))
    assert [load.wait_s(fast) for _ in range(1000)] == [0.0] * 1000
    assert all(load.wait_s(A) == 0 for _ in range(10_000))


def test_artifacts_that_are_sent() -> None:
    load = Load(1)
    with load.sending():
        assert load.is_sending_enough()
    assert not load.is_sending_enough()
