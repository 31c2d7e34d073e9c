"""Copies in ``shipped/`` that may go: by age, by size, for room; and which do not, whatever was allowed."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Daemon, Destination, Lab, Receiver, noise, wait_until

from fastship.spool import Shelf
from fastship.status import RetentionStatus
from fastship.supervisor import disk as disk_module

MakeLab = Callable[..., Lab]
NAMES = ["ep1", "ep2", "ep3", "ep4"]
SIZE = 50_000


def ship(lab: Lab) -> None:
    """One after the other, each with a copy in ``shipped/``."""
    for name in NAMES:
        lab.episode(name, files={"data": noise(SIZE, name)})
    assert lab.once().shipped == len(NAMES)


@contextlib.contextmanager
def running(lab: Lab, **retention: Any) -> Any:
    with Daemon(lab.settings({"retention": {"quarantine_cleanup_interval_s": 0.2, **retention}})) as daemon:
        yield daemon


def told(lab: Lab) -> RetentionStatus:
    snapshot = lab.snapshot()
    return (snapshot and snapshot.retention) or RetentionStatus()


def test_without_a_rule_copies_stay_and_a_removal_that_was_begun_is_finished(lab: Lab) -> None:
    ship(lab)
    shutil.copytree(lab.shipped / "ep1", lab.shipped / ".retired-ep0")
    with running(lab):
        wait_until(lambda: lab.names("shipped") == NAMES, "the removal to be finished")
        time.sleep(0.5)
    assert lab.names("shipped") == NAMES
    assert told(lab) == RetentionStatus()


def test_by_size_the_oldest_go_until_what_is_left_fits(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab)
    with running(lab, shipped_max_bytes=2 * SIZE + 30_000):
        wait_until(lambda: told(lab).removed == 2, "two to go")
        wait_until(lambda: told(lab).copies == 2, "two to be left")
    assert lab.names("shipped") == ["ep3", "ep4"]
    assert own_receiver.stored() == set(NAMES)
    assert len([line for path in lab.root.glob("receipts/*") for line in path.read_bytes().splitlines()]) == 4


def test_by_age_only_the_old_go(make_lab: MakeLab, own_receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab)
    copies = Shelf.copies

    def aged(shelf: Shelf) -> list[Any]:
        return [one if one.name != "ep1" else old(one) for one in copies(shelf)]

    def old(copy: Any) -> Any:
        import msgspec

        return msgspec.structs.replace(copy, retired_at=time.time() - 40 * 86400)

    monkeypatch.setattr(Shelf, "copies", aged)
    with running(lab, shipped_keep_days=30):
        wait_until(lambda: told(lab).removed == 1, "the old one to go")
        time.sleep(0.5)
    assert lab.names("shipped") == ["ep2", "ep3", "ep4"]


def test_for_room_they_go_at_once_while_the_disk_is_short(
    make_lab: MakeLab, own_receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab)
    monkeypatch.setattr(disk_module.DiskWatch, "missing_bytes", property(lambda _: 1 << 40))
    with running(lab, shipped_make_room=True, quarantine_cleanup_interval_s=3600):
        wait_until(lambda: lab.names("shipped") == [], "all to go: there is never enough room")


def test_what_the_receiver_does_not_confirm_stays_and_is_shown(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab)
    own_receiver.artifact("ep1").unlink()  # lost
    data = bytearray(own_receiver.artifact("ep2").read_bytes())
    data[SIZE // 2] ^= 1  # rotten
    own_receiver.artifact("ep2").write_bytes(data)
    (lab.shipped / "ep3" / "notes").write_text("an operator's, nowhere else")
    with running(lab, shipped_max_bytes=1):
        wait_until(lambda: told(lab).removed == 1 and told(lab).kept == 3, "one to go and three to be kept")
    assert lab.names("shipped") == ["ep1", "ep2", "ep3"]
    assert told(lab).why.startswith("ep3: it is not what was shipped")


def test_a_receiver_that_is_away_or_cannot_read_again_confirms_nothing(
    lab: Lab, destination: Destination, own_receiver: Receiver
) -> None:
    ship(lab)
    with running(lab, shipped_max_bytes=1):  # this one knows no way to be asked
        wait_until(lambda: "cannot read again" in told(lab).waits, "it to be said")
    own_receiver.kill()
    lab.url = own_receiver.url
    with running(lab, shipped_max_bytes=1):
        wait_until(lambda: "cannot be asked" in told(lab).waits, "it to be said")
    assert lab.names("shipped") == NAMES
    assert told(lab).removed == 0


def test_what_is_not_shipped_is_never_touched(make_lab: MakeLab, own_receiver: Receiver, tmp_path: Path) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab)
    lab.episode("ep5", marker=False)
    shutil.move(lab.shipped / "ep4", tmp_path)
    lab.episode("stray")
    shutil.move(lab.episodes / "stray", lab.shipped / "stray")  # with no receipt
    with running(lab, shipped_max_bytes=1):
        wait_until(lambda: lab.names("shipped") == ["stray"], "the others to go")
        wait_until(lambda: told(lab).copies == 0, "a further round")
    assert lab.names("shipped") == ["stray"]
    assert lab.names("episodes") == ["ep5"]
