"""A line that does anything between a real shipper and a real receiver: every artifact arrives once and whole.

What a run is is drawn from its number and FASTSHIP_SEED: the way to upload, a size around the limits, the settings, and
which faults `proxy.Proxy` plays at which requests.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import queue
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import faults
import msgspec
import pytest
import zstandard
from blake3 import blake3
from lab import Lab, Receiver, Sections, noise, read_back, telemetry, tree, wait_until
from proxy import Proxy, sent_again
from scripted_server import Head, Peer, Server

from bench.servers import Nginx
from fastship.episode import Manifest, Outcome, Receipt, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, Growing, Session, Wanted, download

RUNS = 1000
PLAIN_RUNS = 200
ONCE_RUNS = 50
AT_ONCE = 4
SMALL = 512 << 10  # the receiver takes bodies of up to so much into memory
SIZES = (900, 50_000, SMALL - 1, SMALL, SMALL + 1, 700_000, (1 << 20) + 1, 2_500_000)
ATTEMPTS = 60


class Sample(NamedTuple):
    data: bytes
    manifest: Manifest


@functools.cache
def sample(size: int) -> Sample:
    """An artifact of exactly ``size`` bytes: a tar in zstd frames, filled up with a skippable one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        content = noise(size - 500 - size // 100, size)
        info = tarfile.TarInfo("episode/data.bin")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    stream = buffer.getvalue()
    data = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(stream)
    fill = size - len(data) - 8
    data += (0x184D2A50).to_bytes(4, "little") + fill.to_bytes(4, "little") + bytes(fill)
    manifest = Manifest(
        episode="",
        artifact_sha256=hashlib.sha256(data).hexdigest(),
        artifact_bytes=size,
        content_blake3=blake3(stream).hexdigest(),
        content_bytes=len(stream),
        members=1,
        frames=1,
        frame_bytes=8 << 20,
        levels={1: 1},
        fingerprint="00",
    )
    return Sample(data, manifest)


class Shipping:
    """One artifact on its way through a proxy, attempt after attempt, as a worker and its outbox would do it."""

    def __init__(self, directory: Path, name: str, size: int, to: DestinationSettings, chance: random.Random) -> None:
        self.data, manifest = sample(size)
        self.manifest = msgspec.structs.replace(manifest, episode=name)
        self.artifact = Artifact(self.manifest, directory / f"{name}.tar.zst")
        self._to = to
        self._chance = chance
        self._place = ""
        self._verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()

    def run(self, upload: UploadSettings, *, while_packing: bool) -> Receipt:
        """Until it is shipped; of every other attempt it is claimed that nothing is wrong with the episode."""
        session = self._begin(upload)
        try:
            for attempt in range(ATTEMPTS):
                if attempt == 0 and while_packing:
                    self._stream(session)
                else:
                    if attempt == 0:
                        self.artifact.path.write_bytes(self.data)
                    session.submit(self.artifact, first_attempt=attempt == 0, url=self._place)
                verdict = self._verdicts.get()
                if verdict.outcome is Outcome.SHIPPED:
                    assert verdict.receipt is not None
                    return verdict.receipt
                assert verdict.outcome is Outcome.TRANSIENT, verdict
                if self._chance.random() < 0.3:  # another process goes on
                    session.close()
                    # On a busy machine what is in order may be slow, too.
                    patient = {
                        name: getattr(upload, name) * (attempt + 1) for name in ("stall_timeout_s", "answer_timeout_s")
                    }
                    session = self._begin(msgspec.structs.replace(upload, **patient))
            raise AssertionError(f"not shipped after {ATTEMPTS} attempts: {verdict}")
        finally:
            session.close()

    def _begin(self, upload: UploadSettings) -> Session:
        return Session(
            self._to,
            upload,
            on_verdict=lambda _episode, verdict: self._verdicts.put(verdict),
            on_place=lambda _episode, url: setattr(self, "_place", url),
        )

    def _stream(self, session: Session) -> None:
        partial = self.artifact.path.with_suffix(".partial")
        with open(partial, "wb", buffering=0) as file:
            done, step = 0, self._chance.randint(1 + len(self.data) // 20, len(self.data))
            advance: Callable[[int], None] | None = None
            while done < len(self.data):
                file.write(self.data[done : done + step])
                done = min(done + step, len(self.data))
                if advance is None:
                    advance = session.stream(Growing(self.manifest.episode, partial), done)
                else:
                    advance(done)
                time.sleep(self._chance.choice((0.0, 0.002, 0.02)))
        partial.rename(self.artifact.path)
        session.submit(self.artifact, first_attempt=True)


def settings(chance: random.Random, **more: Any) -> UploadSettings:
    values: dict[str, Any] = {
        "retries": chance.choice((0, 1, 4)),
        "retry_min_s": 0.001,
        "retry_max_s": 0.02,
        "stall_timeout_s": 0.3,
        "answer_timeout_s": 0.6,
    }
    return UploadSettings(**{**values, **more})


WAYS = ("one PUT", "creation and appends", "while packing")


class Came(NamedTuple):
    """What came of one run."""

    faults: list[str]
    again_bytes: int


def ship_through(receiver: Receiver, directory: Path, number: int) -> Came:
    chance = faults.chance(f"network {number}")
    way, size = WAYS[number % len(WAYS)], chance.choice(SIZES)
    limits: dict[str, Any] = {
        "one PUT": {"one_shot_bytes": size + chance.choice((0, 1)), "stream_bytes": 0},
        "creation and appends": {"one_shot_bytes": chance.choice((0, size - 1)), "stream_bytes": 0},
        "while packing": {"stream_bytes": chance.choice((1, 4096, 65536, size))},
    }[way]
    with contextlib.closing(Proxy(port_of(receiver.url), chance, chance.randint(1, 8))) as proxy:
        shipping = Shipping(directory, f"run{number}", size, DestinationSettings(url=proxy.url), chance)
        receipt = shipping.run(settings(chance, **limits), while_packing=way == "while packing")
        passed = list(proxy.passed)
    assert receipt.artifact.sha256 == shipping.manifest.artifact_sha256, passed
    assert receipt.verified == "content", passed
    assert receiver.artifact(f"run{number}").read_bytes() == shipping.data, passed
    shipping.artifact.path.unlink()
    return Came(proxy.played, sent_again(passed, size))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """Two processes, which sync often: a request may come to another one than that before it."""
    options = ("--workers", "2", "--set", "receiver.sync_bytes=64KiB", "--set", "receiver.reserve_bytes=0")
    process = Receiver(tmp_path_factory.mktemp("network") / "store", *options)
    yield process
    process.close()


def all_of(numbers: list[int], one: Callable[[int], Came]) -> list[Came]:
    """Several at a time; the first that fails says which one it was."""

    def named(number: int) -> Came:
        try:
            return one(number)
        except BaseException as error:
            error.add_note(f"run {number} with FASTSHIP_SEED={faults.SEED}")
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(named, numbers))


def outline(came: list[Came]) -> str:
    played = collections.Counter(name for one in came for name in one.faults)
    again = sum(one.again_bytes for one in came)
    return f"{played.total()} faults ({', '.join(f'{n} {c}' for n, c in played.most_common())}); {again} bytes again"


@pytest.mark.timeout(1800)
def test_any_line_over_three_ways(receiver: Receiver, tmp_path: Path) -> None:
    numbers = faults.some_of(range(RUNS), "network", least=15)
    before = receiver.stored()
    came = all_of(numbers, lambda number: ship_through(receiver, tmp_path, number))
    print(outline(came))
    assert receiver.stored() - before == {f"run{number}" for number in numbers}
    wait_until(lambda: not list(receiver.root.glob("uploads/**/one-*")), "the end of what was half open")
    log = (receiver.root.parent / f"{receiver.root.name}.log").read_text()
    assert "Traceback" not in log, log
    faults.count(
        "network: three ways",
        "runs of cuts, resets, stalls, lost and cut answers, requests sent twice, late or at once, 5xx of a proxy; "
        "at most one append sent again for each",
        of=RUNS,
        tried=len(numbers),
        test="tests/crash/test_network.py",
    )


# --- servers that know none of this ------------------------------------------------------------------------------


class Plain:
    """Takes whole PUTs and says 201; what is cut it forgets. No digest, no offset, no receipt."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}

    def __call__(self, peer: Peer, head: Head) -> None:
        body = peer.body(head)
        if head.method == "PUT" and len(body) == head.length:
            self.stored[head.target.rpartition("/")[2]] = body
            peer.answer(201)
        elif len(body) == head.length:
            peer.answer(405)


def ship_whole_through(port: int, directory: Path, name: str, kept: Callable[[], bytes]) -> Came:
    """To the server at ``port``, which has ``kept`` then."""
    chance = faults.chance(f"network {name}")
    size = chance.choice(SIZES)
    with contextlib.closing(Proxy(port, chance, chance.randint(1, 8))) as proxy:
        to = DestinationSettings(url=proxy.url, proof="status")
        shipping = Shipping(directory, name, size, to, chance)
        receipt = shipping.run(settings(chance), while_packing=False)
        passed = list(proxy.passed)
    assert receipt.verified == "status"
    assert kept() == shipping.data, passed
    assert all(each.whole for each in passed)
    in_vain = sum(each.came_bytes for each in passed if not each.well)
    assert sum(each.came_bytes for each in passed) <= size + in_vain
    shipping.artifact.path.unlink()
    return Came(proxy.played, in_vain)


@pytest.mark.timeout(900)
def test_any_line_to_a_plain_server(tmp_path: Path) -> None:
    plain = Plain()
    numbers = faults.some_of(range(PLAIN_RUNS), "network plain", least=6)

    def ship(number: int) -> Came:
        name = f"plain{number}"
        return ship_whole_through(server.port, tmp_path, name, lambda: plain.stored[name])

    with Server(plain) as server:
        print(outline(all_of(numbers, ship)))
    assert set(plain.stored) == {f"plain{number}" for number in numbers}
    faults.count(
        "network: plain servers",
        "the same over whole PUTs to a server that can only say 201",
        of=PLAIN_RUNS,
        tried=len(numbers),
        test="tests/crash/test_network.py",
    )


@pytest.mark.timeout(900)
def test_any_line_to_nginx(nginx: Nginx, tmp_path: Path) -> None:
    """And what arrived is what it gives out again, over a line that is as bad."""
    numbers = faults.some_of(range(PLAIN_RUNS), "network nginx", least=6)

    def ship(number: int) -> Came:
        name = f"nginx{number}"
        place = nginx.store / "v1" / "episodes" / name
        came = ship_whole_through(port_of(nginx.url), tmp_path, name, place.read_bytes)
        chance = faults.chance(f"network nginx {number} back")
        data = place.read_bytes()
        wanted = Wanted(episode=name, artifact_sha256=hashlib.sha256(data).hexdigest(), artifact_bytes=len(data))
        with contextlib.closing(Proxy(port_of(nginx.url), chance, chance.randint(1, 4))) as proxy:
            patient = settings(chance, retries=ATTEMPTS, retry_max_s=1.0)  # a Retry-After is of 1 s
            (found,) = download([wanted], DestinationSettings(url=proxy.url, proof="status"), patient)
        assert found.verdict == "sound", proxy.passed
        return Came(came.faults + proxy.played, came.again_bytes)

    print(outline(all_of(numbers, ship)))
    assert {path.name for path in nginx.artifacts()} == {f"nginx{number}" for number in numbers}
    wait_until(lambda: not any((nginx.store.parent / "temp").iterdir()), "the end of what was half open")
    faults.count(
        "network: nginx",
        "the same over whole PUTs to a real nginx, and fetched from it again (verify --download) over such a line",
        of=PLAIN_RUNS,
        tried=len(numbers),
        test="tests/crash/test_network.py",
    )


# --- all of fastship ---------------------------------------------------------------------------------------------

IN_ONE_SPOOL = 4
ONCE: Sections = {
    "upload": {
        "one_shot_bytes": "64kB",
        "stream_bytes": "96kB",
        "retries": 2,
        "retry_min_s": "1ms",
        "retry_max_s": "20ms",
        "stall_timeout_s": "500ms",
        "answer_timeout_s": "1s",
    },
    "pack": {"frame_bytes": "64KiB", "level": "auto", "threads": 2},
    "workers": {"count": 2},
}


def once_until_all_is_shipped(receiver: Receiver, directory: Path, number: int) -> Came:
    """Passes over one spool, until nothing is left of it; what was in it is at the receiver, byte for byte."""
    chance = faults.chance(f"network once {number}")
    directory.mkdir()
    with contextlib.closing(Proxy(port_of(receiver.url), chance, faults=10, often=0.4)) as proxy:
        lab = Lab(directory, proxy.url, ONCE)
        before = {}
        for episode in range(IN_ONE_SPOOL):
            name = f"once{number}-{episode}"
            size = chance.choice((100, 40_000, 65_536, 200_000, 600_000))
            before[name] = tree(lab.episode(name, files={"noise": noise(size, name), "text": telemetry(size, name)}))
        for _ in range(ATTEMPTS):
            result = lab.once()
            assert (result.fatal, result.conflicts) == (0, 0), proxy.passed
            if not lab.names("episodes"):
                break
        assert lab.names("shipped") == sorted(before), proxy.passed
        assert lab.names("quarantine") == lab.names("holds") == lab.names("outbox") == []
        for name, facts in before.items():
            assert read_back(receiver, name, directory / "back", stock=False) == facts, proxy.passed
        again = sent_again(proxy.passed, sum(receiver.artifact(name).stat().st_size for name in before))
    return Came(proxy.played, again)


@pytest.mark.timeout(900)
def test_any_line_and_all_of_fastship(receiver: Receiver, tmp_path: Path) -> None:
    numbers = faults.some_of(range(ONCE_RUNS), "network once")
    came = [once_until_all_is_shipped(receiver, tmp_path / f"once{number}", number) for number in numbers]
    print(outline(came))
    faults.count(
        "network: fastship once",
        f"passes over a spool of {IN_ONE_SPOOL} through such a line, until it is empty",
        of=ONCE_RUNS,
        tried=len(numbers),
        test="tests/crash/test_network.py",
    )
