"""The snapshot on disk, and what systemd is told."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from fastship import status


def snapshot(**changes: object) -> status.Snapshot:
    first = status.Snapshot(
        pid=os.getpid(),
        started_at=1.0,
        updated_at=2.0,
        draining=False,
        ready=3,
        recording=4,
        held=5,
        totals=status.PassResult(scanned=6, shipped=7),
        destination=status.DestinationStatus(url="http://127.0.0.1:1", state="paused", reason="401", retry_in_s=1.5),
        progress=[status.EpisodeProgress(episode="ep", stage="packing", worker=1)],
        recent=[status.EpisodeResult(episode="ep", outcome="shipped")],
        workers=[status.WorkerStatus(number=1, pid=2, threads=3, packing=1, shipping=0)],
    )
    return msgspec.structs.replace(first, **changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert status.read(tmp_path) is None
    for one in (snapshot(), snapshot(draining=True, progress=[])):
        status.write(tmp_path, one)
        assert status.read(tmp_path) == one
    assert os.listdir(tmp_path) == [status.STATUS_FILE]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_what_cannot_be_read_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / status.STATUS_FILE).write_bytes(raw)
    assert status.read(tmp_path) is None


def test_a_snapshot_of_another_version_is_read_where_it_can_be(tmp_path: Path) -> None:
    status.write(tmp_path, snapshot())
    value = msgspec.json.decode((tmp_path / status.STATUS_FILE).read_bytes(), type=dict[str, object])
    (tmp_path / status.STATUS_FILE).write_bytes(msgspec.json.encode(value | {"new_field": 1}))
    assert status.read(tmp_path) == snapshot()


def test_a_disk_that_says_no_stops_nothing(tmp_path: Path) -> None:
    status.write(tmp_path / "nothing", snapshot())
    assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_a_piece(tmp_path: Path) -> None:
    status.write(tmp_path, snapshot())
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            status.write(tmp_path, snapshot(ready=number, progress=snapshot().progress * (number % 50)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(status.read(tmp_path) is not None for _ in range(500))
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"fastship-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}" if abstract else name)
        listener.settimeout(60.0)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        status.notify("READY=1")
        status.notify("WATCHDOG=1")
        assert [listener.recv(100), listener.recv(100)] == [b"READY=1", b"WATCHDOG=1"]


@pytest.mark.parametrize("address", ["", "/nothing/there", "x" * 500])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    status.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    status.notify("READY=1")
