"""One bit flipped at every hop: the outbox, the wire, the receiver's partial, its store, and the records on both sides.

Each is noticed at that hop, and comes to nothing: in the end the receiver has every episode once, with the bytes that
were packed, and nothing under another id. The places are of every kind that an artifact has: the header of a frame, its
data, its checksum, the frame with the first tar header, the member index, the seek table.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import faults
import msgspec
import pytest
from lab import Destination, Lab, Receiver, Reply, noise, read_back, telemetry, tree
from receiver_process import Server
from relay import Relay

from fastship.episode import Manifest, Outcome
from fastship.frames import ArtifactReader, FramePool
from fastship.pack import PackOptions, pack
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.custody import Custody
from fastship.receiver.store.store import Store
from fastship.settings import DestinationSettings, ReceiverSettings, UploadSettings
from fastship.spool import Outbox
from fastship.upload import Artifact, ship

MakeLab = Callable[..., Lab]

FRAME_BYTES = 16 << 10
QUICK = UploadSettings(retries=4, retry_min_s=0.01, retry_max_s=0.05, stream_bytes=0)
WAYS = {
    "way 1": msgspec.structs.replace(QUICK, one_shot_bytes=1 << 30),
    "way 2": msgspec.structs.replace(QUICK, one_shot_bytes=0),
}


class Place(NamedTuple):
    """A bit of an artifact."""

    kind: str
    offset: int
    bit: int


def packed(directory: Path, episode: str, size: int = 60_000, frame_bytes: int = FRAME_BYTES) -> Artifact:
    """An artifact as the outbox has it."""
    source = directory / "episodes" / episode
    source.mkdir(parents=True)
    (source / "telemetry.jsonl").write_bytes(telemetry(size // 2, episode))
    (source / "video.bin").write_bytes(noise(size // 2, episode))
    outbox = Outbox(directory / "outbox")
    outbox.directory.mkdir(exist_ok=True)
    with FramePool(1) as pool, outbox.begin(episode) as file:
        manifest = pack(source, file, PackOptions(level=3, frame_bytes=frame_bytes), pool)
    return Artifact(manifest, outbox.commit(manifest))


def places(data: bytes) -> list[Place]:
    """Bits of each kind."""
    reader = ArtifactReader(lambda offset, length: data[offset : offset + length], len(data))
    assert reader.table is not None
    frames = list(itertools.pairwise(reader.table.compressed_offsets))
    index, data_frames = frames[-1], frames[:-1]
    found: dict[str, set[int]] = {"first frame (tar header)": set(range(12, 140, 7))}
    for start, end in (data_frames[0], data_frames[len(data_frames) // 2], data_frames[-1]):
        found.setdefault("frame header", set()).update(range(start, start + 9))
        found.setdefault("frame data", set()).update(range(start + 12, end - 4, (end - start) // 12 + 1))
        found.setdefault("frame checksum", set()).update(range(end - 4, end))
    found["index header"] = set(range(index[0], index[0] + 8))
    found["index"] = set(range(index[0] + 8, index[1], 5))
    found["seek table"] = {*range(index[1], len(data) - 9, 3), *range(len(data) - 9, len(data))}
    return [
        Place(kind, offset, bit)
        for kind, offsets in found.items()
        for offset in sorted(offsets)
        for bit in ((offset * 3) % 8, (offset * 3 + 4) % 8)
    ]


def flip(path: Path, offset: int, bit: int) -> None:
    """As a disk does it: the file's times are what they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def to(server: Server) -> DestinationSettings:
    return DestinationSettings(url=server.url)


def check_right(server: Server, artifacts: dict[str, bytes]) -> None:
    """Each is stored once, right, and nothing else is."""
    stored = {path.name for path in (server.root / "episodes").glob("*.tar.zst")}
    assert stored == {f"{episode}.tar.zst" for episode in artifacts}
    for episode, data in artifacts.items():
        assert server.stored(episode) == data, episode


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "store")
    yield server
    server.kill()


# --- the outbox ------------------------------------------------------------------------------------------------------


