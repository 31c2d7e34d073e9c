"""Signals become flags and wake a selector, and the handlers of before come back."""

from __future__ import annotations

import os
import selectors
import signal
import threading

from fastship.supervisor.signals import Signals


def wake(selector: selectors.BaseSelector) -> bool:
    ready = selector.select(10.0)
    for key, _ in ready:
        key.data()
    return bool(ready)


def test_first_drains_second_stops_and_hangup_reloads() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with selectors.DefaultSelector() as selector, signals.handled(selector):
        os.kill(os.getpid(), signal.SIGHUP)
        assert wake(selector)
        assert signals.take("reload")
        assert not signals.take("reload")
        os.kill(os.getpid(), signal.SIGTERM)
        assert wake(selector)
        assert signals.raised == {"drain"}
        os.kill(os.getpid(), signal.SIGINT)
        assert wake(selector)
        assert signals.raised == {"drain", "stop"}
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_touches_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def elsewhere() -> None:
        with selectors.DefaultSelector() as selector, Signals().handled(selector):
            seen.append((signal.getsignal(signal.SIGTERM), len(selector.get_map())))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]
