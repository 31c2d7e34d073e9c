"""Power goes at any call of a traced run, at the receiver, at the shipper, or at both; what `disk` lets survive of each
is put into a fresh directory, and the real thing is started on it.

After each: what the receiver had told is there (a stored artifact, an offset), every episode is in one place with its
bytes, nothing is in ``shipped/`` that is not on the receiver's disk with a receipt on both sides, and all of it goes on
to its end.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blackout
import faults
import pytest
import syscalls
from blackout import Exchange, Run, exchanges, sha256
from disk import Disk, Loss
from lab import Command, Lab, Receiver, contents, contents_of, noise, tree
from sample import journal_lines

from fastship import Shipper, durable, sealed
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared, compare
from fastship.receiver.store.ending import Ending
from fastship.receiver.store.store import Store
from fastship.receiver.uploads.uploads import UnknownUpload
from fastship.settings import ReceiverSettings
from fastship.spool import Spool
from fastship.spool.reason import REASON_FILE

LOSSES = (Loss.ORDERED, Loss.ANY)
ANOTHER_BOOT = "deadbeef-0000-4000-8000-000000000000"
TIMES = 2  # that power is lost at each call, each time another part of what is not synced
WEEKS_S = 30 * 86400.0


def another_boot(data: bytes) -> bytes:
    """What a boot wrote, as it is found in the next one: the id in it is of the one before."""
    boot, another = durable.boot_id().encode(), ANOTHER_BOOT.encode()
    try:
        record = sealed.unseal(data) if boot in data else data
    except sealed.Spoilt:
        record = data
    if record is data or record == data.rstrip():
        return data.replace(boot, another)
    return sealed.seal(record.replace(boot, another))


def put(run: Run, disk: Disk, target: Path, loss: Loss, chance: random.Random) -> Path:
    """What survives, in a machine that was started again unless nothing was lost."""
    disk.write_to(target, loss, chance, (lambda data: data) if loss is Loss.NOTHING else another_boot)
    for path in target.glob(f"uploads/bodies/*{durable.boot_id()}*") if loss is not Loss.NOTHING else ():
        path.rename(path.with_name(path.name.replace(durable.boot_id(), ANOTHER_BOOT)))
    keep_inodes(run.store, target)
    return target


def keep_inodes(store: Path, target: Path) -> None:
    """A receipt that waits is named by its artifact's inode, which another directory does not keep."""
    for artifact in target.glob("episodes/*.tar.zst"):
        before = store / "episodes" / artifact.name
        episode = artifact.name.removesuffix(".tar.zst")
        waiting = target / "uploads" / f"{episode}.{before.stat().st_ino if before.exists() else 0}.receipt"
        if waiting.exists():
            waiting.rename(waiting.with_name(f"{episode}.{artifact.stat().st_ino}.receipt"))


def moments(run: Run, disks: list[Disk], name: str, *, most: int | None = None, least: int = 2) -> Iterator[int]:
    """Feed the run to the disks, and stop at a share of the calls that change something on one of them, or of ``most``
    of them; their line."""
    points = all_moments(run, disks)
    if most is not None:
        points = sorted(faults.chance(name).sample(points, min(most, len(points))))
    chosen = set(faults.some_of(points, name, least=least))
    for call in run.calls:
        for disk in disks:
            disk.feed(call)
        if call.ended in chosen:
            yield call.ended


def all_moments(run: Run, disks: list[Disk]) -> list[int]:
    return [call.ended for call in run.calls if any(disk.is_about(call) for disk in disks)]


def count(kind: str, what: str, moments: int, tried: int) -> None:
    faults.count(kind, what, of=moments * TIMES, tried=tried, test="tests/crash/test_power_loss.py")


def told_before(run: Run, moment: int) -> list[Exchange]:
    return [one for one in exchanges(run.calls) if one.at <= moment]


# --- the receiver, in this process --------------------------------------------------------------------------------