def test_in_the_outbox_before_it_is_sent(tmp_path: Path, server: Server) -> None:
    artifact = packed(tmp_path, "ep1")
    data = artifact.path.read_bytes()
    points = places(data)
    tried = faults.some_of(points, "bit flips in the outbox", least=12)
    for number, (place, (way, upload)) in enumerate(zip(tried, itertools.cycle(WAYS.items()), strict=False)):
        flip(artifact.path, place.offset, place.bit)
        verdict = ship(artifact, to(server), upload, first_attempt=number % 4 < 2)
        assert verdict.outcome is Outcome.DAMAGED, (place, way, verdict)
        assert "changed" in verdict.error
        assert server.stored("ep1") is None, (place, way)
        flip(artifact.path, place.offset, place.bit)
    assert ship(artifact, to(server), QUICK).outcome is Outcome.SHIPPED
    check_right(server, {"ep1": data})
    what = "a bit of the artifact flips in the outbox before it is sent: found there, and packed again"
    faults.count("custody: bit flips in the outbox", what, of=len(points), tried=len(tried), test="test_bitflip.py")


def test_a_damaged_artifact_is_packed_again_by_itself(make_lab: MakeLab, destination: Destination) -> None:
    """The whole way: a pass finds its artifacts and their manifests with a bit flipped, and one mends all."""
    lab = make_lab(destination.url, pack={"frame_bytes": "16KiB", "level": 3}, upload={"retries": 0})
    own = Receiver(lab.root.parent / "store")
    try:
        draw = faults.chance("bit flips, packed again")
        names = [f"ep{number:02}" for number in range(faults.times(80, least=12))]
        before = {name: tree(lab.episode(name, {"data": noise(40_000, name)})) for name in names}
        destination.say("*", Reply(503))
        lab.once({"destination": {"pause_after": 1000}})
        assert len(lab.names("outbox")) == 2 * len(names), "each is packed, with its manifest"
        for number, name in enumerate(names):
            path = lab.outbox / f"{name}.manifest.json" if number % 2 else lab.artifact(name)
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        lab.url = own.url
        for _ in range(3):
            lab.once()
        assert own.stored() == set(names)
        assert (lab.names("episodes"), lab.names("quarantine"), lab.names("holds")) == ([], [], [])
        assert {name: tree(lab.shipped / name) for name in names} == before
        found = Custody(Store(ReceiverSettings(root=str(own.root))))
        for name in names:
            checked = found.check(name)
            assert checked is not None
            assert checked.verdict == "sound"
    finally:
        own.close()
    what = "as above, or of its manifest, in a whole pass: packed again, never quarantined, shipped by itself"
    faults.count("custody: packed again", what, of=80, tried=len(names), test="test_bitflip.py")


# --- the wire --------------------------------------------------------------------------------------------------------


class FlippingLine(Relay):
    """A line to a receiver that flips one bit of the first body that reaches so far, or of the first answer's."""

    def __init__(
        self,
        url: str,
        offset: int,
        bit: int,
        *,
        head: bool = False,
        answers: bool = False,
        instead: Callable[[], None] | None = None,
    ) -> None:
        """``instead``: what is done at that point, and the line is left right."""
        self._flip: tuple[int, int] | None = (offset, bit)
        self._head, self._answers, self._instead = head, answers, instead
        self.heads: list[bytes] = []  # of requests
        self.flipped = 0
        self._lock = threading.Lock()
        super().__init__(int(url.rpartition(":")[2]))

    def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
        """Message by message: a head, and the body whose length it says."""
        spoils = outward is not self._answers
        ahead = b""
        while True:
            while b"\r\n\r\n" not in ahead:
                piece = source.recv(1 << 16)
                if not piece:
                    return
                ahead += piece
            head, _, ahead = ahead.partition(b"\r\n\r\n")
            head += b"\r\n\r\n"
            if not head.startswith(b"HTTP/"):
                self.heads.append(head)
            match = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
            length = int(match[1]) if match else 0
            sink.sendall(self._spoil(head, 0) if spoils and self._head else head)
            done = 0
            while done < length:
                piece = ahead[: length - done] or source.recv(min(1 << 16, length - done))
                ahead = ahead[len(piece) :] if ahead else b""
                if not piece:
                    return
                sink.sendall(self._spoil(piece, done) if spoils and not self._head else piece)
                done += len(piece)

    def _spoil(self, piece: bytes, at: int) -> bytes:
        with self._lock:
            if self._flip is None or not at <= self._flip[0] < at + len(piece):
                return piece
            offset, bit = self._flip
            self._flip = None
            self.flipped += 1
        if self._instead is not None:
            self._instead()
            return piece
        spoilt = bytearray(piece)
        spoilt[offset - at] ^= 1 << bit
        return bytes(spoilt)


