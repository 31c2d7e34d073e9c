"""A receiver's limits for a token, met by the shipper: it waits, and nothing is given up for them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from lab import Daemon, Lab, Receiver, Sections, fastship, noise, wait_until

MakeLab = Callable[..., Lab]

PATIENT: Sections = {"destination": {"pause_min_s": "100ms", "pause_max_s": "500ms"}, "upload": {"retry_min_s": "50ms"}}


def shipped_all(make_lab: MakeLab, tmp_path: Path, line: str, episodes: int, size: int) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"the-token {line}\n")
    (tmp_path / "token").write_text("the-token\n")
    receiver = Receiver(tmp_path / "store", "--token-file", tokens)
    sections = {**PATIENT, "destination": {**PATIENT["destination"], "token_file": str(tmp_path / "token")}}
    with contextlib.closing(receiver):
        lab = make_lab(receiver.url)
        names = {f"ep{number}" for number in range(episodes)}
        for name in names:
            lab.episode(name, files={"data": noise(size)})
        with Daemon(lab.settings(sections)):
            wait_until(lambda: set(lab.names("shipped")) == names, "all are shipped")
        assert receiver.stored() == names
        assert lab.names("quarantine") == []
        assert lab.names("holds") == []


def is_paused(lab: Lab) -> bool:
    snapshot = lab.snapshot()
    return snapshot is not None and snapshot.destination.state == "paused"


def test_bytes_that_are_stored(make_lab: MakeLab, tmp_path: Path) -> None:
    """The rest waits, `fastship status` says for what, and it goes on when there may be more."""
    tokens = tmp_path / "tokens"
    tokens.write_text("the-token name=lab stored-bytes=7MB\n")
    (tmp_path / "token").write_text("the-token\n")
    receiver = Receiver(tmp_path / "store", "--token-file", tokens)
    sections = {**PATIENT, "destination": {**PATIENT["destination"], "token_file": str(tmp_path / "token")}}
    with contextlib.closing(receiver):
        lab = make_lab(receiver.url)
        names = {f"ep{number}" for number in range(4)}
        for number, name in enumerate(sorted(names)):
            lab.episode(name, files={"data": noise(3_000_000, number)})
        with Daemon(lab.settings(sections)):
            wait_until(lambda: is_paused(lab), "the destination is paused")
            status = fastship("status", "-c", lab.settings_file(sections))
            shown = subprocess.run(status, stdout=subprocess.PIPE, text=True, check=True).stdout
            assert "bytes stored here and may have 7000000" in " ".join(shown.split())
            assert len(lab.names("shipped")) == len(receiver.stored()) == 2
            assert lab.names("quarantine") == []
            assert lab.names("holds") == []
            tokens.write_text("the-token name=lab stored-bytes=70MB\n")
            wait_until(lambda: set(lab.names("shipped")) == names, "all are shipped")
        assert receiver.stored() == names


def test_a_rate(make_lab: MakeLab, tmp_path: Path) -> None:
    shipped_all(make_lab, tmp_path, "rate=5/s", 15, 1000)


def test_bytes_of_unfinished_uploads(make_lab: MakeLab, tmp_path: Path) -> None:
    """Two of them are too much at a time."""
    shipped_all(make_lab, tmp_path, "upload-bytes=9MB", 4, 6_000_000)
