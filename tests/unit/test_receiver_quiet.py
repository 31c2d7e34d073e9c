"""Lines that clients can cause are bounded, and counted."""

from __future__ import annotations

import logging

import pytest

from fastship.receiver.wire import quiet


def test_a_flood_leaves_a_few_lines_and_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("flooded")
    limit = quiet.Quiet()
    log.addFilter(limit)
    try:
        for number in range(1000):
            log.warning("nonsense %d", number)
        log.warning("other")
        assert len(caplog.records) == 11
        monkeypatch.setattr(quiet, "_WINDOW_S", 0.0)
        log.warning("nonsense %d", 1000)
        assert caplog.records[-1].getMessage() == "nonsense 1000 (990 more were not logged)"
    finally:
        log.removeFilter(limit)


def test_an_exception_is_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("failing")
    limit = quiet.Quiet()
    log.addFilter(limit)
    try:
        for _ in range(30):
            log.error("it failed", exc_info=ValueError())
        assert len(caplog.records) == 30
    finally:
        log.removeFilter(limit)