def test_in_a_body_on_the_wire(tmp_path: Path, server: Server) -> None:
    artifact = packed(tmp_path, "ep1")
    data = artifact.path.read_bytes()
    points = places(data)
    tried = faults.some_of(points, "bit flips on the wire", least=12)
    flipped = 0
    for place, (way, upload) in zip(tried, itertools.cycle(WAYS.items()), strict=False):
        with FlippingLine(server.url, place.offset, place.bit) as line:
            verdict = ship(artifact, DestinationSettings(url=line.url), upload)
        assert verdict.outcome is Outcome.SHIPPED, (place, way, verdict)
        assert line.flipped == 1
        flipped += line.flipped
        check_right(server, {"ep1": data})
        shutil.rmtree(server.root / "episodes")
        (server.root / "episodes").mkdir()
    assert flipped == len(tried)
    what = "a bit of a body flips on the wire: the receiver's digest finds it, it is sent again and right"
    faults.count("custody: bit flips on the wire", what, of=len(points), tried=len(tried), test="test_bitflip.py")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("side", ["request", "answer"])
def test_in_the_rest_of_what_is_said(tmp_path: Path, server: Server, side: str) -> None:
    """Heads of requests, and answers: nothing wrong is stored or believed, and the next attempt is right."""
    artifact = packed(tmp_path, "ep1", 3000)
    data = artifact.path.read_bytes()
    points = [(offset, offset * 5 % 8, head) for head in (True, False) for offset in range(420)]
    points += [(offset, (bit + 3) % 8, head) for offset, bit, head in points]
    if side == "request":
        points = [point for point in points if point[2]]
    tried = faults.some_of(points, f"bit flips in {side}s", least=5)
    rejected = 0
    for (offset, bit, head), (way, upload) in zip(tried, itertools.cycle(WAYS.items()), strict=False):
        upload = msgspec.structs.replace(upload, retries=1, answer_timeout_s=1.0, stall_timeout_s=1.0)
        with FlippingLine(server.url, offset, bit, head=head, answers=side == "answer") as line:
            verdict = ship(artifact, DestinationSettings(url=line.url), upload)
        told = (offset, bit, head, way, verdict)
        rejected += verdict.outcome is Outcome.REJECTED
        if verdict.outcome is Outcome.SHIPPED:
            assert server.stored("ep1") == data, told
            assert verdict.receipt is not None
            assert verdict.receipt.artifact.sha256 == artifact.manifest.artifact_sha256, told
        again = ship(artifact, to(server), upload, first_attempt=False)
        assert again.outcome is Outcome.SHIPPED, (told, again)
        check_right(server, {"ep1": data})
        for path in (server.root / "episodes").iterdir():
            path.unlink()
    assert rejected == 0
    what = f"a bit flips in the head of a request or in an answer ({side}s): nothing wrong is believed"
    faults.count(f"custody: bit flips in {side}s", what, of=len(points), tried=len(tried), test="test_bitflip.py")


@pytest.mark.timeout(1200)
def test_while_it_is_packed_and_sent_at_once(tmp_path: Path) -> None:
    """Way 3, of a whole pass: a bit flips on the wire, or in the outbox behind what is being sent."""
    own = Receiver(tmp_path / "store")
    size, whole = 400_000, 120
    draw = faults.chance("bit flips in way 3")
    tried = faults.times(whole, least=4)
    at_once = 0
    try:
        for number in range(tried):
            directory = tmp_path / str(number)
            directory.mkdir()
            name, at, bit = f"ep{number}", draw.randrange(30_000), draw.randrange(8)
            behind = draw.randrange(size)

            def spoil(outbox: Path = directory / "spool" / "outbox", behind: int = behind, bit: int = bit) -> None:
                for path in outbox.glob("*.tar.zst*"):
                    if path.stat().st_size > behind:
                        flip(path, behind, bit)

            with FlippingLine(own.url, at, bit, instead=spoil if number % 2 else None) as line:
                upload = {"stream_bytes": "64kB", "one_shot_bytes": 0, "retries": 3}
                lab = Lab(directory, line.url, {"upload": upload, "pack": {"frame_bytes": "16KiB", "level": 1}})
                before = tree(lab.episode(name, {"data": noise(size, name)}))
                for _ in range(3):
                    lab.once()
                assert line.flipped == 1
            told = (number, at, bit, behind)
            first = next(head for head in line.heads if head.startswith(b"PUT"))
            at_once += b"repr-digest" not in first.lower()  # else packing was through before the session's thread ran
            assert (lab.names("episodes"), lab.names("quarantine"), lab.names("holds")) == ([], [], []), told
            assert tree(lab.shipped / name) == before, told
            found = Custody(Store(ReceiverSettings(root=str(own.root)))).check(name)
            assert found is not None, told
            assert found.verdict == "sound", (told, found)
            assert read_back(own, name, directory / "back", stock=False) == before, told
        assert len(own.stored()) == tried
    finally:
        own.close()
    print(f"{at_once} of {tried} were begun while nothing was known of the whole")
    what = "a bit flips on the wire, or in the outbox, while an artifact is packed and sent at once"
    faults.count("custody: bit flips while it is packed", what, of=whole, tried=tried, test="test_bitflip.py")


