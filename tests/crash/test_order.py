"""In what order things become durable, and what is said then, in a trace of a real run: ``fsync`` of a file, its name,
``fsync`` of the directory, the answer; the receipt, the move to ``shipped/``, the end of the artifact.

Each rule is also put to traces in which one kind of sync is missing: it must find that out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import faults
import msgspec
import pytest
from blackout import EPISODES, OTHERS, Exchange, Run, exchanges, sha256
from disk import Disk, Loss
from syscalls import Call

NOT_SYNCED = ("outbox/", "state/", "uploads/ended/", "uploads/clock")
"""Where files are named whose data is not synced: the outbox is packed again, status is told again, a tombstone is only
an answer to somebody who asks twice, and a clock of which nothing is known ages nothing."""


class Broken(AssertionError):
    """A rule does not hold."""


def need(true: object, what: str) -> None:
    if not true:
        raise Broken(what)


def uploads_of(told: list[Exchange]) -> dict[str, str]:
    """The episode of each upload."""
    return {
        one.answered["location"].rpartition("/")[2]: one.path.rpartition("/")[2]
        for one in told
        if "location" in one.answered
    }


def episode_of(one: Exchange, uploads: dict[str, str]) -> str:
    name = one.path.rpartition("/")[2]
    return name if one.path.startswith("/v1/episodes/") else uploads[name]


def check_receiver(run: Run, calls: list[Call]) -> int:
    """What is told is on the disk, at each answer; how many answers that were."""
    told = exchanges(calls)
    uploads = uploads_of(told)
    disk = Disk(run.store, run.store_before)
    fed = checked = 0
    for one in sorted(told, key=lambda one: one.at):
        while fed < len(calls) and calls[fed].ended < one.at:
            disk.feed(calls[fed])
            fed += 1
        about = f"{one.method} {one.path}: {one.status} at line {one.at}"
        episode = episode_of(one, uploads)
        if one.stored_sha256 is not None:
            kept = disk.content(f"episodes/{episode}.tar.zst", Loss.ALL)
            need(kept is not None and sha256(kept) == one.stored_sha256, f"{about}: is not on the disk")
            checked += 1
        elif one.answered.get("upload-complete") == "?0" and "upload-offset" in one.answered:
            name = (
                one.path.rpartition("/")[2] if "/uploads/" in one.path else one.answered["location"].rpartition("/")[2]
            )
            offset = int(one.answered["upload-offset"])
            part, counter = (disk.content(f"uploads/{name}.{kind}", Loss.ALL) for kind in ("part", "lock"))
            need(disk.content(f"uploads/{name}.json", Loss.ALL), f"{about}: the upload's record is not on the disk")
            need(part is not None and len(part) >= offset, f"{about}: {offset} bytes are not on the disk")
            counted = (counter or b"").split()[1:2]
            need(counted and int(counted[0]) >= offset, f"{about}: the counter is not on the disk")
            need(run.artifacts[episode].startswith((part or b"")[:offset]), f"{about}: other bytes are on the disk")
            checked += 1
    return checked


def check_names(run: Run, calls: list[Call], root: Path, before: Path) -> int:
    """A file gets its name when its data is on the disk, and a published artifact is never written again."""
    disk = Disk(root, before)
    published: set[int] = set()
    checked = 0
    for call in calls:
        inside = call.path.startswith(f"{root}/")
        if inside and call.name in ("write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate"):
            need(id(disk.node_of(call)) not in published, f"{call.path} is written after it was published")
        elif inside and call.name in ("rename", "link"):
            node = disk.find(call.path.removeprefix(f"{root}/"))
            name = call.other.removeprefix(f"{root}/")
            if node is not None and not node.directory and not name.startswith(NOT_SYNCED):
                late = [edit for edit in node.pending if edit.at < call.begun]
                need(not late, f"{call.other} gets its name before its data is on the disk")
                checked += 1
            if node is not None and re.fullmatch(r"episodes/[^/]+\.tar\.zst", name):
                published.add(id(node))
        disk.feed(call)
    return checked


def check_publishing(run: Run, calls: list[Call]) -> int:
    """The steps themselves, for each artifact: written, synced, linked, directory synced, told."""
    told = exchanges(calls)
    uploads = uploads_of(told)
    for episode in run.artifacts:
        target = f"{run.store}/episodes/{episode}.tar.zst"
        (link,) = [call for call in calls if call.name == "link" and call.other == target]
        written = max(c.ended for c in calls if c.name.startswith("pwrite") and c.path == link.path)
        synced = [c for c in calls if c.name == "fsync" and c.path == link.path and written < c.begun]
        need(synced and synced[0].ended < link.begun, f"{episode}: the artifact is not synced before it is named")
        answers = [one.at for one in told if one.stored_sha256 is not None and episode_of(one, uploads) == episode]
        named = [
            call.ended
            for call in calls
            if call.name == "fsync" and call.path == f"{run.store}/episodes" and call.begun > link.ended
        ]
        need(answers and named and min(named) < min(answers), f"{episode}: told before its name is synced")
    return len(run.artifacts)


def check_receipts(run: Run, calls: list[Call]) -> int:
    """A receipt gets its place beside an artifact whose bytes and name are on the disk: so it is believed (`Store`)."""
    disk = Disk(run.store, run.store_before)
    checked = 0
    for call in calls:
        match = re.fullmatch(re.escape(f"{run.store}/episodes/") + r"([^/]+)\.receipt\.json", call.other)
        if match is not None and call.name == "rename":
            kept = disk.content(f"episodes/{match[1]}.tar.zst", Loss.ALL)
            need(kept == run.artifacts[match[1]], f"{match[1]}: its receipt is in place before it is on the disk")
            checked += 1
        disk.feed(call)
    return checked


def check_retiring(run: Run, calls: list[Call]) -> int:
    """Answer, receipt and its file's name, the move, both directories, and only then the artifact goes."""
    told = exchanges(calls)
    uploads = uploads_of(told)
    disk = Disk(run.spool, run.spool_before)
    checked = 0
    for call in calls:
        if call.name == "rename" and call.other.startswith(f"{run.spool}/shipped/"):
            episode = call.path.rpartition("/")[2]
            answers = [one for one in told if one.stored_sha256 is not None and episode_of(one, uploads) == episode]
            need(answers and answers[0].at < call.begun, f"{episode} is moved before it is answered")
            lines = b"".join(
                disk.content(f"receipts/{path.name}", Loss.ALL) or b"" for path in run.spool.glob("receipts/*.jsonl")
            ).splitlines()
            receipts = [msgspec.json.decode(line)["receipt"]["episode"] for line in lines]
            need(episode in receipts, f"{episode} is moved before its receipt is on the disk")
            gone = [c for c in calls if c.name == "unlink" and c.path == f"{run.spool}/outbox/{episode}.tar.zst"]
            for directory in ("shipped", "episodes"):
                synced = [c for c in calls if c.name == "fsync" and c.path == f"{run.spool}/{directory}"]
                kept = [c for c in synced if call.ended < c.begun and c.ended < gone[-1].begun]
                need(kept, f"{episode}: {directory}/ is not synced before the artifact goes")
            checked += 1
        elif call.name == "rename" and call.other.startswith(f"{run.spool}/quarantine/") and "/.tmp-" not in call.path:
            decided = [
                name
                for name in (disk.find("quarantine").now if (disk.find("quarantine")) else {})  # type: ignore[union-attr]
                if name.startswith(".condemned-") and disk.content(f"quarantine/{name}", Loss.ALL)
            ]
            if call.path.startswith(f"{run.spool}/episodes/"):
                need(decided, f"{call.path} is moved before the decision is on the disk")
                checked += 1
        disk.feed(call)
    return checked


