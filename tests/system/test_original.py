"""The rows of what the original shipper did, S1 to S16, one test each, against a real HTTP server.

What each row is worth beside the plain case stands in the other files of this directory.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import pytest
import zstandard
from inotify_simple import INotify, flags
from lab import COMMIT, STORE, Daemon, Destination, Lab, Reply, Sections, noise, telemetry, tree, wait_until
from structlog.testing import capture_logs

from fastship import PassResult, Shipper
from fastship.episode import MARKER
from fastship.fields import parse_digest


def counts(result: PassResult) -> tuple[int, int, int, int, int]:
    return result.scanned, result.shipped, result.transient_failures, result.conflicts, result.fatal


def test_s01_ready_episodes_are_taken_in_name_order(lab: Lab, destination: Destination) -> None:
    """Scans `episodes/` in name order; an episode is ready when it is a directory holding `done.marker`."""
    for name in ("c", "a", "B", "a.1"):
        lab.episode(name)
    lab.episode("unfinished", marker=False)
    (lab.episodes / "file").touch()
    (lab.episodes / "loose.marker").touch()
    elsewhere = lab.root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARKER).touch()
    (lab.episodes / "link").symlink_to(elsewhere)

    result = lab.once({"upload": {"connections": 1}})

    assert [one.episode for one in destination.heard] == ["B", "a", "a.1", "c"]
    assert counts(result) == (4, 4, 0, 0, 0)
    assert lab.names("episodes") == ["file", "link", "loose.marker", "unfinished"]


def test_s02_packs_to_a_partial_then_renames(lab: Lab, destination: Destination) -> None:
    """Tars it (member names start with the id) into `outbox/<id>.tar.zst.partial`, removing an older partial first,
    then renames to `.tar.zst`: idempotent. Here an older partial is written over, but for frames it has of the same."""
    lab.once()  # makes the directories
    source = lab.episode(files={"a/b.bin": noise(300_000), "c.txt": b"text\n"})
    before = tree(source)
    old = lab.outbox / "ep1.tar.zst.partial"
    old.write_bytes(b"left by a crash")
    destination.say("ep1", Reply(503), STORE)
    with INotify() as watch:
        watch.add_watch(str(lab.outbox), flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO)
        lab.once({"upload": {"retries": 0}})
        seen = [(flags.from_mask(event.mask)[0].name, event.name) for event in watch.read(timeout=0)]

    assert [one for one in seen if one[1].startswith("ep1.tar.zst")] == [
        ("MOVED_FROM", "ep1.tar.zst.partial"),
        ("MOVED_TO", "ep1.tar.zst"),
    ]
    packed = lab.artifact().read_bytes()
    lab.once()
    assert destination.stored["ep1"] == packed
    with tarfile.open(fileobj=io.BytesIO(unpacked(packed))) as tar:
        assert all(name == "ep1" or name.startswith("ep1/") for name in tar.getnames())
        tar.extractall(lab.root.parent / "out", filter="fully_trusted")
    assert tree(lab.root.parent / "out" / "ep1") == before


def unpacked(artifact: bytes) -> bytes:
    """As any zstd decoder reads it: all frames, the seek table skipped."""
    reader = zstandard.ZstdDecompressor().stream_reader(artifact, read_across_frames=True)
    return reader.read()


def test_s03_never_holds_the_whole_tar_in_memory(lab: Lab, destination: Destination) -> None:
    """Streams; never holds the whole tar in memory."""
    size = 192 << 20
    directory = lab.episode(marker=False)
    with (directory / "big.bin").open("wb") as file:  # half noise, half zeros: read, packed and sent in full
        for number in range(size >> 20):
            file.write(noise(1 << 19, number) + bytes(1 << 19))
    (directory / MARKER).touch()
    peaks: list[int] = []

    def look(_: object) -> None:
        for child in psutil.Process().children():
            try:
                text = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                continue
            peaks.extend(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM"))

    frames = {"frame_bytes": "1MiB"}  # (threads + 2) x 2 of them are what packing may hold
    assert Shipper(lab.settings({"pack": frames}), observer=look).run_once().shipped == 1
    assert len(destination.stored["ep1"]) > size // 2
    print(f"peak of the worker: {max(peaks) >> 20} MiB for {size >> 20} MiB")
    assert max(peaks) < size // 2


def test_s04_sends_the_sha256_of_the_artifact(lab: Lab, destination: Destination) -> None:
    """The artifact's SHA-256 goes with the PUT."""
    lab.episode()
    lab.once()
    (heard,) = destination.heard
    assert heard.method == "PUT"
    assert parse_digest(heard.fields["repr-digest"], "sha-256") == hashlib.sha256(heard.body).hexdigest()


