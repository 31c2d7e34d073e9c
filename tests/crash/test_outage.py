"""An outage of the destination while many episodes wait: none is blamed, one at a time tries, all arrive after it.

What is looked at is what a front before the real receiver sees: which requests were refused, and whether two of them
were under way at once. When a pause begins some are, at most what was given to workers (`GIVEN_OUT`); from then on
each must be alone.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
import trustme
from killer import Killer
from lab import Command, Daemon, Lab, Receiver, Sections, telemetry, wait_until
from proxy import Answer, Fault, Head, Near, Passed, Proxy, give, read_whole

from fastship.lifecycle.sharing import QUEUE_DEPTH

EPISODES = 1000
QUEUED = faults.times(EPISODES, least=40)
WORKERS, CONNECTIONS = 2, 4
GIVEN_OUT = WORKERS * (QUEUE_DEPTH + CONNECTIONS)
PROBES = 4
TEST = "tests/crash/test_outage.py"

MakeLab = Callable[..., Lab]

QUICK: Sections = {
    "upload": {"retries": 0, "connections": CONNECTIONS},
    "destination": {"pause_min_s": "20ms", "pause_max_s": "100ms"},
    "workers": {"count": WORKERS},
    "pack": {"threads": WORKERS},
}


class Front(Proxy):
    """Stands before the receiver. ``says``: what it answers instead, to whom; ``tls``: its certificate, if any."""

    def __init__(self, receiver: Receiver, tls: ssl.SSLContext | None = None) -> None:
        self.says: dict[str, Answer] = {}  # by episode, or "*"
        self.tls = tls
        self.unmet: list[tuple[float, float]] = []  # connections that came to no request
        super().__init__(int(receiver.url.rpartition(":")[2]), faults.chance("outage"), faults=0)

    def serve(self, near: socket.socket) -> int:
        tls = self.tls
        if tls is None:
            return super().serve(near)
        began_s, came = time.monotonic(), 0
        with contextlib.suppress(OSError):
            near = tls.wrap_socket(near, server_side=True)
            self.sockets.append(near)  # the bare one is no more
            if tls is not self.tls:
                near.close()  # a cut of all may have come before it was there to be cut
            came = super().serve(near)  # of TLS 1.3, which says only here that it was refused
        if not came:
            self.unmet.append((began_s, time.monotonic()))
        return came

    def draw(self) -> Fault | None:
        return answer_for_it if self.says else None

    @property
    def refused(self) -> list[tuple[float, float]]:
        """When each began and ended, in order."""
        answered = [(one.began_s, one.ended_s) for one in list(self.passed) if one.status is not None and not one.well]
        return sorted([*answered, *self.unmet])


def answer_for_it(front: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    assert isinstance(front, Front)
    request = read_whole(near, head, passed)
    says = front.says.get(passed.path.rpartition("/")[2]) or front.says.get("*")
    return give(near, passed, says or front.exchange(request))


def reply(status: int, body: bytes = b"", **fields: str) -> Answer:
    named = {"content-length": str(len(body))} | {name.replace("_", "-"): value for name, value in fields.items()}
    lines = [f"HTTP/1.1 {status} No", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return Answer("\r\n".join(lines).encode() + body, status, named)


@pytest.fixture
def front(own_receiver: Receiver) -> Iterator[Front]:
    with contextlib.closing(Front(own_receiver)) as front:
        yield front


def record(lab: Lab, first: int = 0, end: int = QUEUED) -> list[str]:
    names = [f"ep{number:04}" for number in range(first, end)]
    for name in names:
        lab.episode(name, files={"data": name.encode() * 20})
    return names


def paused(lab: Lab) -> bool:
    look = lab.snapshot()
    return look is not None and look.destination.state != "up"


def alone(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those behind the last that overlap."""
    until_s, first = 0.0, 0
    for number, (began_s, ended_s) in enumerate(spans):
        if began_s < until_s:
            first = number + 1
        until_s = max(until_s, ended_s)
    return spans[first:]