class Restarted:
    """The receiver's parts on what survived, and what it had told of it."""

    def __init__(self, run: Run, root: Path, told: list[Exchange], chance: random.Random) -> None:
        self.run = run
        self.root = root
        self.chance = chance
        self.store = Store(ReceiverSettings(root=str(root), reserve_bytes=0))
        self.ending = Ending(self.store)
        self.episodes: dict[str, str] = {}  # by upload
        self.offsets: dict[str, int] = {}
        self.named: dict[str, str] = {}  # uploads of a known digest, by episode
        self.stored: dict[str, str] = {}
        for one in told:
            place = one.answered.get("location") or one.path
            token = place.rpartition("/")[2] if "/uploads/" in place else ""
            if "location" in one.answered:
                self.episodes[token] = one.path.rpartition("/")[2]
                if "repr-digest" in one.asked:
                    self.named[self.episodes[token]] = token
            if one.stored_sha256 is not None:
                episode = self.episodes[token] if token else one.path.rpartition("/")[2]
                self.stored[episode] = one.stored_sha256
                self.offsets.pop(token, None)
            elif token and one.answered.get("upload-complete") == "?0" and "upload-offset" in one.answered:
                self.offsets[token] = max(self.offsets.get(token, 0), int(one.answered["upload-offset"]))

    def check(self) -> None:
        steps = [self.store.mend, self.look, self.go_on, self.check_stored]
        self.chance.shuffle(steps)
        for step in steps:
            step()
        for episode in self.run.artifacts:
            self.offer(episode)
        self.check_stored()
        self.sweep()

    def is_there(self, episode: str) -> bool:
        receipt = self.store.receipt(episode)
        if receipt is None:
            return False
        data = self.store.artifact_path(episode).read_bytes()
        assert data == self.run.artifacts[episode], f"{episode}: other bytes are stored"
        assert (receipt.artifact.sha256, receipt.artifact.bytes) == (sha256(data), len(data)), f"{episode}: the receipt"
        return True

    def check_stored(self) -> None:
        for episode, digest in self.stored.items():
            assert self.is_there(episode), f"{episode} was told to be stored and is not"
            assert digest == sha256(self.run.artifacts[episode])

    def look(self) -> None:
        """A client asks where its uploads stand."""
        for token, offset in self.offsets.items():
            try:
                look = self.store.uploads.look(token)
            except UnknownUpload:
                assert self.is_there(self.episodes[token]), f"the upload of {self.episodes[token]} is gone"
                continue
            assert look.ended is not None or look.offset >= offset, f"{self.episodes[token]}: {look} after {offset}"

    def go_on(self) -> None:
        """A client sends the rest of an upload that it knows by its URL."""
        for token, offset in self.offsets.items():
            if self.chance.random() < 0.5:
                with contextlib.suppress(UnknownUpload):
                    upload = self.store.uploads.take(token)
                    self.complete(upload, self.episodes[token], offset)

    def complete(self, upload: Any, episode: str, told: int) -> None:
        data = self.run.artifacts[episode]
        try:
            if self.ending.known(upload) is not None:
                return
            offset = upload.tell()
            assert offset >= told, f"{episode}: at {offset} after {told} were told"
            assert upload.partial.path.read_bytes()[:offset] == data[:offset], f"{episode}: other bytes arrived"
            upload.partial.write([data[offset:]])
            upload.declared = Declared(episode=episode, sha256=upload.declared.sha256, length=len(data))
            answer = self.ending.finish(upload)
            assert answer.status in (200, 201), f"{episode}: {answer}"
        finally:
            self.ending.leave(upload)

    def offer(self, episode: str) -> None:
        """What a client does that knows nothing any more: create, append, until it is stored."""
        data = self.run.artifacts[episode]
        declared = Declared(episode=episode, sha256=sha256(data), length=len(data))
        receipt = self.store.receipt(episode)
        if receipt is not None:
            answer = compare(declared.sha256, None, receipt)
            assert isinstance(answer, Answer)
            assert answer.status == 200, f"{episode}: {answer}"
        else:
            upload = self.store.uploads.create(declared)
            assert upload.token == self.named.get(episode, upload.token), f"{episode}: its upload is not found again"
            self.complete(upload, episode, self.offsets.get(upload.token, 0))
        assert self.is_there(episode), f"{episode} is not stored"

    def sweep(self) -> None:
        """Nothing is left for ever."""
        uploads = self.root / "uploads"
        for path in [*uploads.rglob("*"), *self.root.glob(".*"), *self.root.glob("episodes/.*")]:
            if path.is_file():
                os.utime(path, (time.time() - WEEKS_S,) * 2)
        (uploads / "clock").unlink(missing_ok=True)  # the clock has been right for all that time
        Store(ReceiverSettings(root=str(self.root), reserve_bytes=0)).mend()
        left = {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}
        kinds = ("tar.zst", "receipt.json")
        assert left == {
            "secret",
            "uploads/clock",
            *(f"episodes/{one}.{kind}" for one in self.run.artifacts for kind in kinds),
        }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_the_receiver_loses_power(blackout_run: Run, tmp_path: Path, loss: Loss) -> None:
    run = blackout_run
    name = f"the receiver loses power, {loss.value}"
    chance = faults.chance(name)
    disk = Disk(run.store, run.store_before)
    tried = 0
    for moment in moments(run, [disk], name):
        for _ in range(faults.times(TIMES)):
            tried += 1
            root = put(run, disk, tmp_path / str(tried), loss, chance)
            try:
                Restarted(run, root, told_before(run, moment), chance).check()
            except BaseException as error:
                error.add_note(
                    f"power was lost at line {moment} of {run.top.parent / 'trace'}; what came of it: {root}"
                )
                raise
            shutil.rmtree(root)
    what = f"the receiver loses power at each call ({loss.value}), its store goes on with what survived"
    count(name, what, len(all_moments(run, [disk])), tried)