def test_s05_sends_the_recorders_commit(lab: Lab, destination: Destination) -> None:
    """Reads `meta.json`, `code_version.commit`; 40 characters -> lower-cased, sent as `X-Cis490-Code-Commit`; missing
    or malformed -> none."""
    lab.episode("upper", meta={"code_version": {"commit": COMMIT.upper()}})
    lab.episode("none", meta={})
    lab.episode("broken", meta=b'{"code_version": {"com')
    assert lab.once().shipped == 3
    sent = {one.episode: one.fields.get("x-cis490-code-commit") for one in destination.heard}
    assert sent == {"upper": COMMIT, "none": None, "broken": None}


@pytest.mark.parametrize("status", [200, 201])
def test_s06_retires_what_is_stored(lab: Lab, destination: Destination, status: int) -> None:
    """200 (already present, same SHA-256) or 201 (stored): the episode moves to `shipped/`, the artifact is removed; if
    the id is in `shipped/` already, nothing of either is lost."""
    source = lab.episode(files={"data": b"new"})
    before = tree(source)
    older = lab.shipped / "ep1"
    older.mkdir(parents=True)
    (older / "data").write_bytes(b"old")
    if status == 200:  # it is there: stored by an attempt whose answer was lost
        destination.say("ep1", Reply(0), STORE)
        destination.stored["ep1"] = artifact_of(lab)

    result = lab.once()

    assert counts(result) == (1, 1, 0, 0, 0)
    assert lab.names("episodes") == lab.names("outbox") == []
    assert (older / "data").read_bytes() == b"old"
    assert tree(lab.shipped / "ep1~1") == before


def artifact_of(lab: Lab) -> bytes:
    """What `ep1` is packed to; leaves the spool as it was."""
    unreachable: Sections = {"destination": {"url": "http://127.0.0.1:9"}, "upload": {"retries": 0}}
    assert counts(lab.once(unreachable)) == (1, 0, 1, 0, 0)
    data = lab.artifact().read_bytes()
    lab.artifact().unlink()
    return data


def test_s07_a_conflict_stays_in_place(lab: Lab, destination: Destination) -> None:
    """409 (same id, other content): both stay in place for manual triage; counted as conflict."""
    before = tree(lab.episode())
    destination.say("ep1", Reply(409, b'{"error": "another content"}'))
    assert counts(lab.once()) == (1, 0, 0, 1, 0)
    assert tree(lab.episodes / "ep1") == before
    assert lab.artifact().read_bytes() == destination.heard[0].body
    assert lab.names("quarantine") == lab.names("shipped") == []


