"""A proxy between a shipper and a receiver that does to requests what lines, proxies and load balancers do.

Each request is carried as it is, or by one of `FAULTS`, drawn from the random numbers of the test until so many were
played; what went over it is kept in `Proxy.passed`, in order. It knows as much HTTP as fastship's client speaks:
bodies with a length, one request at a time.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import scripted_server

PIECE_BYTES = 1 << 15
PATIENCE_S = 30.0  # only a fault of the product waits so long
GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Head(scripted_server.Head):
    """A request's line and fields, and how it is sent on."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        lines = raw.decode("latin-1").split("\r\n")
        self.expects = self.fields.get("expect") == "100-continue"
        # Answered here, as most proxies do: what is beyond is not asked before the body.
        self.raw = "\r\n".join([line for line in lines if not line.lower().startswith("expect:")]).encode("latin-1")


class Answer(NamedTuple):
    """A final answer, as it came."""

    raw: bytes
    status: int
    fields: dict[str, str]


class Passed:
    """One request that the client made: what of it went over the line, and what the client was told."""

    def __init__(self, head: Head) -> None:
        self.method = head.method
        self.path = head.target
        self.whole = head.method == "PUT" and "upload-complete" not in head.fields
        self.offset = int(head.fields.get("upload-offset", 0))
        self.came_bytes = 0  # of its body, from the client
        self.fault = ""
        self.status: int | None = None  # of the answer that the client was given whole
        self.fields: dict[str, str] = {}
        self.began_s = time.monotonic()
        self.ended_s = 0.0  # just before the client was answered

    @property
    def well(self) -> bool:
        return self.status is not None and self.status < 300

    def __repr__(self) -> str:
        where = "whole" if self.whole else self.offset
        told = self.fields.get("upload-offset", "")
        return f"{self.method} {where} +{self.came_bytes} {self.fault or 'carried'} -> {self.status} {told}"


Fault = Callable[["Proxy", "Near", Head, Passed], bool]
"""Does with a request what it is called; whether the client's connection is still good."""


class Proxy:
    """Stands before ``port`` of this host. ``faults``: so many are played, with probability ``often`` at a request."""

    def __init__(self, port: int, chance: random.Random, faults: int, often: float = 0.7) -> None:
        self.chance = chance
        self.passed: list[Passed] = []
        self.played: list[str] = []
        self.errors: list[BaseException] = []
        self._port = port
        self._left = faults
        self._often = often
        self._stale: bytes | None = None  # a request that is sent once more when another has come
        self.sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._spawn(self._accept)

    def _spawn(self, function: Callable[..., object], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            near.settimeout(PATIENCE_S)
            self.sockets.append(near)
            self._spawn(self.serve, near)

    def serve(self, near: socket.socket) -> int:
        """One connection of the client's, to its end; how many requests came."""
        ahead, came = b"", 0
        try:
            while True:
                raw, ahead = _until_blank_line(near, ahead)
                if not raw:
                    break
                came += 1
                head = Head(raw)
                passed = Passed(head)
                self.passed.append(passed)
                if head.expects:
                    near.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                peer = Near(near, ahead)
                fault = self.draw()
                if fault is not None:
                    passed.fault = fault.__name__
                    self.played.append(fault.__name__)
                stale, self._stale = self._stale, None
                if stale is not None and self.chance.random() < 0.5:
                    self.exchange(stale)
                    stale = None
                good = (fault or carry)(self, peer, head, passed)
                if stale is not None:
                    self.exchange(stale)
                if not good:
                    break
                ahead = peer.ahead
        except OSError:
            pass  # an end went away
        except BaseException as error:
            self.errors.append(error)
        finally:
            _cut(near)
        return came

    def draw(self) -> Fault | None:
        if self._left <= 0 or self.chance.random() >= self._often:
            return None
        self._left -= 1
        return self.chance.choice(FAULTS)

    def connect(self) -> socket.socket:
        far = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_S)
        self.sockets.append(far)
        return far

    def exchange(self, request: bytes) -> Answer:
        """A whole request on a connection of its own."""
        with self.connect() as far:
            with contextlib.suppress(OSError):  # answered before it was read
                far.sendall(request)
            return read_answer(far, request[:4] == b"HEAD")

    def cut_all(self) -> None:
        """Every connection there is."""
        for sock in list(self.sockets):
            _cut(sock)

    def replay_later(self, request: bytes) -> None:
        self._stale = request

    def cut_later(self, far: socket.socket, after_s: float) -> None:
        timer = threading.Timer(after_s, _cut, (far,))
        self._threads.append(timer)
        timer.start()

    def close(self) -> None:
        """Raises what went wrong in here."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.cut_all()
        for thread in self._threads[1:]:
            thread.join()
        for sock in self.sockets:
            sock.close()
        if self.errors:
            raise self.errors[0]


class Near:
    """The client's end; ``ahead`` was read of it already."""

    def __init__(self, sock: socket.socket, ahead: bytes) -> None:
        self.sock = sock
        self.ahead = ahead

    def read(self, most: int) -> bytes:
        if self.ahead:
            piece, self.ahead = self.ahead[:most], self.ahead[most:]
            return piece
        return self.sock.recv(most)