# --- the spool, in this process -----------------------------------------------------------------------------------


def check_spool(run: Run, root: Path, receiver: Disk, told: dict[str, int], moment: int) -> None:
    """What a start does, and then: each episode in one place, whole; in ``shipped/`` only what is safe."""
    spool = Spool(root)
    spool.create()
    spool.remove_temporaries()
    spool.finish_quarantines()
    spool.sweep()
    look = spool.look()
    receipts = {line["receipt"]["episode"] for line in journal_lines(spool)}  # type: ignore[index]
    recorded = {path.name: tree(path) for path in (run.spool_before / "episodes").iterdir()}
    found: dict[str, list[str]] = {name: [] for name in recorded}
    for place in ("episodes", "shipped", "quarantine"):
        for path in (root / place).iterdir():
            if path.name.startswith("."):
                assert path.name.startswith(".removing-"), f"{path} is left"
                assert told["drop?"] <= moment
                continue
            name = "conflict" if path.name == "another" else path.name
            facts = tree(path)
            facts.pop(REASON_FILE, None) if place == "quarantine" else None
            assert facts == recorded[name], f"{path} is not what was recorded"
            found[name].append(f"{place}/{path.name}")
            if place == "shipped":
                kept = receiver.content(f"episodes/{path.name}.tar.zst", Loss.ALL)
                assert kept == run.artifacts[path.name], f"{path.name} is in shipped/ and not on the receiver's disk"
                assert path.name in receipts, f"{path.name} is in shipped/ without a receipt"
    for name, places in found.items():
        dropped = name == "refused" and told["drop?"] <= moment
        assert len(places) == 1 or (dropped and not places), f"{name} is in {places}"
    if told["retry"] <= moment <= told["keep-local?"]:
        assert found["refused"] == ["episodes/refused"], "an operator was told that it is back"
    if told["keep-local"] <= moment:
        assert found["conflict"] in (["episodes/another"], ["shipped/another"]), "an operator was told so"
        assert look.held == []
    if told["drop"] <= moment:
        assert found["refused"] == [], "an operator was told that it is gone"
    for name, _ in look.ready:
        manifest = spool.outbox.find(name)
        if manifest is not None:
            assert sha256(spool.outbox.artifact(name).read_bytes()) == manifest.artifact_sha256


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_the_shipper_loses_power(blackout_run: Run, tmp_path: Path, loss: Loss) -> None:
    """And the receiver loses it at the same moment, all that it has not synced."""
    run = blackout_run
    name = f"the shipper loses power, {loss.value}"
    chance = faults.chance(name)
    spool, store = Disk(run.spool, run.spool_before), Disk(run.store, run.store_before)
    places = f"{run.top}/told/"
    told = {call.path.removeprefix(places): call.begun for call in run.calls if call.path.startswith(places)}
    tried = 0
    for moment in moments(run, [spool, store], name):
        for _ in range(faults.times(TIMES)):
            tried += 1
            root = put(run, spool, tmp_path / str(tried), loss, chance)
            try:
                check_spool(run, root, store, told, moment)
            except BaseException as error:
                error.add_note(
                    f"power was lost at line {moment} of {run.top.parent / 'trace'}; what came of it: {root}"
                )
                raise
            shutil.rmtree(root)
    what = f"the shipper loses power at each call ({loss.value}), and the receiver all that is not synced"
    count(name, what, len(all_moments(run, [spool, store])), tried)


# --- both, as processes -------------------------------------------------------------------------------------------

AS_PROCESSES = 40  # of all calls: each takes about three seconds


@pytest.mark.parametrize("lost", ["receiver", "shipper", "both"])
@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_they_go_on_together(blackout_run: Run, tmp_path: Path, lost: str) -> None:
    """Who lost no power was killed at the same moment, and has all that it wrote."""
    run = blackout_run
    name = f"power loss, {lost}, then a pass"
    chance = faults.chance(name)
    spool, store = Disk(run.spool, run.spool_before), Disk(run.store, run.store_before)
    tried = 0
    for moment in moments(run, [spool, store], name, most=AS_PROCESSES, least=1):
        tried += 1
        top = tmp_path / str(tried)
        top.mkdir()
        shutil.copy(run.top / "commits", top)
        for disk, root, whose in ((spool, top / "spool", "shipper"), (store, top / "store", "receiver")):
            put(run, disk, root, chance.choice(LOSSES) if lost in (whose, "both") else Loss.NOTHING, chance)
        try:
            go_on(run, top, moment)
        except BaseException as error:
            error.add_note(f"power was lost at line {moment} of {run.top.parent / 'trace'}; what came of it: {top}")
            raise
        shutil.rmtree(top)
    what = f"a real pass to a real receiver after a loss of power: {lost}"
    faults.count(name, what, of=AS_PROCESSES, tried=tried, test="tests/crash/test_power_loss.py")