# --- the receiver's partial ------------------------------------------------------------------------------------------


def _part(server: Server, location: str) -> Path:
    return server.root / "uploads" / f"{location.rpartition('/')[2]}.part"


@pytest.mark.parametrize("restarted", [False, True])
def test_in_a_partial_between_two_appends(tmp_path: Path, server: Server, restarted: bool) -> None:
    artifact = packed(tmp_path, "ep1")
    data = artifact.path.read_bytes()
    points = places(data)
    if restarted:
        points = points[::7]  # a start is half a second
    tried = faults.some_of(points, f"bit flips in a partial {restarted}", least=4)
    for number, place in enumerate(tried):
        cut = place.offset + 1
        named = number % 2 == 0
        if named:
            location = server.create("ep1", data).headers["location"]
        else:  # as way 3 does: nothing is known at the start
            location = server.request("PUT", "/v1/episodes/ep1", None, Upload_Complete="?0").headers["location"]
        assert server.append(location, data[:cut], 0).offset == cut
        flip(_part(server, location), place.offset, place.bit)
        if restarted:
            server.kill()
            server.__init__(server.root)  # type: ignore[misc]
        declared = {} if named else {"Upload_Length": str(len(data)), **_content_of(artifact.manifest)}
        reply = server.append(location, data[cut:], cut, last=True, **declared)
        # A running receiver knows what came; after a restart one that was told nothing has the content alone to go by.
        expected = {"digest-mismatch"} if named or not restarted else {"content-mismatch", "artifact-invalid"}
        if reply.status == 201 and restarted and not named:
            told = json.loads(reply.body)
            assert told["artifact"]["sha256"] != artifact.manifest.artifact_sha256, place
            assert told["content"]["blake3"] == artifact.manifest.content_blake3, place
        else:
            assert reply.json()["code"] in expected, (place, named, reply.body)
            assert server.stored("ep1") is None
            assert ship(artifact, to(server), WAYS["way 2"], first_attempt=False).outcome is Outcome.SHIPPED
            check_right(server, {"ep1": data})
        for path in (server.root / "episodes").iterdir():
            path.unlink()
    what = "a bit of a partial flips on the receiver's disk between two appends" + (", over a restart" * restarted)
    kind = f"custody: bit flips in a partial{', restarted' * restarted}"
    faults.count(kind, what, of=len(points), tried=len(tried), test="test_bitflip.py")


def _content_of(manifest: Manifest) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(manifest.content_blake3)).decode()
    return {
        "Fastship_Content_Digest": f"blake3=:{digest}:",
        "Fastship_Content_Length": str(manifest.content_bytes),
    }


def test_in_a_partial_of_which_the_beginning_is_verified_already(tmp_path: Path, server: Server) -> None:
    """A large one is unpacked while it comes; what flips after that is found all the same."""
    artifact = packed(tmp_path, "ep1", 14_000_000, frame_bytes=1 << 20)
    data = artifact.path.read_bytes()
    half = len(data) * 3 // 4
    for named in (True, False):
        if named:
            location = server.create("ep1", data).headers["location"]
        else:
            location = server.request("PUT", "/v1/episodes/ep1", None, Upload_Complete="?0").headers["location"]
        server.append(location, data[:half], 0)
        flip(_part(server, location), 1000, 3)
        declared = {} if named else {"Upload_Length": str(len(data)), **_content_of(artifact.manifest)}
        reply = server.append(location, data[half:], half, last=True, **declared)
        assert (reply.status, reply.json()["code"]) == (400, "digest-mismatch")
        assert "on the receiver's disk" in reply.json()["error"]
    assert ship(artifact, to(server), WAYS["way 2"], first_attempt=False).outcome is Outcome.SHIPPED
    check_right(server, {"ep1": data})


# --- the store -------------------------------------------------------------------------------------------------------


