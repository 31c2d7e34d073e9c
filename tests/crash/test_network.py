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
from lab import Lab, Receiver, noise, wait_until
from proxy import Proxy, sent_again

from fastship.episode import Manifest, Outcome, Receipt, Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, Growing, Session

RUNS = 1000
PLAIN_RUNS = 200
ONCE_RUNS = 50
AT_ONCE = 4
SMALL = 256 << 10  # the receiver takes bodies of up to so much into memory
SIZES = (900, 50_000, SMALL - 1, SMALL, SMALL + 1, 400_000, (1 << 20) + 1, 2_500_000)
ATTEMPTS = 60

MakeLab = Callable[..., Lab]


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
    numbers = faults.some_of(range(RUNS), "network", least=30)
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