# --- what is done to a request -----------------------------------------------------------------------------------


def carry(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    with proxy.connect() as far:
        if _send_body(near, far, head, passed, head.length):
            return give(near, passed, read_answer(far, head.method == "HEAD"))
        give(near, passed, read_answer(far, head.method == "HEAD"))
        return False


def cut(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    far = proxy.connect()
    _send_body(near, far, head, passed, _somewhere(proxy, head.length))
    _cut(far)
    _cut(near.sock)
    return False


def reset(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    far = proxy.connect()
    _send_body(near, far, head, passed, _somewhere(proxy, head.length))
    for sock in (far, near.sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    return False


def leave_half_open(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    """The client is cut; the receiver hears of it later, or much later."""
    far = proxy.connect()
    _send_body(near, far, head, passed, _somewhere(proxy, head.length))
    _cut(near.sock)
    proxy.cut_later(far, proxy.chance.choice((0.001, 0.02, 0.2, 1.0)))
    return False


def stall(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    """Nothing goes on any more, until the client gives up."""
    far = proxy.connect()
    _send_body(near, far, head, passed, _somewhere(proxy, head.length))
    _await_gone(near)
    proxy.cut_later(far, proxy.chance.choice((0.0, 0.2)))
    return False


def withhold_answer(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    with proxy.connect() as far:
        _send_body(near, far, head, passed, head.length)
        read_answer(far, head.method == "HEAD")
        _await_gone(near)
    return False


def lose_answer(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    with proxy.connect() as far:
        _send_body(near, far, head, passed, head.length)
        read_answer(far, head.method == "HEAD")
    return False


def truncate_answer(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    with proxy.connect() as far:
        _send_body(near, far, head, passed, head.length)
        raw = read_answer(far, head.method == "HEAD").raw
        near.sock.sendall(raw[: proxy.chance.randrange(len(raw))])
    return False


def send_twice_before(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    request = read_whole(near, head, passed)
    proxy.exchange(request)
    return give(near, passed, proxy.exchange(request))


def send_twice_after(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    request = read_whole(near, head, passed)
    answer = proxy.exchange(request)
    proxy.exchange(request)
    return give(near, passed, answer)


def send_twice_at_once(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    request = read_whole(near, head, passed)
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(proxy.exchange(request))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return bool(answers) and give(near, passed, proxy.chance.choice(answers))


def send_again_later(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    """Now, and beside the client's next one."""
    request = read_whole(near, head, passed)
    answer = proxy.exchange(request)
    proxy.replay_later(request)
    return give(near, passed, answer)


def refuse_unread(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    give(near, passed, _refusal(proxy))
    near.sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        while piece := near.read(PIECE_BYTES):
            passed.came_bytes += len(piece)
    return False


def refuse(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    read_whole(near, head, passed)
    give(near, passed, _refusal(proxy))
    return False


def answer_otherwise(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    """The receiver does it, and the client is told that it failed."""
    proxy.exchange(read_whole(near, head, passed))
    give(near, passed, _refusal(proxy))
    return False


def delay(proxy: Proxy, near: Near, head: Head, passed: Passed) -> bool:
    request = read_whole(near, head, passed)
    time.sleep(proxy.chance.uniform(0.0, 0.05))
    with proxy.connect() as far:
        while request and not _readable(far):
            count = proxy.chance.randint(1, max(1, len(request)))
            with contextlib.suppress(OSError):
                far.sendall(request[:count])
            request = request[count:]
            time.sleep(proxy.chance.uniform(0.0, 0.01))
        answer = read_answer(far, head.method == "HEAD")
    time.sleep(proxy.chance.uniform(0.0, 0.05))
    return give(near, passed, answer)


FAULTS: list[Fault] = [
    cut,
    reset,
    leave_half_open,
    stall,
    withhold_answer,
    lose_answer,
    truncate_answer,
    send_twice_before,
    send_twice_after,
    send_twice_at_once,
    send_again_later,
    refuse_unread,
    refuse,
    answer_otherwise,
    delay,
]


# --- pieces of it ------------------------------------------------------------------------------------------------


def _somewhere(proxy: Proxy, length: int) -> int:
    """At either end of a body, or anywhere in it."""
    return proxy.chance.choice((0, min(1, length), max(0, length - 1), length, proxy.chance.randint(0, length)))


def _send_body(near: Near, far: socket.socket, head: Head, passed: Passed, count: int) -> bool:
    """The head and so much of the body, as it comes. False: there is an answer before its end, or no client."""
    far.sendall(head.raw + b"\r\n\r\n")
    while count:
        if _readable(far):
            return False
        piece = near.read(min(count, PIECE_BYTES))
        if not piece:
            return False
        passed.came_bytes += len(piece)
        count -= len(piece)
        with contextlib.suppress(OSError):
            far.sendall(piece)
    return True


def read_whole(near: Near, head: Head, passed: Passed) -> bytes:
    body = bytearray()
    while len(body) < head.length:
        piece = near.read(min(PIECE_BYTES, head.length - len(body)))
        if not piece:
            raise ConnectionResetError("the client went away")
        passed.came_bytes += len(piece)
        body += piece
    return head.raw + b"\r\n\r\n" + bytes(body)


def read_answer(far: socket.socket, to_head: bool) -> Answer:
    """The final answer; interim ones are dropped. Raises ``ConnectionResetError`` where none comes whole."""
    rest = b""
    while True:
        raw, rest = _until_blank_line(far, rest)
        if not raw:
            raise ConnectionResetError("no answer")
        lines = raw.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        if status >= 200:
            break
    named = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = 0 if to_head or status == 204 else int(named.get("content-length", 0))
    while len(rest) < length:
        piece = far.recv(PIECE_BYTES)
        if not piece:
            raise ConnectionResetError("half an answer")
        rest += piece
    return Answer(raw + b"\r\n\r\n" + rest[:length], status, named)


def give(near: Near, passed: Passed, answer: Answer) -> bool:
    passed.ended_s = time.monotonic()
    passed.status, passed.fields = answer.status, answer.fields
    near.sock.sendall(answer.raw)
    return answer.fields.get("connection", "").lower() != "close"


def _refusal(proxy: Proxy) -> Answer:
    status = proxy.chance.choice((500, 502, 503, 504))
    fields = {"content-type": "text/html", "connection": "close"}
    if status == 503 and proxy.chance.random() < 0.5:
        fields["retry-after"] = "1"
    body = b"<html>a proxy's own words</html>"
    lines = [f"HTTP/1.1 {status} No", f"content-length: {len(body)}", *(f"{n}: {v}" for n, v in fields.items())]
    return Answer("\r\n".join([*lines, "", ""]).encode() + body, status, fields)


def _until_blank_line(sock: socket.socket, ahead: bytes) -> tuple[bytes, bytes]:
    while b"\r\n\r\n" not in ahead:
        piece = sock.recv(PIECE_BYTES)
        if not piece:
            return b"", b""
        ahead += piece
    raw, _, rest = ahead.partition(b"\r\n\r\n")
    return raw, rest


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def _await_gone(near: Near) -> None:
    """Until the client has closed; what it still sends is not read."""
    poll = select.poll()
    poll.register(near.sock, GONE)
    poll.poll(PATIENCE_S * 1000)


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def sent_again(passed: list[Passed], size: int) -> int:
    """Bytes of artifacts, of ``size`` together, that went over the line more than once; asserts that they had to.

    What is asserted of every request with a body: an append begins exactly where the receiver last told the client
    that the upload stands, and that never goes back; what was answered well is never sent again. So of each request
    that was not, at most its own body is sent again: one append.
    """
    named: dict[str, int] = {}  # by upload
    episodes: dict[str, str] = {}  # of the uploads
    well_until: dict[str, int] = {}  # by episode
    excused, total = 0, 0
    for each in passed:
        episode = episodes.get(each.path, each.path)
        if each.came_bytes:
            if not each.whole:
                assert each.offset == named[each.path], f"an append at {each.offset}, not {named[each.path]}: {passed}"
            assert each.offset >= well_until.get(episode, 0), f"bytes that were answered for are sent again: {passed}"
            total += each.came_bytes
            if each.well:
                well_until[episode] = each.offset + each.came_bytes
            else:
                excused += each.came_bytes
        told = each.fields.get("upload-offset")
        if told is not None and each.status in (201, 204, 409):
            path = each.fields.get("location", each.path)
            episodes[path] = episode
            assert int(told) >= named.get(path, 0), f"the offset of {path} goes back: {passed}"
            named[path] = int(told)
    assert total <= size + excused, f"{total} bytes of {size}, {excused} of them in vain: {passed}"
    return max(0, total - size)