RULES: dict[str, Callable[[Run, list[Call]], int]] = {
    "told by the receiver": check_receiver,
    "named by the receiver": lambda run, calls: check_names(run, calls, run.store, run.store_before),
    "named by the shipper": lambda run, calls: check_names(run, calls, run.spool, run.spool_before),
    "published": check_publishing,
    "receipts": check_receipts,
    "retired": check_retiring,
}
LEAST = {
    "told by the receiver": 25,
    "named by the receiver": 2 * len(OTHERS) + len(EPISODES),
    "named by the shipper": 6,
    "published": len(OTHERS) + len(EPISODES) - 1,
    "receipts": len(OTHERS) + len(EPISODES) - 1,
    "retired": 10,
}
"""Steps that a rule must find in the run."""

MISSING: dict[str, list[str]] = {
    r"fsync .*/store/episodes": ["told by the receiver", "published", "receipts"],
    r"fdatasync .*/store/uploads/[0-9a-f]{64}\.part": ["told by the receiver"],
    r"fdatasync .*\.lock": ["told by the receiver"],
    r"fsync .*/store/uploads": ["told by the receiver"],
    r"fsync .*/store": ["told by the receiver"],
    r"fsync .*\.part": ["published", "named by the receiver"],
    r"fsync .*\.receipt": ["named by the receiver"],
    r"fsync .*\.jsonl": ["retired"],
    r"fsync .*/spool/receipts": ["retired"],
    r"fsync .*/spool": ["retired"],
    r"fsync .*/spool/shipped": ["retired"],
    r"fsync .*/spool/quarantine": ["retired"],
    r"fsync .*/spool/quarantine/\.tmp-.*": ["named by the shipper"],
    r"fsync .*/spool/holds/\.tmp-.*": ["named by the shipper"],
}
"""A sync that is left out of the trace, and the rules that do not hold without it."""