def test_in_a_stored_artifact(tmp_path: Path) -> None:
    artifact = packed(tmp_path, "ep1")
    data = artifact.path.read_bytes()
    points = places(data)
    tried = faults.some_of(points, "bit flips in the store", least=40)
    store = Store(ReceiverSettings(root=str(tmp_path / "store")))
    declared = Declared(episode="ep1", sha256=artifact.manifest.artifact_sha256, length=len(data))

    def keep() -> None:
        partial = store.uploads.one_shot()
        partial.write([data])
        assert isinstance(store.publish(partial, declared), tuple)
        partial.close()

    keep()
    for place in tried:
        path = store.artifact_path("ep1")
        flip(path, place.offset, place.bit)
        found = Custody(store).check("ep1")
        assert found is not None
        if found.verdict == "mended":  # a bit that no decoder looks at: the content is right, the receipt follows
            assert found.content_blake3 == artifact.manifest.content_blake3, place
            assert place.kind in ("frame header", "index header", "index", "seek table"), place
            store.rotted.set_aside("ep1", path.stat().st_ino, found)
        else:
            assert (found.verdict, found.set_aside != "") == ("rotted", True), place
        assert store.receipt("ep1") is None
        keep()
        (store.root / "rotted").rename(tmp_path / "rotted")
        shutil.rmtree(tmp_path / "rotted")
    found = Custody(store).check("ep1")
    assert found is not None
    assert found.verdict == "sound"
    what = "a bit of a stored artifact flips: verify and scrub find it, set it aside, and it is stored again"
    faults.count("custody: bit flips in the store", what, of=len(points), tried=len(tried), test="test_bitflip.py")


# --- the records -----------------------------------------------------------------------------------------------------


def test_in_the_records_of_the_outbox(tmp_path: Path) -> None:
    artifact = packed(tmp_path, "ep1")
    outbox = Outbox(artifact.path.parent)
    outbox.note_upload("ep1", "http://receiver.example/v1/uploads/0123", "http://receiver.example")
    points = [
        (path, offset, bit)
        for path in (outbox.manifest("ep1"), outbox.upload_note("ep1"))
        for offset in range(path.stat().st_size)
        for bit in range(8)
    ]
    tried = faults.some_of(points, "bit flips in the outbox's records", least=400)
    for path, offset, bit in tried:
        flip(path, offset, bit)
        assert outbox.peek("ep1") in (None, artifact.manifest), (path, offset, bit)
        url = outbox.find_upload("ep1", "http://receiver.example")
        assert url in ("", "http://receiver.example/v1/uploads/0123"), (path, offset, bit)
        flip(path, offset, bit)
    assert outbox.peek("ep1") == artifact.manifest
    what = "a bit of a manifest or an upload's note flips in the outbox: packed again, or sent anew"
    faults.count("custody: records of the outbox", what, of=len(points), tried=len(tried), test="test_bitflip.py")


def test_in_the_records_of_the_receiver(tmp_path: Path, server: Server) -> None:
    artifact = packed(tmp_path, "ep1")
    data = artifact.path.read_bytes()
    draw = faults.chance("bit flips in the receiver's records")
    kinds = ["uploads/*.json", "uploads/*.lock", "uploads/ended/*.json", "episodes/*.json", "secret"]
    whole = 400
    tried = faults.times(whole, least=15)
    for number in range(tried):
        kind = kinds[number % len(kinds)]
        location = server.create("ep1", data).headers["location"]
        server.append(location, data[:20_000], 0)
        if kind.startswith(("uploads/ended", "episodes")):
            assert server.append(location, data[20_000:], 20_000, last=True).status == 201
        (path,) = server.root.glob(kind)
        offset, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, offset, bit)
        told = (kind, offset, bit)
        verdict = ship(artifact, to(server), WAYS["way 2"], first_attempt=False)
        assert verdict.outcome is Outcome.SHIPPED, (told, verdict)
        assert server.request("HEAD", location).status in (204, 404), told
        check_right(server, {"ep1": data})
        reply = server.request("POST", "/v1/verifications/ep1").json()
        assert reply["verdict"] in ("sound", "mended"), (told, reply)
        receipt = server.request("GET", "/v1/receipts/ep1").json()
        assert receipt["artifact"]["sha256"] == artifact.manifest.artifact_sha256, told
        assert receipt["content"]["blake3"] == artifact.manifest.content_blake3, told
        for path in [*(server.root / "episodes").iterdir(), *(server.root / "uploads").rglob("*.*")]:
            path.unlink()
    assert "Traceback" not in server.log.read_text()
    what = (
        "a bit flips in what the receiver writes down of uploads and episodes: shipped all the same, under its own id"
    )
    faults.count("custody: records of the receiver", what, of=whole, tried=tried, test="test_bitflip.py")