@pytest.mark.parametrize("reply", [Reply(500), Reply(503), Reply(0)], ids=["500", "503", "cut"])
def test_s08_keeps_the_artifact_of_a_failed_attempt(lab: Lab, destination: Destination, reply: Reply) -> None:
    """5xx or network: artifact and episode stay; retried on the next pass (but not packed again)."""
    before = tree(lab.episode())
    destination.say("ep1", reply)
    assert counts(lab.once({"upload": {"retries": 1}})) == (1, 0, 1, 0, 0)
    assert tree(lab.episodes / "ep1") == before
    kept = lab.artifact().stat()

    destination.gate.clear()
    destination.says.clear()
    with Daemon(lab.settings()) as daemon:  # its answer waits, so the artifact can be looked at in mid-attempt
        offered = len(destination.heard)
        wait_until(lambda: len(destination.heard) > offered, "the next attempt")
        again = lab.artifact().stat()
        destination.gate.set()
        wait_until(lambda: lab.names("shipped") == ["ep1"], "the retirement")
        daemon.stop()
    assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_s09_another_4xx_quarantines(lab: Lab, destination: Destination) -> None:
    """Other 4xx: fatal; the episode moves to `quarantine/` with `quarantine_reason.json` = `status_code, error, body,
    quarantined_at_wall` (UTC, `%Y-%m-%dT%H:%M:%SZ`); the artifact is removed."""
    before = tree(lab.episode())
    destination.say("ep1", Reply(422, b'{"error": "no such schema"}'))
    since = datetime.now(UTC).replace(microsecond=0)

    assert counts(lab.once()) == (1, 0, 0, 0, 1)

    assert lab.names("episodes") == lab.names("outbox") == []
    reason_file = lab.quarantine / "ep1" / "quarantine_reason.json"
    reason = msgspec.json.decode(reason_file.read_bytes())
    assert reason["status_code"] == 422
    assert "422" in reason["error"]
    assert reason["body"] == '{"error": "no such schema"}'
    when = datetime.strptime(reason["quarantined_at_wall"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert since <= when <= datetime.now(UTC)
    after = tree(lab.quarantine / "ep1")
    del after["quarantine_reason.json"]
    assert after == before


def test_s10_a_refused_commit_says_what_to_run(lab: Lab, destination: Destination) -> None:
    """412: the receiver refused the recorder's commit; its JSON has `your_commit, head_commit, remediation`, logged as
    an error so that whoever looks sees what to run; then as S9."""
    lab.episode()
    told = {"your_commit": COMMIT, "head_commit": "f" * 40, "remediation": "git pull && make install"}
    destination.say("ep1", Reply(412, msgspec.json.encode(told)))
    with capture_logs() as logs:
        assert counts(lab.once()) == (1, 0, 0, 0, 1)
    (line,) = [line for line in logs if line["event"] == "quarantined"]
    assert line["log_level"] == "error"
    assert {name: line.get(name) for name in told} == told
    reason = msgspec.json.decode((lab.quarantine / "ep1" / "quarantine_reason.json").read_bytes())
    assert reason["status_code"] == 412
    assert msgspec.json.decode(reason["body"]) == told


def test_s11_sweeps_the_outbox(lab: Lab) -> None:
    """Every pass first sweeps the outbox: `.tar.zst` and `.tar.zst.partial` whose episode is not in `episodes/` are
    removed."""
    lab.once()
    lab.episode("unfinished", marker=False)
    stays = ["unfinished.tar.zst.partial", "notes.txt"]
    for name in ["gone.tar.zst", "gone.manifest.json", "lost.tar.zst.partial", *stays]:
        (lab.outbox / name).write_bytes(b"x")
    lab.once()
    assert lab.names("outbox") == sorted(stays)


def test_s12_cleans_the_quarantine_by_age(lab: Lab) -> None:
    """`quarantine_keep_days` (<= 0: never): older entries (by mtime) are removed; looked at once per
    `quarantine_cleanup_interval_s`, always on the first pass after start."""
    lab.once()

    def entry(name: str, days: float) -> Path:
        path = lab.quarantine / name
        path.mkdir()
        (path / "data").touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    entry("old", 8)
    young = entry("young", 6)
    lab.once({"retention": {"quarantine_keep_days": 0}})
    assert lab.names("quarantine") == ["old", "young"]
    keep = {"quarantine_keep_days": 7, "quarantine_cleanup_interval_s": "1h"}
    with Daemon(lab.settings({"retention": keep, "spool": {"scan_interval_s": "20ms"}})) as daemon:
        wait_until(lambda: lab.names("quarantine") == ["young"], "the first pass")
        os.utime(young, (0, 0))
        beats = daemon.beats
        wait_until(lambda: daemon.beats > beats + 5, "more passes")  # within the interval: nothing is removed
        assert lab.names("quarantine") == ["young"]
        daemon.stop()
    lab.once({"retention": keep})
    assert lab.names("quarantine") == []


def test_s13_the_loop_goes_on(lab: Lab, destination: Destination) -> None:
    """Loop: pass, heartbeat, sleep in steps of 0.5 s looking at a stop flag; an exception in a pass or in the heartbeat
    is logged and the loop goes on."""

    def heartbeat() -> None:
        raise RuntimeError("the watchdog is not there")

    with capture_logs() as logs, Daemon(lab.settings({"spool": {"scan_interval_s": "50ms"}}), heartbeat) as daemon:
        wait_until(lambda: daemon.beats > 2, "heartbeats that raise")
        away = lab.root / "away"
        lab.episodes.rename(away)  # root reads every mode: so it is not there at all
        failed = daemon.beats
        wait_until(lambda: daemon.beats > failed + 2, "heartbeats while no look succeeds")
        away.rename(lab.episodes)
        lab.episode()
        wait_until(lambda: lab.names("shipped") == ["ep1"], "an episode after all that")
        assert daemon.running
        daemon.stop()
    assert any(line["event"] == "heartbeat-failed" for line in logs)
    assert any(line["event"] == "look-failed" for line in logs)
    assert len(destination.stored) == 1


def test_s14_needs_no_program(lab: Lab, destination: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing `zstd` program is a clear error: it is not needed any more; all works with an empty PATH."""
    monkeypatch.setenv("PATH", "")
    assert shutil.which("zstd") is None
    lab.episode()
    assert counts(lab.once()) == (1, 1, 0, 0, 0)


def test_s15_a_crash_is_made_good_by_the_next_pass(lab: Lab, destination: Destination) -> None:
    """A crash in packing leaves only a `.partial`, overwritten next time; a crash in the PUT leaves the artifact, sent
    again next time: the receiver's 200 or 409 makes that safe."""
    lab.once()
    for name in ("packing", "putting"):
        lab.episode(name, files={"data": telemetry(200_000, name)})
    destination.gate.clear()
    with Daemon(lab.settings({"workers": {"drain_timeout_s": 0}})) as daemon:
        wait_until(lambda: len(destination.heard) == 2, "both PUTs")
        daemon.stop()  # at once: the workers are ended in mid-PUT
    assert lab.names("episodes") == ["packing", "putting"]
    sent = lab.artifact("putting").read_bytes()
    lab.artifact("packing").rename(lab.outbox / "packing.tar.zst.partial")
    os.truncate(lab.outbox / "packing.tar.zst.partial", 1000)
    destination.stored["putting"] = sent  # it had arrived
    destination.gate.set()
    destination.stored.pop("packing", None)

    assert counts(lab.once()) == (2, 2, 0, 0, 0)
    assert lab.names("shipped") == ["packing", "putting"]
    assert lab.names("outbox") == []
    assert destination.stored["putting"] == sent
    assert len(unpacked(destination.stored["packing"])) > 200_000


def test_s16_a_pass_counts(lab: Lab, destination: Destination) -> None:
    """A pass returns `scanned, shipped, transient_failures, conflicts, fatal`; an episode whose packing raises counts
    as transient."""
    for number, name in enumerate(["conflict", "fatal", "good", "good2", "late"]):
        lab.episode(name, files={"n": bytes([number])})
    bad = lab.episode("unpackable", marker=False)
    (bad / "device").symlink_to("/dev/null")
    lab.once()  # ships nothing of "unpackable"
    for name in lab.names("shipped"):
        (lab.shipped / name).rename(lab.episodes / name)
    destination.stored.clear()
    destination.say("conflict", Reply(409))
    destination.say("fatal", Reply(400))
    destination.say("late", Reply(500))
    (lab.outbox / "unpackable.tar.zst.partial").mkdir()  # where its artifact would be written
    (bad / MARKER).touch()

    result = lab.once({"upload": {"retries": 0}})

    assert counts(result) == (6, 2, 2, 1, 1)
    assert lab.names("shipped") == ["good", "good2"]
    assert lab.names("episodes") == ["conflict", "late", "unpackable"]
