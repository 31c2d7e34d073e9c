"""A receiver among clients that mean ill: it answers, stores only what it verified, and serves the others.

The whole run is 100,000 requests, drawn from the seed (`hostility`), on two receivers, one of them with two processes.
Then uploads by the thousand that nobody goes on with, and one that many go on with at once.
What is looked at afterwards: no 500 and no traceback, whatever came; no secret told; no file but the store's; every
stored artifact is one, with the receipt that belongs to it; memory and descriptors came back; and a client that meant
well got all it sent stored meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from hostility import SECRETS, Attack, Hostility, Line
from receiver_process import WAIT_S, Server, check_stored, make_artifact, sha256_field, wait_for

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
    assert root - {"metrics"} == {"episodes", "uploads", "accounts", "secret"}
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


def test_uploads_that_nobody_finishes(tmp_path: Path) -> None:
    """One client begins as many as it may, half sent; the others go on, and memory stays what it was."""
    (tmp_path / "tokens").write_text("\n".join(SECRETS[:2]))
    tries = faults.times(5000, least=60)
    may = tries // 2
    server = Server(tmp_path / "root", token_file=str(tmp_path / "tokens"), token_uploads=may)
    try:
        process = psutil.Process(server.process.pid)
        resident, files = process.memory_info().rss, process.num_fds()
        data = make_artifact("half", 20_000)
        head = "PUT /v1/episodes/half{} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nUpload-Complete: ?0\r\n"
        head += f"Upload-Length: {len(data)}\r\nRepr-Digest: {sha256_field(data)}\r\nContent-Length: 5000\r\n\r\n"
        statuses: Counter[int] = Counter()
        with Line((server.host or "", server.port or 0), WAIT_S) as line:
            for number in range(tries):
                request = head.format(number, SECRETS[1]).encode() + data[:5000]
                answers = line.exchange([Attack("half", request, framed=True)])
                statuses.update(answer.status for answer in answers)
        assert statuses == {201: may, 429: tries - may}
        friend = WellBehaved(server)
        friend.stop()
        assert friend.failures == []
        assert process.memory_info().rss - resident < (50 << 20) + 20_000 * may
        assert process.num_fds() <= files + 10
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
    faults.count(
        "hostile: unfinished uploads",
        f"begun by one client; {may} were let in, and another client's were stored",
        of=5000,
        tried=tries,
        test=HERE,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_one_upload_that_many_go_on_with(tmp_path: Path, workers: int) -> None:
    """Each asks for the offset, sends from there, and is cut or taken over at any moment: never a mixture."""
    rounds = faults.times(100, least=2)
    server = Server(tmp_path / "root", workers=workers)
    appends = 0
    lock = threading.Lock()

    def go_on(episode: str, data: bytes, draw: random.Random) -> None:
        nonlocal appends
        while True:
            created = server.create(episode, data)
            if created.status == 200:
                return
            if created.status in (503, 409):
                continue
            assert created.status == 201, created.body
            location, offset = created.headers["location"], created.offset
            end = min(len(data), offset + draw.randrange(1, 200_000))
            with lock:
                appends += 1
            if draw.random() < 0.3:  # and goes away
                with contextlib.suppress(OSError):
                    server.begin_append(location, data[offset:], offset, min(end - offset, 50_000)).close()
                continue
            answer = server.append(location, data[offset:end], offset, last=end == len(data))
            assert answer.status in (200, 201, 204, 400, 404, 409, 503), answer.body
            assert answer.status != 400 or answer.json()["code"] == "inconsistent-length"

    try:
        for number in range(rounds):
            episode, data = f"many{number}", make_artifact(f"many{number}", 400_000, number)
            with ThreadPoolExecutor(6) as clients:
                draws = [faults.chance(f"many{workers}.{number}.{client}") for client in range(6)]
                for each in [clients.submit(go_on, episode, data, draw) for draw in draws]:
                    each.result(WAIT_S)
            check_stored(server, episode, data)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
    faults.count(
        f"hostile: appends to one upload at once, {workers} process{'es'[: 2 * (workers > 1)]}",
        f"{appends} appends of six clients to each of some uploads: every one stored as it was",
        of=100,
        tried=rounds,
        test=HERE,
    )
