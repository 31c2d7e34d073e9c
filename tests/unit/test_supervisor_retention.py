"""What retention does on a host that gives it nothing; the rest is shown in tests/system."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastship.settings import Settings
from fastship.spool import Spool
from fastship.supervisor.retention import Retention


def test_where_no_thread_can_be_started_copies_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.create()
    rules = {"shipped_max_bytes": 1, "quarantine_cleanup_interval_s": 0}
    retention = Retention(Settings.load(values={"spool": {"root": str(tmp_path)}, "retention": rules}), spool)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        retention.turn(missing_bytes=0, paused=False)
    assert retention.status is not None
    assert "no thread" in retention.status.waits
    retention.turn(missing_bytes=0, paused=False)
    retention.close()
    assert retention.status.waits == ""