def go_on(run: Run, top: Path, moment: int) -> None:
    """A pass, and what every episode came to."""
    told = {one.path.rpartition("/")[2] for one in told_before(run, moment) if one.stored_sha256 is not None}
    with contextlib.closing(Receiver(top / "store", *blackout.receiver_options(top))) as receiver:
        result = Shipper(blackout.settings(top / "spool", receiver.url)).run_once()
        assert result.transient_failures == 0
        shipped = {path.name for path in (top / "spool" / "shipped").iterdir()}
        others = {"conflict", "another", "refused"}
        assert shipped - others == set(blackout.EPISODES) - others
        for episode in shipped | (told & set(run.artifacts)):
            expected = run.artifacts[episode]
            if episode == "conflict" and episode in shipped:  # nobody else's stood there
                assert receiver.artifact(episode).exists()
            else:
                assert receiver.artifact(episode).read_bytes() == expected, f"{episode} is not what was sent"
        places = {name: [] for name in ("conflict", "refused")}  # type: dict[str, list[str]]
        for place in ("episodes", "shipped", "quarantine"):
            for path in (top / "spool" / place).iterdir():
                if path.name in others:
                    places["refused" if path.name == "refused" else "conflict"].append(f"{place}/{path.name}")
        assert len(places["conflict"]) == 1, places
        assert places["refused"] in ([], ["quarantine/refused"])
        if places["conflict"] == ["episodes/conflict"]:
            assert (top / "spool" / "holds" / "conflict.json").exists()


# --- the receiver, while the shipper lives ------------------------------------------------------------------------

OUTAGES = 30


@pytest.mark.timeout(900 if faults.SHARE > 0.1 else 120)
def test_the_receiver_loses_power_under_a_shipper_that_lives(tmp_path: Path) -> None:
    if not syscalls.works():
        pytest.skip("strace is missing, or may not trace here")
    name = "the receiver loses power under a shipper that lives"
    chance = faults.chance(name)
    outages = 0
    for number in range(faults.times(OUTAGES)):
        outages += with_outages(tmp_path / str(number), chance)
    what = "the receiver's power is lost while a pass is under way, which goes on with what survived"
    faults.count(name, what, of=2 * OUTAGES, tried=outages, test="tests/crash/test_power_loss.py")


def with_outages(top: Path, chance: random.Random) -> int:
    """A pass of some two seconds with at most two losses of power; how many it was."""
    top.mkdir()
    before, trace, outages = top / "before0", top / "trace", 0
    before.mkdir()
    with contextlib.closing(
        Receiver(top / "store", "--set", "receiver.reserve_bytes=0", prefix=syscalls.strace(trace))
    ) as receiver:
        lab = Lab(top, receiver.url, {**blackout.VALUES})
        recorded = {}
        for episode, size in (("small", 2_000), ("appended", 700_000), ("streamed", 2_000_000)):
            recorded[episode] = contents(tree(lab.episode(episode, {"data": noise(size, episode)})))
        upload = {"bandwidth": "1.5MB", "retries": 50, "retry_min_s": "50ms", "retry_max_s": "200ms"}
        file = lab.settings_file({"upload": {**blackout.VALUES["upload"], **upload}})
        with Command("once", "-c", file, "--quiet", log=top / "once.log") as command:
            while outages < 2:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.process.wait(chance.uniform(0.3, 1.5))
                    break
                receiver.kill()
                outages += 1
                disk = Disk(receiver.root, before)
                for call in syscalls.read(trace, [receiver.root]):
                    disk.feed(call)
                was = receiver.root.rename(top / f"was{outages}")
                disk.write_to(receiver.root, chance.choice(LOSSES), chance, another_boot)
                keep_inodes(was, receiver.root)
                before = Path(shutil.copytree(receiver.root, top / f"before{outages}"))
                receiver.start()
            command.wait()
            assert "Traceback" not in command.log
        lab.once()
        assert lab.names("shipped") == sorted(recorded)
        for episode, expected in recorded.items():
            assert contents_of(receiver.artifact(episode).read_bytes()) == expected, f"{episode} in {top}"
    return outages
