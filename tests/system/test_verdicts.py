"""What becomes of an episode after each kind of answer: holds, quarantine, faults of the destination.

Outages with a queue are in tests/crash/test_outage.py.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab import COMMIT, STORE, Daemon, Destination, Lab, Receiver, Reply, Sections, fastship, tree, wait_until
from structlog.testing import capture_logs

from fastship import durable
from fastship.errors import UsageError
from fastship.lifecycle.sharing import QUEUE_DEPTH
from fastship.shipper import operate

META: dict[str, tuple[Any, str | None]] = {
    "present": ({"code_version": {"commit": COMMIT}}, COMMIT),
    "upper": ({"code_version": {"commit": COMMIT.upper()}}, COMMIT),
    "short": ({"code_version": {"commit": COMMIT[:39]}}, None),
    "long": ({"code_version": {"commit": COMMIT + "0"}}, None),
    "nothex": ({"code_version": {"commit": "g" * 40}}, None),
    "newline": ({"code_version": {"commit": COMMIT[:38] + "\r\n"}}, None),
    "number": ({"code_version": {"commit": 7}}, None),
    "null": ({"code_version": None}, None),
    "list": ([1, 2], None),
    "missing": ({}, None),
    "empty": (b"", None),
    "cut": (b'{"code_version": {"commit": "0123', None),
    "binary": (bytes(range(256)), None),
}


def test_commit_field_of_every_meta(lab: Lab, destination: Destination) -> None:
    for name, (meta, _) in META.items():
        lab.episode(name, meta=meta)
    (lab.episode("absent") / "meta.json").unlink()
    directory = lab.episode("directory") / "meta.json"
    directory.unlink()
    directory.mkdir()

    assert lab.once({"destination": {"commit_field": "X-Recorder"}}).shipped == len(META) + 2

    sent = {one.episode: one.fields.get("x-recorder") for one in destination.offers()}
    assert sent == {"absent": None, "directory": None} | {name: commit for name, (_, commit) in META.items()}


# --- holds -------------------------------------------------------------------------------------------------------

CONFLICT = Reply(409, b'{"error": "another content under this id"}')


@pytest.fixture
def held(lab: Lab, destination: Destination) -> Lab:
    """A spool with one held episode; the destination would store it now."""
    lab.episode()
    destination.say("ep1", CONFLICT)
    assert lab.once().conflicts == 1
    destination.says.clear()
    destination.heard.clear()
    return lab


def in_place(lab: Lab) -> dict[str, Any]:
    return {"episode": tree(lab.episodes), "outbox": tree(lab.outbox), "inode": lab.artifact().stat().st_ino}


def test_held_is_neither_packed_nor_offered_again(held: Lab, destination: Destination) -> None:
    before = in_place(held)
    stamp = held.artifact().stat().st_mtime_ns
    for _ in range(2):
        result = held.once()
        assert (result.scanned, result.conflicts, result.shipped) == (1, 1, 0)
    assert in_place(held) == before
    assert held.artifact().stat().st_mtime_ns == stamp
    assert destination.heard == []
    (record,) = held.names("holds")
    assert record == "ep1.json"


def test_held_that_changed_is_packed_and_offered_again(held: Lab, destination: Destination) -> None:
    (held.episodes / "ep1" / "more.txt").write_bytes(b"more")
    before = tree(held.episodes / "ep1")
    assert held.once().shipped == 1
    assert [one.episode for one in destination.heard][:1] == ["ep1"]
    assert tree(held.shipped / "ep1") == before
    assert held.names("holds") == held.names("outbox") == []


def run_cli(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = fastship(*arguments[:2], "-c", lab.settings_file(), *arguments[2:])
    return subprocess.run(command, capture_output=True, text=True, check=False)


def by_api(lab: Lab, action: Any, new_id: str | None = None) -> None:
    operate(lab.settings(), action, "ep1", new_id=new_id)


def by_cli(lab: Lab, action: str, new_id: str | None = None) -> None:
    done = run_cli(lab, "holds", action, "ep1", *(["--as", new_id] if new_id else []), *(["-y"] * ("drop" in action)))
    assert done.returncode == 0, done.stderr


Act = Callable[..., None]


@pytest.mark.parametrize("act", [by_api, by_cli])
def test_keep_local_offers_the_same_artifact_again(held: Lab, destination: Destination, act: Act) -> None:
    packed = held.artifact().read_bytes()
    act(held, "keep-local")
    assert held.once().shipped == 1
    assert destination.stored == {"ep1": packed}


@pytest.mark.parametrize("act", [by_api, by_cli])
def test_keep_local_under_another_id(held: Lab, destination: Destination, act: Act) -> None:
    act(held, "keep-local", "ep1-b")
    assert held.once().shipped == 1
    assert list(destination.stored) == ["ep1-b"]
    assert held.names("shipped") == ["ep1-b"]
    assert held.names("outbox") == []


@pytest.mark.parametrize("act", [by_api, by_cli])
def test_drop_local_keeps_the_data_in_quarantine(held: Lab, destination: Destination, act: Act) -> None:
    before = tree(held.episodes / "ep1")
    act(held, "drop-local")
    after = tree(held.quarantine / "ep1")
    assert after.pop("quarantine_reason.json")
    assert after == before
    assert held.names("outbox") == held.names("holds") == held.names("episodes") == []
    assert held.once().scanned == 0
    assert destination.heard == []


def test_an_operator_is_heard_by_the_daemon(held: Lab, destination: Destination) -> None:
    """Hold, release, quarantine, retry: each through the daemon that has the lock."""
    settings = held.settings()
    with Daemon(settings) as daemon:
        wait_until(lambda: daemon.beats, "the first pass")
        with pytest.raises(UsageError):
            operate(settings, "keep-local", "ep2")
        destination.say("ep1", Reply(400, b"no"))
        operate(settings, "keep-local", "ep1")
        wait_until(lambda: held.names("quarantine") == ["ep1"], "the quarantine")
        destination.says.clear()
        operate(settings, "retry", "ep1")
        wait_until(lambda: held.names("shipped") == ["ep1"], "the retirement")
        daemon.stop()
    assert held.names("quarantine") == []


# --- faults of the destination -----------------------------------------------------------------------------------

DESTINATION_FAULTS = [401, 403, 404, 407, 408, 409, 421, 425, 429]  # the 409 in a web server's words
QUICK: Sections = {"upload": {"retries": 0}, "destination": {"pause_min_s": "50ms", "pause_max_s": "200ms"}}


@pytest.mark.parametrize("status", [401, 404, 429])
def test_a_fault_of_the_destination_quarantines_nothing(lab: Lab, destination: Destination, status: int) -> None:
    for number in range(3):
        lab.episode(f"ep{number}")
    destination.say("*", Reply(status, b"not you"))
    result = lab.once(QUICK)
    assert (result.scanned, result.transient_failures, result.fatal, result.conflicts) == (3, 3, 0, 0)
    assert lab.names("quarantine") == lab.names("holds") == []
    assert lab.names("episodes") == ["ep0", "ep1", "ep2"]


def test_a_tls_fault_is_the_destinations(lab: Lab, destination: Destination) -> None:
    """https to a server that speaks http: as with a wrong certificate, nobody is told the token and nothing is held."""
    lab.episode()
    result = lab.once({**QUICK, "destination": {"url": destination.url.replace("http", "https")}})
    assert (result.scanned, result.transient_failures, result.fatal) == (1, 1, 0)
    assert lab.names("episodes") == ["ep1"]
    assert destination.heard == []


def offered(destination: Destination, count: int) -> bool:
    return len(destination.offers()) >= count


def test_the_queue_ships_by_itself_when_the_fault_ends(lab: Lab, destination: Destination) -> None:
    expected: list[str] = []
    with Daemon(lab.settings(QUICK)) as daemon:
        for status in DESTINATION_FAULTS:
            destination.say("*", Reply(status, b"not you"))
            enough = len(destination.offers()) + 6
            expected += [f"{status}-{number}" for number in range(4)]
            for name in expected[-4:]:
                lab.episode(name)
            wait_until(partial(offered, destination, enough), f"probes while {status}")
            assert lab.names("quarantine") == lab.names("holds") == []
            destination.says.clear()
            wait_until(lambda: lab.names("episodes") == [], "the queue")
            assert lab.names("shipped") == sorted(expected), status
        daemon.stop()


def test_one_episodes_409_in_a_servers_own_words_keeps_no_other_waiting(lab: Lab, destination: Destination) -> None:
    """Nothing is stored under its id: no conflict, and no fault of the destination that others need to wait for."""
    names = [f"ep{number:02}" for number in range(2 * QUEUE_DEPTH + 8)]  # more than are given out before its answer
    for name in names:
        lab.episode(name)
    destination.say(names[0], Reply(409, b"Conflict"))
    result = lab.once(QUICK)
    assert (result.shipped, result.transient_failures, result.conflicts) == (len(names) - 1, 1, 0)
    assert lab.names("episodes") == names[:1]
    with Daemon(lab.settings(QUICK)):
        wait_until(partial(offered, destination, len(destination.offers()) + 6), "more attempts")
        lab.episode("later")
        wait_until(lambda: "later" in lab.names("shipped"), "the others")
        assert lab.names("quarantine") == lab.names("holds") == []
        destination.says.clear()
        wait_until(lambda: lab.names("episodes") == [], "it, too")


def test_status_says_what_a_page_means_and_what_to_do(lab: Lab, destination: Destination) -> None:
    lab.episode("odd")
    page = b"<html><head><title>406 Not Acceptable</title></head></html>"
    destination.say("odd", Reply(406, page, {"Content-Type": "text/html"}))
    status, rows = fastship("status", "-c", lab.settings_file()), list[str]()

    def is_told() -> bool:  # not while it is being tried
        said = subprocess.run(status, capture_output=True, text=True).stdout.partition("WAITING")[2]
        rows[:] = [line for line in said.partition("\n\n")[0].splitlines() if line.startswith("odd")]
        return bool(rows)

    with Daemon(lab.settings(QUICK)):
        wait_until(is_told, "its line")
        lab.episode("ep1")
        wait_until(lambda: lab.names("shipped") == ["ep1"], "the other")
        assert lab.names("quarantine") == lab.names("holds") == []
    (row,) = rows
    for part in ("status 406", "not a receiver", "tried again", "destination.url and that server's log", "Acceptable"):
        assert part in row


def test_5xx_is_not_packed_again(lab: Lab, destination: Destination) -> None:
    lab.episode()
    destination.say("ep1", Reply(500), Reply(502), Reply(507), Reply(0), STORE)
    before: dict[str, Any] | None = None
    for _ in range(4):
        assert lab.once({"upload": {"retries": 0}}).transient_failures == 1
        assert before in (None, in_place(lab))
        before = in_place(lab)
        (entry,) = [name for name in lab.names("outbox") if name.endswith(".json")]
        assert entry == "ep1.manifest.json"
    assert lab.once({"upload": {"retries": 0}}).shipped == 1


def test_a_success_without_proof_retires_nothing(lab: Lab, destination: Destination) -> None:
    """A captive portal, a wrong server: it says 200 to anything."""
    lab.episode()
    destination.say("ep1", Reply(200, b"<html>Welcome! Log in here</html>"))
    result = lab.once({"upload": {"retries": 0}})
    assert (result.shipped, result.transient_failures, result.fatal) == (0, 1, 0)
    assert lab.names("episodes") == ["ep1"]
    assert lab.names("shipped") == lab.names("quarantine") == []


def test_a_receipt_that_cannot_be_kept_retires_nothing(lab: Lab, destination: Destination) -> None:
    """The journal of receipts cannot be written: the episode stays, is counted, and is retired once it can be."""
    lab.once()
    lab.episode()
    receipts = lab.root / "receipts"
    for days in (0, 1):  # midnight may pass
        (receipts / f"{datetime.now(UTC) + timedelta(days):%Y-%m-%d}.jsonl").mkdir()

    result = lab.once()
    assert (result.scanned, result.shipped, result.transient_failures) == (1, 0, 1)
    assert lab.names("episodes") == ["ep1"]

    for path in receipts.iterdir():
        path.rmdir()
    assert lab.once().shipped == 1
    assert lab.names("shipped") == ["ep1"]


# --- the real receiver -------------------------------------------------------------------------------------------


def test_an_artifact_given_up_for_its_receipt_is_asked_for_and_not_packed_again(
    make_lab: Callable[..., Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes would be another artifact, and a conflict, where the receiver verifies no more than that."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    receiver = Receiver(tmp_path / "store", "--set", "receiver.verify=artifact")
    try:
        lab = make_lab(receiver.url)
        lab.episode()
        with monkeypatch.context() as disk:
            disk.setattr(durable, "append_lines", full)
            assert lab.once({"pack": {"level": 3}}).transient_failures == 1
        assert (lab.names("episodes"), lab.names("outbox")) == (["ep1"], ["ep1.manifest.json"])
        result = lab.once({"pack": {"level": 19}})
    finally:
        receiver.close()
    assert (result.shipped, result.conflicts) == (1, 0)
    assert (lab.names("shipped"), lab.names("outbox")) == (["ep1"], [])


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """A receiver with tokens and an allow-list of commits."""
    directory = tmp_path_factory.mktemp("strict")
    (directory / "tokens").write_text("token-of-yesterday\n")
    (directory / "commits").write_text(f"#remediation: fastship-lab update\n{'a' * 40}\n{COMMIT}\n")
    process = Receiver(directory / "store", "--token-file", directory / "tokens", "--commits", directory / "commits")
    yield process
    process.close()


def test_the_receivers_word_on_commits(make_lab: Callable[..., Lab], strict: Receiver, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token-of-today\n")
    (strict.root.parent / "tokens").write_text("token-of-today\n")
    lab = make_lab(strict.url, destination={"token_file": str(tmp_path / "token")})
    lab.episode("allowed")
    lab.episode("stale", meta={"code_version": {"commit": "b" * 40}})
    lab.episode("unknown", meta={})
    with capture_logs() as logs:
        result = lab.once()
    assert (result.shipped, result.fatal) == (1, 2)
    reasons = {
        name: msgspec.json.decode((lab.quarantine / name / "quarantine_reason.json").read_bytes())
        for name in lab.names("quarantine")
    }
    assert {name: reason["status_code"] for name, reason in reasons.items()} == {"stale": 412, "unknown": 400}
    (line,) = [line for line in logs if line["event"] == "quarantined" and line["status"] == 412]
    assert (line["your_commit"], line["head_commit"]) == ("b" * 40, "a" * 40)
    assert line["remediation"] == "fastship-lab update"
