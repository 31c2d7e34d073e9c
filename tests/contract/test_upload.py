"""The native dialect against the real receiver process: real artifacts, real TLS, real cuts and kills."""

from __future__ import annotations

import json
import random
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from relay import Relay
from scripted_server import GENEROUS_S, MEGABYTE, make_artifact, ship_all, wait_until

from fastship.episode import Outcome, Receipt, Scope, Verdict
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, Session, ship

pytest.importorskip("uvicorn", reason="the receiver needs the extra fastship[receiver]")

UPLOAD = UploadSettings(retries=8, retry_min_s=0.05, retry_max_s=1.0, one_shot_bytes=MEGABYTE)
SERVE = """
import sys, msgspec
from fastship.receiver import serve
from fastship.settings import ReceiverSettings
sys.exit(serve(msgspec.json.decode(sys.argv[1], type=ReceiverSettings), announce=lambda url: print(url, flush=True)))
"""


class Receiver:
    """A receiver process of its own on loopback, which may be killed and started again on the same port."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        self._settings = {
            "root": str(root),
            "listen": "127.0.0.1:0",
            "reserve_bytes": 0,
            "verify": "artifact",
        } | settings
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with open(self.root.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, json.dumps(self._settings)], stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], GENEROUS_S)
        self.url = self._process.stdout.readline().decode().strip() if readable else ""
        assert self.url, self.root.with_suffix(".log").read_text()
        self._settings["listen"] = self.url.partition("://")[2]  # of the next start

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(GENEROUS_S)
        self._process.stdout.close()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stored(self, artifact: Artifact) -> bool:
        return (
            self.root / "episodes" / f"{artifact.manifest.episode}.tar.zst"
        ).read_bytes() == artifact.path.read_bytes()


MakeReceiver = Callable[..., Receiver]


@pytest.fixture
def start_receiver(tmp_path: Path) -> Iterator[MakeReceiver]:
    started: list[Receiver] = []

    def start(**settings: Any) -> Receiver:
        started.append(Receiver(tmp_path / f"receiver{len(started)}", **settings))
        return started[-1]

    yield start
    for receiver in started:
        receiver.close()


class Line(Relay):
    """A TCP relay that cuts each connection after so many bytes towards the receiver; None: not at all."""

    def __init__(self, port: int, *cuts: int | None) -> None:
        self._cuts = cuts
        self.carried: dict[int, int] = {}  # bytes towards the receiver, by connection
        super().__init__(port)

    def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
        if outward:
            self.carried[number] = 0
        cut = self._cuts[number] if outward and number < len(self._cuts) else None
        left = cut if cut is not None else 1 << 62
        while left > 0 and (piece := source.recv(min(65536, left))):
            sink.sendall(piece)
            left -= len(piece)
            if outward:
                self.carried[number] += len(piece)


def pack_episode(directory: Path, name: str, size: int, commit: str | None = None) -> Artifact:
    """A real artifact of a directory with ``size`` bytes that do not compress."""
    episode = directory / "recorded" / name
    episode.mkdir(parents=True)
    (episode / "samples.bin").write_bytes(random.Random(name).randbytes(size))
    if commit:
        (episode / "meta.json").write_text(json.dumps({"code_version": {"commit": commit}}))
    (episode / "done.marker").touch()
    path = directory / f"{name}.tar.zst"
    with open(path, "wb") as sink, FramePool() as pool:
        manifest = pack(episode, sink, PackOptions(level=1, frame_bytes=MEGABYTE), pool)
    return Artifact(manifest, path)


def outcome_of(verdict: Verdict) -> tuple[Outcome, Scope, int | None]:
    return verdict.outcome, verdict.scope, verdict.status


SHIPPED = (Outcome.SHIPPED, Scope.EPISODE, 201)
PRESENT = (Outcome.SHIPPED, Scope.EPISODE, 200)


@pytest.mark.parametrize("size", [10_000, 5_000_000], ids=["way 1", "way 2"])
def test_a_packed_episode_is_stored_verified_and_known_again(
    tmp_path: Path, start_receiver: MakeReceiver, size: int
) -> None:
    receiver = start_receiver(verify="content")
    artifact = pack_episode(tmp_path, "ep1", size)
    destination = DestinationSettings(url=receiver.url)
    verdict = ship(artifact, destination, UPLOAD)
    assert outcome_of(verdict) == SHIPPED
    assert receiver.stored(artifact)
    receipt = verdict.receipt
    assert receipt is not None
    assert receipt.verified == "content"
    assert receipt.content is not None
    assert receipt.content.blake3 == artifact.manifest.content_blake3
    assert receipt == msgspec.json.decode((receiver.root / "episodes/ep1.receipt.json").read_bytes(), type=Receipt)
    for first_attempt in (True, False):
        again = ship(artifact, destination, UPLOAD, first_attempt=first_attempt)
        assert outcome_of(again) == PRESENT
        assert again.sent_bytes <= (artifact.manifest.artifact_bytes if size < MEGABYTE else 0)


@pytest.mark.parametrize("size", [10_000, 5_000_000], ids=["way 1", "way 2"])
def test_another_content_under_the_same_id_is_a_conflict(
    tmp_path: Path, start_receiver: MakeReceiver, size: int
) -> None:
    receiver = start_receiver()
    destination = DestinationSettings(url=receiver.url)
    first = make_artifact(tmp_path, size)
    assert outcome_of(ship(first, destination, UPLOAD)) == SHIPPED
    (tmp_path / "other").mkdir()
    other = make_artifact(tmp_path / "other", size + 1)
    for first_attempt in (True, False):
        verdict = ship(other, destination, UPLOAD, first_attempt=first_attempt)
        assert outcome_of(verdict) == (Outcome.CONFLICT, Scope.EPISODE, 409)
    assert receiver.stored(first)


def test_the_same_content_packed_otherwise_is_already_there(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver(verify="content")
    artifact = pack_episode(tmp_path, "ep1", 100_000)
    destination = DestinationSettings(url=receiver.url)
    assert outcome_of(ship(artifact, destination, UPLOAD)) == SHIPPED
    with open(tmp_path / "again.tar.zst", "wb") as sink, FramePool() as pool:
        manifest = pack(tmp_path / "recorded" / "ep1", sink, PackOptions(level=9, frame_bytes=65536), pool)
    assert manifest.artifact_sha256 != artifact.manifest.artifact_sha256
    assert outcome_of(ship(Artifact(manifest, tmp_path / "again.tar.zst"), destination, UPLOAD)) == PRESENT


def test_a_cut_line_goes_on_at_the_receivers_offset(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver()
    artifact = make_artifact(tmp_path, 24 * MEGABYTE)
    with Line(receiver.port, 8 * MEGABYTE, 5 * MEGABYTE) as line:
        verdict = ship(artifact, DestinationSettings(url=line.url), UPLOAD)
        carried = list(line.carried.values())
    assert outcome_of(verdict) == SHIPPED
    assert receiver.stored(artifact)
    assert verdict.resumed_at > 8 * MEGABYTE
    assert len(carried) == 3
    assert sum(carried) < 25 * MEGABYTE  # nothing that had arrived was sent again


def test_a_cut_of_way_1_goes_on_with_way_2(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver()
    artifact = make_artifact(tmp_path, 24 * MEGABYTE)
    whole = msgspec.structs.replace(UPLOAD, one_shot_bytes=1 << 40)
    with Line(receiver.port, 8 * MEGABYTE) as line:
        verdict = ship(artifact, DestinationSettings(url=line.url), whole)
    assert outcome_of(verdict) == SHIPPED
    assert receiver.stored(artifact)


def test_a_killed_receiver_is_gone_on_with_when_it_is_back(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver(sync_bytes=MEGABYTE)
    artifact = make_artifact(tmp_path, 24 * MEGABYTE)
    patient = msgspec.structs.replace(UPLOAD, retries=60, bandwidth=10_000_000)
    half_way = threading.Event()

    def watch(_episode: str, done: int, _total: int) -> None:
        if done > 6 * MEGABYTE:
            half_way.set()

    def kill_and_start() -> None:
        assert half_way.wait(GENEROUS_S)
        receiver.kill()
        receiver.start()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    verdict = ship(artifact, DestinationSettings(url=receiver.url), patient, on_progress=watch)
    killer.join()
    assert outcome_of(verdict) == SHIPPED
    assert receiver.stored(artifact)
    assert verdict.resumed_at >= MEGABYTE


def test_a_killed_client_is_gone_on_for_by_another(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver()
    artifact = make_artifact(tmp_path, 24 * MEGABYTE)
    destination = DestinationSettings(url=receiver.url)
    told: list[int] = []
    slow = msgspec.structs.replace(UPLOAD, bandwidth=20_000_000)
    session = Session(
        destination, slow, on_verdict=lambda *_: None, on_progress=lambda _episode, done, _total: told.append(done)
    )
    session.submit(artifact, first_attempt=True)
    wait_until(lambda: bool(told) and told[-1] > 8 * MEGABYTE)
    session.close()
    verdict = ship(artifact, destination, UPLOAD, first_attempt=False)
    assert outcome_of(verdict) == SHIPPED
    assert receiver.stored(artifact)
    assert verdict.resumed_at > 0
    assert verdict.sent_bytes == artifact.manifest.artifact_bytes - verdict.resumed_at


def test_a_damaged_artifact_is_neither_stored_nor_believed(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver()
    for size in (10_000, 5_000_000):
        artifact = make_artifact(tmp_path, size)
        with open(artifact.path, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
        verdict = ship(artifact, DestinationSettings(url=receiver.url), UPLOAD)
        assert outcome_of(verdict) == (Outcome.DAMAGED, Scope.EPISODE, 400)
    assert not list((receiver.root / "episodes").glob("ep1.tar.zst"))


def test_a_line_that_changes_a_byte_is_found_and_the_artifact_sent_again(
    tmp_path: Path, start_receiver: MakeReceiver
) -> None:
    receiver = start_receiver()
    artifact = make_artifact(tmp_path, 5_000_000)
    spoilt: list[int] = []

    class Spoiler(Relay):
        def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
            seen = 0
            while piece := source.recv(65536):
                if outward and number == 0 and seen <= 2_000_000 < seen + len(piece) and not spoilt:
                    spoilt.append(seen)
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                seen += len(piece)
                sink.sendall(piece)

    with Spoiler(receiver.port) as line:
        verdict = ship(artifact, DestinationSettings(url=line.url), UPLOAD)
    assert spoilt
    assert outcome_of(verdict) == SHIPPED
    assert verdict.sent_bytes == 10_000_000
    assert receiver.stored(artifact)


def test_a_commit_that_is_refused_and_one_that_is_missing(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    (tmp_path / "commits").write_text(f"#remediation: run make install\n{'a' * 40}\n")
    receiver = start_receiver(commits_file=str(tmp_path / "commits"))
    destination = DestinationSettings(url=receiver.url)
    for size in (1_000, 5_000_000):
        refused = ship(pack_episode(tmp_path, f"refused{size}", size, "b" * 40), destination, UPLOAD)
        assert outcome_of(refused) == (Outcome.REJECTED, Scope.EPISODE, 412)
        told = json.loads(refused.body)
        assert (told["your_commit"], told["head_commit"]) == ("b" * 40, "a" * 40)
        assert "make install" in told["remediation"]
        missing = ship(pack_episode(tmp_path, f"missing{size}", size), destination, UPLOAD)
        assert outcome_of(missing) == (Outcome.REJECTED, Scope.EPISODE, 400)
        assert refused.sent_bytes + missing.sent_bytes <= 2 * 2 * MEGABYTE
        assert outcome_of(ship(pack_episode(tmp_path, f"ok{size}", size, "A" * 40), destination, UPLOAD)) == SHIPPED


def test_a_rotated_token_blames_no_episode_and_a_new_one_goes_on(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    (tmp_path / "tokens").write_text("new-token\n")
    (tmp_path / "token").write_text("old-token\n")
    receiver = start_receiver(token_file=str(tmp_path / "tokens"))
    destination = DestinationSettings(url=receiver.url, token_file=str(tmp_path / "token"))
    artifact = make_artifact(tmp_path, 1000)
    assert outcome_of(ship(artifact, destination, UPLOAD)) == (Outcome.TRANSIENT, Scope.DESTINATION, 401)
    (tmp_path / "token").write_text("new-token\n")
    assert outcome_of(ship(artifact, destination, UPLOAD)) == SHIPPED


def test_too_large_and_no_room(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    artifact = make_artifact(tmp_path, 5_000_000)
    small = start_receiver(max_bytes=1_000_000)
    verdict = ship(artifact, DestinationSettings(url=small.url), UPLOAD)
    assert outcome_of(verdict) == (Outcome.REJECTED, Scope.EPISODE, 413)
    full = start_receiver(reserve_bytes=1 << 60)
    verdict = ship(artifact, DestinationSettings(url=full.url), UPLOAD)
    assert outcome_of(verdict) == (Outcome.TRANSIENT, Scope.NETWORK, 507)


def test_over_tls_with_client_certificates(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    paths: dict[str, str] = {}
    for side, name in (("server", "127.0.0.1"), ("client", "host.lab.example")):
        issued = authority.issue_cert(name)
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{side}.pem")
        issued.private_key_pem.write_to_path(tmp_path / f"{side}.key")
        paths |= {f"{side}_cert": str(tmp_path / f"{side}.pem"), f"{side}_key": str(tmp_path / f"{side}.key")}
    receiver = start_receiver(
        tls_cert=paths["server_cert"], tls_key=paths["server_key"], client_ca=str(tmp_path / "ca.pem")
    )
    artifact = make_artifact(tmp_path, 5_000_000)
    without = DestinationSettings(url=receiver.url, ca_file=str(tmp_path / "ca.pem"))
    # Python's asyncio closes without the TLS alert that would say why, so this may look like a cut (Scope.NETWORK).
    refused = ship(artifact, without, msgspec.structs.replace(UPLOAD, retries=1))
    assert refused.outcome is Outcome.TRANSIENT
    assert refused.sent_bytes == 0
    shown = msgspec.structs.replace(without, client_cert=paths["client_cert"], client_key=paths["client_key"])
    assert outcome_of(ship(artifact, shown, UPLOAD)) == SHIPPED
    assert receiver.stored(artifact)


def test_many_at_once(tmp_path: Path, start_receiver: MakeReceiver) -> None:
    receiver = start_receiver(workers=2)
    artifacts = [make_artifact(tmp_path, 1000 + 40_000 * number, f"ep{number}") for number in range(60)]
    verdicts = ship_all(artifacts, DestinationSettings(url=receiver.url), UPLOAD)
    assert {outcome_of(verdict) for verdict in verdicts.values()} == {SHIPPED}
    assert all(receiver.stored(artifact) for artifact in artifacts)


def test_two_that_send_the_same_artifact_at_once_both_have_it_shipped(
    tmp_path: Path, start_receiver: MakeReceiver
) -> None:
    receiver = start_receiver(workers=2)
    artifact = make_artifact(tmp_path, 12 * MEGABYTE)
    verdicts: list[Verdict] = []
    destination = DestinationSettings(url=receiver.url)
    patient = msgspec.structs.replace(UPLOAD, retry_max_s=10.0)  # the one that is taken over from gets a Retry-After
    threads = [threading.Thread(target=lambda: verdicts.append(ship(artifact, destination, patient))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {verdict.outcome for verdict in verdicts} == {Outcome.SHIPPED}
    assert receiver.stored(artifact)