@pytest.mark.parametrize("rule", RULES)
def test_the_order_is_kept(blackout_run: Run, rule: str) -> None:
    checked = RULES[rule](blackout_run, blackout_run.calls)
    assert checked >= LEAST[rule]
    what = f"order of durability: {rule}"
    faults.count(what, "steps of a traced run in order", of=checked, tried=checked, test="tests/crash/test_order.py")


@pytest.mark.parametrize("missing", MISSING)
def test_a_sync_that_is_missing_is_found(blackout_run: Run, missing: str) -> None:
    calls = [call for call in blackout_run.calls if not re.fullmatch(missing, f"{call.name} {call.path}")]
    assert len(calls) < len(blackout_run.calls)
    for rule in MISSING[missing]:
        with pytest.raises(Broken):
            RULES[rule](blackout_run, calls)


def test_the_run_has_all_that_matters(blackout_run: Run) -> None:
    told = exchanges(blackout_run.calls)
    assert {*EPISODES, *OTHERS, "another"} - {"refused"} == set(blackout_run.artifacts)
    for name, data in OTHERS.items():
        assert blackout_run.artifacts[name] == data
    uploads = uploads_of(told)
    ways = {name: {one.method for one in told if episode_of(one, uploads) == name} for name in EPISODES}
    assert ways["small0"] == {"PUT"}
    assert ways["appended"] == {"PUT", "PATCH"}
    assert ways["streamed"] == {"HEAD", "PUT", "PATCH"}
    assert {one.status for one in told} >= {200, 201, 204, 400, 404, 409, 412}


# --- the model itself ---------------------------------------------------------------------------------------------

WRITTEN = b"x" * 10_000


def left_of(tmp_path: Path, loss: Loss, synced: tuple[str, ...]) -> set[bytes | None]:
    """What may be under a name that was given by a rename, when those syncs were made; None: no such name."""
    before, root = tmp_path / "before", tmp_path / "root"
    before.mkdir(exist_ok=True)
    temporary, name = f"{root}/.tmp", f"{root}/name"
    steps = [
        Call("openat", 1, 1, 1, 3, path=temporary, fd=3, flags="O_WRONLY|O_CREAT"),
        Call("write", 2, 2, 1, len(WRITTEN), path=temporary, fd=3, data=WRITTEN),
        Call("fsync", 3, 4, 1, 0, path=temporary, fd=3),
        Call("rename", 5, 5, 1, 0, path=temporary, other=name),
        Call("fsync", 6, 7, 1, 0, path=str(root), fd=4),
    ]
    disk = Disk(root, before)
    for step in steps:
        if step.name != "fsync" or step.path in synced:
            disk.feed(step)
    chance, found = faults.chance("model"), set()
    for number in range(200):
        target = tmp_path / f"{loss.value}{len(synced)}-{number}"
        disk.write_to(target, loss, chance, lambda data: data)
        path = target / "name"
        found.add(path.read_bytes() if path.exists() else None)
    return found


def test_what_the_model_loses(tmp_path: Path) -> None:
    file, directory = f"{tmp_path}/root/.tmp", f"{tmp_path}/root"
    for loss in Loss:
        assert left_of(tmp_path, loss, (file, directory)) == {WRITTEN}
    assert left_of(tmp_path, Loss.NOTHING, ()) == {WRITTEN}
    assert left_of(tmp_path, Loss.ALL, ()) == {None}
    ordered = left_of(tmp_path, Loss.ORDERED, ())
    assert {None, b"", WRITTEN} < ordered
    assert all(WRITTEN.startswith(data) for data in ordered - {None} if data is not None)
    any_part = left_of(tmp_path, Loss.ANY, ())
    assert {None, b"", WRITTEN, bytes(len(WRITTEN))} < any_part
    torn = {len(data) for data in any_part if data is not None and data.strip(b"x")}
    assert len(torn) > 1