def go_through(lab: Lab, front: Front, receiver: Receiver, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """An outage while a daemon ships what is queued, and all that must hold."""
    half = QUEUED // 2
    names = record(lab, end=half)
    with Daemon(lab.settings(QUICK)) as daemon:
        wait_until(lambda: len(lab.names("shipped")) >= QUEUED // 10, "a part of the queue")
        begin()
        names += record(lab, half)  # however fast it was until then
        wait_until(lambda: paused(lab), "the pause")
        wait_until(lambda: len(alone(front.refused)) >= PROBES, "probes")
        assert lab.names("quarantine") == lab.names("holds") == []
        assert len(lab.names("shipped")) < QUEUED
        refused = front.refused
        end()
        wait_until(lambda: len(lab.names("shipped")) == QUEUED, "the queue")
        result = daemon.stop()
    assert lab.names("shipped") == sorted(names)
    assert (result.fatal, result.conflicts) == (0, 0)
    assert lab.names("quarantine") == lab.names("holds") == lab.names("outbox") == lab.names("episodes") == []
    assert len(refused) - len(alone(refused)) <= GIVEN_OUT
    assert receiver.stored() == set(names)
    stored = [one for one in front.passed if one.status == 201 and one.fields.get("upload-complete") == "?1"]
    assert len(stored) <= QUEUED  # an answer may have been cut


def test_a_token_that_is_rotated(make_lab: MakeLab, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "token", tmp_path / "tokens"
    ours.write_text("token-of-yesterday\n")
    theirs.write_text("token-of-yesterday\n")
    with (
        contextlib.closing(Receiver(tmp_path / "store", "--token-file", theirs)) as receiver,
        contextlib.closing(Front(receiver)) as front,
    ):
        lab = make_lab(front.url, destination={"token_file": str(ours)})
        rotate, follow = (lambda path=path: path.write_text("token-of-today\n") for path in (theirs, ours))
        go_through(lab, front, receiver, rotate, follow)
        assert b"token-of-" not in (lab.state / "status.json").read_bytes()
    count("token rotated")


REPLIES = {
    "404 for everything": reply(404),
    "429": reply(429),
    "503 with Retry-After": reply(503, retry_after="1"),
    "502 of a proxy": reply(502),
    "409 of a proxy": reply(409, b"Conflict", connection="close"),  # to HEAD, too
}


@pytest.mark.parametrize("what", faults.some_of(list(REPLIES), "replies of an outage"))
def test_a_destination_that_refuses_everything(
    make_lab: MakeLab, own_receiver: Receiver, front: Front, what: str
) -> None:
    lab = make_lab(front.url)
    go_through(lab, front, own_receiver, lambda: front.says.update({"*": REPLIES[what]}), front.says.clear)
    count(what)


def test_a_certificate_that_expires(make_lab: MakeLab, own_receiver: Receiver, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)

    def certified(not_after: datetime.datetime | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", not_after=not_after).configure_cert(context)
        return context

    good, expired = certified(), certified(yesterday)
    with contextlib.closing(Front(own_receiver, good)) as front:
        url = f"https://localhost:{front.url.rpartition(':')[2]}"
        lab = make_lab(url, destination={"ca_file": str(tmp_path / "ca.pem")})

        def expire() -> None:
            front.tls = expired
            front.cut_all()

        go_through(lab, front, own_receiver, expire, lambda: setattr(front, "tls", good))
    count("TLS expired")


def namespaces_work() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not namespaces_work(), reason="no mount namespace of our own may be made here")
def test_a_name_that_is_gone(make_lab: MakeLab, own_receiver: Receiver, front: Front, tmp_path: Path) -> None:
    """The name is not there at first: libcurl keeps what it knows of one, and connections, for longer than a test."""
    hosts, resolver = tmp_path / "hosts", tmp_path / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n")
    resolver.write_text(
        "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"
    )  # nobody is there: no such name, at once
    lab = make_lab(f"http://receiver.lab.test:{front.url.rpartition(':')[2]}")
    names = record(lab)
    own = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf && exec"
    prefix = ("unshare", "-m", "sh", "-c", f'{own} "$@"', "sh")
    file = lab.settings_file(QUICK)
    env = {"no_proxy": "*", "NO_PROXY": "*"}
    with Command("run", "-c", file, log=tmp_path / "run.log", env=env, prefix=prefix) as daemon:
        wait_until(lambda: paused(lab), "the pause")
        wait_until(lambda: daemon.log.count("destination-paused") > PROBES, "probes")
        assert lab.names("quarantine") == lab.names("holds") == lab.names("shipped") == []
        assert front.passed == []
        with hosts.open("a") as more:  # in place: what is mounted is this very file
            more.write("127.0.0.1 receiver.lab.test\n")
        wait_until(lambda: len(lab.names("shipped")) == QUEUED, "the queue", limit_s=120.0)
        wait_until(lambda: lab.names("outbox") == [], "the last artifact's removal")
    assert own_receiver.stored() == set(names)
    assert lab.names("quarantine") == lab.names("holds") == []
    count("DNS gone")


def test_poison_episodes(make_lab: MakeLab, own_receiver: Receiver, front: Front) -> None:
    """One is refused for good, one kills its workers, and one is refused by something on the way that never says why:
    all are first in order, and every other one passes them."""
    lab = make_lab(front.url)
    names = record(lab)
    always, refused, kills = names[:3]
    (lab.episodes / kills / "more").write_bytes(telemetry(4 << 20))  # it takes a second to pack
    hard = {**QUICK, "pack": {"level": 17, "frame_bytes": "1MiB", "threads": WORKERS}}
    front.says = {always: reply(403), refused: reply(422)}
    with Killer(lab, kills, times=99) as killer, Daemon(lab.settings(hard)) as daemon:
        wait_until(lambda: len(lab.names("shipped")) == QUEUED - 3, "the others")
        wait_until(lambda: len(lab.names("quarantine")) == 2, "the quarantine")
        assert lab.names("episodes") == [always]
        front.says.clear()
        wait_until(lambda: lab.names("episodes") == [], "the last one")
        result = daemon.stop()
    assert len(killer.hit) == 3
    assert lab.names("quarantine") == [refused, kills]
    assert (result.fatal, lab.names("holds")) == (2, [])
    assert lab.names("shipped") == sorted(own_receiver.stored()) == [always, *names[3:]]
    faults.count(
        "outage: poison episodes",
        f"one refused for good and one that kills its workers before {EPISODES:,} others: two quarantined, all others "
        "pass them, and pass one that is always answered 403",
        of=EPISODES,
        tried=QUEUED,
        test=TEST,
    )


def count(what: str) -> None:
    faults.count(
        f"outage: {what}",
        f"{EPISODES:,} episodes queued while it lasts: none quarantined, one try at a time, all shipped after it",
        of=EPISODES,
        tried=QUEUED,
        test=TEST,
    )
