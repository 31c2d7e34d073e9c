"""Small pieces of the loop; what it does as a whole is shown in tests/system with real processes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fastship.lifecycle.events import Quarantine
from fastship.settings import Settings
from fastship.status import Snapshot
from fastship.supervisor.host import thread_count
from fastship.supervisor.loop import Supervisor, _remediation_in, policy_of, worker_count


def test_the_remediation_of_a_412_is_read_out() -> None:
    body = '{"your_commit":"a","head_commit":"b","remediation":"git pull","more":{"x":1}}'
    told = _remediation_in(Quarantine("ep", 412, "no", body))
    assert told == {"your_commit": "a", "head_commit": "b", "remediation": "git pull"}


@pytest.mark.parametrize("body", ["", "no json", "[1]", "[" * 100_000, '{"a":' * 100_000])
def test_a_412_that_says_nothing_readable_is_shown_as_it_is(body: str) -> None:
    assert _remediation_in(Quarantine("ep", 412, "no", body)) == {"body": body}


def test_other_refusals_have_none() -> None:
    assert _remediation_in(Quarantine("ep", 422, "no", '{"remediation":"x"}')) == {}


def test_workers_follow_threads_and_threads_follow_cores() -> None:
    settings = Settings.load(overrides=["pack.threads=3"])
    assert (thread_count(settings), worker_count(settings)) == (3, 3)
    settings = Settings.load(overrides=["pack.threads=3", "workers.count=1"])
    assert worker_count(settings) == 1
    assert thread_count(Settings()) >= 1
    assert policy_of(settings, once=True).cores == 3


def test_an_observer_whose_terminal_has_gone_stops_nothing(tmp_path: Path) -> None:
    looked = []

    def observer(snapshot: Snapshot) -> None:
        looked.append(snapshot)
        raise OSError(errno.EIO, "hung up")

    (tmp_path / "episodes").mkdir()
    settings = Settings.load(values={"spool": {"root": str(tmp_path)}, "destination": {"url": "http://127.0.0.1:9"}})
    assert Supervisor(settings, once=True, observer=observer).run().scanned == 0
    assert looked
