"""A receiver among clients that mean ill: it answers, stores only what it verified, and serves the others.

The whole run is 100,000 requests, drawn from the seed (`hostility`), on two receivers, one of them with two processes.
What is looked at afterwards: no 500 and no traceback, whatever came; no secret told; no file but the store's; every
stored artifact is one, with the receipt that belongs to it; memory and descriptors came back; and a client that meant
well got all it sent stored meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from hostility import SECRETS, Hostility, Line
from receiver_process import WAIT_S, Server, make_artifact, sha256_field, wait_for

from fastship.frames import verify_content

HERE = "tests/crash/test_hostile_receiver.py"
REQUESTS = 100_000
CLIENTS = 4
GROWTH_BYTES = 250 << 20
"""Of memory: what malloc keeps of bodies (128 MiB), bombs being unpacked (16 threads), and what 1,500 uploads need."""


class Crowd:
    """Clients that send attacks, all from one seed."""

    def __init__(self, server: Server, name: str, requests: int) -> None:
        self._server = server
        self._each = requests // CLIENTS
        self.statuses: Counter[int] = Counter()
        self.sent: Counter[str] = Counter()
        self.told: list[bytes] = []
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(f"{name}{number}",)) for number in range(CLIENTS)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def _run(self, name: str) -> None:
        hostility = Hostility(faults.chance(name))
        done = 0
        try:
            with Line((self._server.host or "", self._server.port or 0), WAIT_S) as line:
                while done < self._each:
                    attacks = hostility.some(8)
                    answers = line.exchange(attacks)
                    count = len(attacks) if attacks[-1].cut and len(answers) >= len(attacks) else max(len(answers), 1)
                    hostility.unanswered(attacks[count:])
                    done += len(attacks[:count])
                    for attack in attacks[:count]:
                        self.sent[attack.kind] += 1
                    for answer in answers:
                        self.statuses[answer.status] += 1
                        location = re.search(rb"location: (/v1/uploads/\S+)", answer.fields)
                        if location:
                            hostility.uploads.append(location[1].decode())
                        if any(secret.encode() in answer.body + answer.fields for secret in SECRETS):
                            self.told.append(answer.fields + answer.body)
        except BaseException as error:
            self.failures.append(error)


class WellBehaved:
    """One client that ships, in the ways there are, until told to stop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stopped = threading.Event()
        self.stored: dict[str, bytes] = {}
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        try:
            while number < 4 or not self._stopped.is_set():
                number += 1
                name = f"well-behaved{number}"
                data = make_artifact(name, 50_000 * (1 + number % 4), number)
                way: Callable[[str, bytes], int] = (self._at_once, self._resumed)[number % 2]
                status = way(name, data)
                if status != 201:
                    self.failures.append(f"{name}: {status}")
                self.stored[name] = data
        except Exception as error:
            self.failures.append(repr(error))

    def _at_once(self, name: str, data: bytes) -> int:
        fields = {"Authorization": f"Bearer {SECRETS[0]}", "Repr_Digest": sha256_field(data)}
        return self._server.put(name, data, **fields).status

    def _resumed(self, name: str, data: bytes) -> int:
        fields: dict[str, Any] = {"Authorization": f"Bearer {SECRETS[0]}"}
        location = self._server.create(name, data, **fields).headers["location"]
        middle = self._server.append(location, data[:1000], 0, **fields).offset
        return self._server.append(location, data[middle:], middle, last=True, **fields).status


def processes(server: Server) -> list[psutil.Process]:
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def look_through(directory: Path, server: Server, crowd: Crowd, friend: WellBehaved) -> None:
    """All that must hold after it; ``directory`` has the root, the log and the token file, and nothing else."""
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log, log[max(0, log.index("Traceback") - 500) :][:4000]
    assert not [secret for secret in SECRETS if secret in log]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log)
    assert crowd.told == []
    assert 500 not in crowd.statuses
    metrics = server.request("GET", "/metrics", Authorization=f"Bearer {SECRETS[0]}").body.decode()
    assert 'status="500"' not in metrics
    assert friend.failures == []

    names = {path.name for path in directory.iterdir()}
    assert names == {"tokens", server.root.name, server.log.name}
    root = {path.name for path in server.root.iterdir()}
    assert root - {"metrics"} == {"episodes", "uploads", "secret"}
    for path in server.root.rglob("*"):
        assert path.is_dir() or path.is_file()
        assert not path.is_symlink()
    stored = {path.name.removesuffix(".tar.zst") for path in server.root.glob("episodes/*.tar.zst")}
    receipts = {path.name.removesuffix(".receipt.json") for path in server.root.glob("episodes/*.receipt.json")}
    assert stored == receipts
    assert not [name for name in stored if name.startswith("smuggled")]
    for name in stored:
        receipt = json.loads((server.root / "episodes" / f"{name}.receipt.json").read_bytes())
        artifact = server.root / "episodes" / f"{name}.tar.zst"
        assert receipt["episode"] == name
        assert receipt["artifact"]["sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
        assert receipt["content"]["blake3"] == verify_content(artifact).blake3
    for name, data in friend.stored.items():
        assert server.stored(name) == data


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
def test_hostile_requests(tmp_path: Path, workers: int) -> None:
    (tmp_path / "tokens").write_text("\n".join(SECRETS[:2]))
    requests = faults.times(REQUESTS // 2, least=400)
    server = Server(tmp_path / "root", token_file=str(tmp_path / "tokens"), workers=workers)
    try:
        Crowd(server, "warm", 200).run()
        resident = sum(process.memory_info().rss for process in processes(server))
        files = sum(process.num_fds() for process in processes(server))
        friend = WellBehaved(server)
        crowd = Crowd(server, f"hostile{workers}", requests)
        try:
            crowd.run()
        finally:
            friend.stop()
        wait_for(lambda: sum(process.num_fds() for process in processes(server)) <= files + 10)
        grown = sum(process.memory_info().rss for process in processes(server)) - resident
        assert grown < GROWTH_BYTES * workers
        look_through(tmp_path, server, crowd, friend)
        assert server.stop() == 0
    finally:
        server.kill()
    faults.count(
        f"hostile: requests to {workers} process{'es'[: 2 * (workers > 1)]}",
        "ids, fields, framing, lengths, uploads, artifacts and garbage from a seed: no 500, nothing unverified stored,"
        f" {len(friend.stored)} uploads of a well-behaved client meanwhile",
        of=REQUESTS // 2,
        tried=sum(crowd.sent.values()),
        test=HERE,
    )
