"""Requests that mean ill, made from a seed: what ``crash/test_hostile_receiver.py`` throws at a real receiver.

`Hostility` makes them, `Line` sends some and reads what comes. Nothing here judges, but for ids that begin with
``smuggled``: those stand in bodies only, and nobody may take them for requests.
"""

from __future__ import annotations

import base64
import contextlib
import io
import random
import re
import socket
import struct
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import zstandard
from receiver_process import make_artifact, sha256_field

ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")
SECRETS = ("s3cret-of-host-a", "s3cret-of-host-b", "query-s3cret")
"""Two tokens that the receiver accepts, and what stands in query strings: none of them may ever be told."""


class Attack(NamedTuple):
    kind: str
    data: bytes
    framed: bool = False  # one request, whole and well framed: the connection is good for the next
    head: bool = False  # its answer has no body
    cut: bool = False  # not whole: end the sending side, so that nobody waits for the rest


class Hostility:
    """Endless attacks; ``uploads`` is filled by whoever sends them with the locations that were answered."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self._rest: list[Attack] = []
        self.uploads: list[str] = []
        self._artifacts = [make_artifact(f"a{seed}", 200 * seed, seed) for seed in range(1, 6)]
        self._spoilt = [make() for make in SPOILT_ARTIFACTS.values()]
        self._kinds: list[tuple[Callable[[], Attack], int]] = [
            (self._target, 24),
            (self._fields, 20),
            (self._append, 20),
            (self._body, 8),
            (self._framing, 9),
            (self._mutated, 9),
            (self._lying, 4),
            (self._form, 3),
            (self._heavy, 1),
            (self._garbage, 2),
        ]

    def one(self) -> Attack:
        makers, weights = [maker for maker, _ in self._kinds], [weight for _, weight in self._kinds]
        maker: Callable[[], Attack] = self.draw.choices(makers, weights)[0]
        return maker()

    def some(self, most: int) -> list[Attack]:
        """What goes out together on one connection: at most ``most``, of which only the last may be `Attack.cut`."""
        found = self._rest[:most]
        self._rest = self._rest[most:]
        while len(found) < most and not (found and found[-1].cut):
            found.append(self.one())
        return found

    def unanswered(self, attacks: list[Attack]) -> None:
        """These were sent behind one that ended the connection; they are sent again."""
        self._rest = attacks + self._rest

    # --- one of each kind ---------------------------------------------------------------------------------------

    def _target(self) -> Attack:
        """Ids that traverse, that are encoded twice, that are no names."""
        draw = self.draw
        method = draw.choice(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "POST", "TRACE"])
        prefix = draw.choice(
            [
                "/v1/episodes/",
                "/v1/uploads/",
                "/v1/receipts/",
                "/v1/verifications/",
                "/v1/",
                "/",
                "//",
                "/v1/episodes//",
            ]
        )
        return self._request("target", method, prefix + self._name())

    def _fields(self) -> Attack:
        draw = self.draw
        names = draw.sample(list(FIELDS), draw.randrange(1, 5))
        fields = [(name, draw.choice([self._value(), *FIELDS[name]])) for name in names]
        if draw.random() < 0.1:
            fields += draw.choices(fields, k=draw.randrange(1, 200))
        method, path = draw.choice([("PUT", f"/v1/episodes/{self._id()}"), ("GET", "/v1/episodes/good"), ("PATCH", "")])
        return self._request("fields", method, path or self._upload(), fields)

    def _append(self) -> Attack:
        """Offsets and lengths that lie, on uploads of one's own, of others and of nobody."""
        draw = self.draw
        number = draw.choice(NUMBERS)
        data = draw.choice(self._artifacts)[: draw.choice([0, 1, 100, 10**9])]
        fields = [
            ("Content-Type", "application/partial-upload"),
            ("Upload-Offset", draw.choice(["0", "1", str(len(data)), number])),
            ("Upload-Complete", draw.choice(["?0", "?1", "?2"])),
        ]
        if draw.random() < 0.4:
            fields.append(("Upload-Length", draw.choice([number, str(len(data))])))
        if draw.random() < 0.2:
            fields.append(("Content-Digest", draw.choice([sha256_field(data), sha256_field(b"x")])))
        method = draw.choices(["PATCH", "HEAD", "DELETE", "PUT"], [12, 4, 1, 3])[0]
        if method == "PUT":
            fields = [("Upload-Complete", "?0"), ("Upload-Length", draw.choice([number, str(len(data))]))]
            if draw.random() < 0.7:
                fields.append(("Repr-Digest", sha256_field(data)))
            return self._request("append", "PUT", f"/v1/episodes/{self._id()}", fields)
        return self._request("append", method, self._upload(), fields, data if method == "PATCH" else b"")

    def _body(self) -> Attack:
        """What is no artifact, or one that wants more than it is worth."""
        draw = self.draw
        data = draw.choice(self._spoilt)
        if draw.random() < 0.3:
            data = bytes(mutate(draw, draw.choice([*self._artifacts, data])))
        fields = [("Repr-Digest", sha256_field(data))] if draw.random() < 0.5 else []
        if draw.random() < 0.5:
            fields.append(("Fastship-Content-Length", draw.choice(["0", "1", "5120", "999999999999999"])))
            fields.append(("Fastship-Content-Digest", f"blake3=:{base64.b64encode(bytes(32)).decode()}:"))
        return self._request("body", "PUT", f"/v1/episodes/{self._id()}", fields, data)

    def _framing(self) -> Attack:
        """A body that is, to somebody else on the way, another request."""
        draw = self.draw
        inner = self._whole("PUT", f"/v1/episodes/smuggled{draw.randrange(1 << 30)}", [], draw.choice(self._artifacts))
        head = f"PUT /v1/episodes/outer{draw.randrange(1 << 30)} HTTP/1.1\r\nHost: x\r\n{self._authorization()}"
        chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)
        length = f"Content-Length: {len(inner)}"
        framing, body = draw.choice(
            [
                (f"{length}\r\nTransfer-Encoding: chunked", b"0\r\n\r\n" + inner),
                ("Content-Length: 5\r\nTransfer-Encoding: chunked", chunk),
                (f"Content-Length: 0\r\n{length}", inner),
                (f"{length}\r\nContent-Length: 0", inner),
                (f"Content-Length: 0, {len(inner)}", inner),
                (f"Content-Length: +{len(inner)}", inner),
                (f"Content-Length: {len(inner)}_0", inner),
                (f"Content-Length: 0x{len(inner):x}", inner),
                (f"Content-Length : {len(inner)}", inner),
                (f" {length}", inner),
                (f"X: y\r\n {length}", inner),
                (f"X: y\r\n\t{length}", inner),
                (f"X: y\n{length}", inner),
                (f"X: y\r{length}", inner),
                (f"X\0: y\r\n{length}", inner),
                ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", chunk),
                ("Transfer-Encoding: identity, chunked", chunk),
                ("Transfer-Encoding: chunked, gzip", chunk),
                ("Transfer-Encoding: xchunked", chunk),
                ("Transfer-Encoding:\x0bchunked", chunk),
                ("Transfer-Encoding\r\n : chunked", chunk),
                ('Transfer-Encoding: "chunked"', chunk),
                ("Transfer-Encoding: chunked", b"0" + chunk),
                ("Transfer-Encoding: chunked", b"-1\r\n" + inner),
                ("Transfer-Encoding: chunked", b"ffffffffffffffff1\r\n" + inner),
                ("Transfer-Encoding: chunked", b"5;x=\r\n\r\nhello\r\n0\r\n\r\n" + inner),
                ("Transfer-Encoding: chunked", b"5;" + b"e" * draw.randrange(9000) + b"\r\nhello\r\n0\r\nT: x\r\n\r\n"),
                ("Transfer-Encoding: chunked", b"5 \nhello\n0\n\n"),
                ("Transfer-Encoding: chunked", b"5\r\nhelloXX0\r\n\r\n"),
                ("Connection: close\r\nContent-Length: 0", inner),
                ("Connection: content-length\r\nContent-Length: 0, 0", inner),
                ("Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 0", inner),
                (f"Expect: 100-continue\r\n{length}", inner[: len(inner) // 2]),
                (f"Expect: 200-fine\r\n{length}", inner),
            ]
        )
        return Attack("framing", f"{head}{framing}\r\n\r\n".encode("latin-1") + body, cut=True)

    def _mutated(self) -> Attack:
        attack = self.draw.choice([self._target, self._fields, self._append, self._body])()
        return Attack("mutated", bytes(mutate(self.draw, attack.data)), cut=True)

    def _lying(self) -> Attack:
        """A body cut short, or followed by more."""
        draw = self.draw
        data = draw.choice(self._artifacts)
        whole = self._whole("PUT", f"/v1/episodes/{self._id()}", [("Repr-Digest", sha256_field(data))], data)
        if draw.random() < 0.7:
            whole = whole[: draw.randrange(len(whole))]
        else:
            whole += draw.randbytes(draw.randrange(1, 2000))
        return Attack("lying", whole, cut=True)

    def _form(self) -> Attack:
        """Other forms of target, other versions of the protocol."""
        draw = self.draw
        name = f"form{draw.randrange(1 << 30)}"
        auth = self._authorization()
        line = draw.choice(
            [
                f"GET http://elsewhere/v1/episodes/{name}?t={SECRETS[2]} HTTP/1.1",
                f"PUT http://user:{SECRETS[2]}@elsewhere:99999/v1/episodes/{name} HTTP/1.1",
                "OPTIONS * HTTP/1.1",
                "PUT * HTTP/1.1",
                "CONNECT elsewhere:443 HTTP/1.1",
                "CONNECT / HTTP/1.1",
                f"GET /v1/episodes/{name}",
                f"GET /v1/episodes/{name} HTTP/0.9",
                f"GET /v1/episodes/{name} HTTP/1.0",
                f"GET /v1/episodes/{name} HTTP/9.9",
                f"GET  /v1/episodes/{name}  HTTP/1.1",
                f"get /v1/episodes/{name} HTTP/1.1",
                f"G\u00cbT /v1/episodes/{name} HTTP/1.1",
                f"GET v1/episodes/{name} HTTP/1.1",
                f"GET /v1/episodes/{name}#fragment?{SECRETS[2]} HTTP/1.1",
                f"GET ?{SECRETS[2]} HTTP/1.1",
                "GET  HTTP/1.1",
                f"\r\n\r\n\r\nGET /v1/episodes/{name} HTTP/1.1",
                "PRI * HTTP/2.0",
                f"SOURCE /v1/episodes/{name} ICE/1.0",
                f"DESCRIBE /v1/episodes/{name} RTSP/1.0",
            ]
        )
        extra = draw.choice(
            ["", "Host: y\r\n", "Content-Length: 0\r\n", "Upgrade: websocket\r\nConnection: upgrade\r\n"]
        )
        return Attack("form", f"{line}\r\nHost: x\r\n{auth}{extra}\r\n".encode("latin-1"), cut=True)

    def _heavy(self) -> Attack:
        """Much of what is usually little."""
        draw = self.draw
        size = draw.choice([8000, 60_000, 70_000, 300_000])
        target, fields = "/v1/episodes/heavy", []
        what = draw.randrange(5)
        if what == 0:
            target += "x" * size
        elif what == 1:
            fields = [("X-" + "n" * size, "v")]
        elif what == 2:
            fields = [(draw.choice(list(FIELDS)), draw.choice(["a", " ", ",", "sha-256=", '"', "\xff"]) * (size // 8))]
        elif what == 3:
            fields = [("a", "")] * (size // 5)
        else:
            target += "?" + SECRETS[2] * (size // 12)
        return Attack("heavy", self._whole("PUT", target, fields, b""), cut=True)

    def _garbage(self) -> Attack:
        draw = self.draw
        data = draw.choice(
            [
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500),  # TLS's first words
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + draw.randbytes(60),
                b"SSH-2.0-OpenSSH_9.2\r\n",
                b"\0" * draw.randrange(1, 3000),
                b"\r\n" * draw.randrange(1, 3000),
                b"\x1b[2J\x1b]0;owned\x07\r\n\r\n",
                draw.randbytes(draw.randrange(1, 3000)),
            ]
        )
        return Attack("garbage", data, cut=True)

    # --- their parts --------------------------------------------------------------------------------------------

    def _request(
        self, kind: str, method: str, target: str, fields: list[tuple[str, str]] | None = None, body: bytes = b""
    ) -> Attack:
        fields = list(fields or [])
        data = self._whole(method, target, fields, body)
        odd = any(not value.isprintable() or name in UNFRAMED for name, value in fields)
        framed = not odd and target.isascii() and target.isprintable() and " " not in target and target.startswith("/")
        return Attack(kind, data, framed=framed, head=method == "HEAD", cut=not framed)

    def _whole(self, method: str, target: str, fields: list[tuple[str, str]], body: bytes) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
        length = "" if any(name in UNFRAMED for name, _ in fields) else f"Content-Length: {len(body)}\r\n"
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\n{self._authorization()}{lines}{length}\r\n"
        return head.encode("utf-8", "surrogateescape") + body

    def _authorization(self) -> str:
        draw = self.draw
        if draw.random() < 0.9:
            return f"Authorization: Bearer {draw.choice(SECRETS[:2])}\r\n"
        spoilt = draw.choice(
            ["", "Bearer", f"Basic {SECRETS[0]}", f"Bearer {SECRETS[0]}x", f"Bearer {SECRETS[0][:-1]}"]
        )
        return f"Authorization: {spoilt}\r\n"

    def _id(self) -> str:
        return f"ep{self.draw.randrange(3000)}"

    def _upload(self) -> str:
        draw = self.draw
        if self.uploads and draw.random() < 0.9:
            return draw.choice(self.uploads[-50:])
        return "/v1/uploads/" + draw.choice(["0" * 64, "A" * 64, "a" * 63, "..", "0" * 64 + "%0a", self._name()])

    def _name(self) -> str:
        draw = self.draw
        return "".join(draw.choices(PIECES, k=draw.choice([1, 1, 2, 3, 6])))

    def _value(self) -> str:
        draw = self.draw
        return draw.choice([*NUMBERS, *PIECES, "", " ", ",", "\t", '"', "\x1b[31m", "\xe9", "?1;a=b", "a\x00b"])


PIECES = (
    "..", ".", "/", "../", "..%2f", "%2e%2e%2f", "%2e%2e/", "%252e%252e%252f", "..\\", "..%5c", "%00",
    "%0d%0aX:%20y", "%0a", "%1b%5b2J", "%", "%zz", "%ff%fe", "%c0%ae%c0%ae%c0%af", "%u002e", "\u2024\u2024",
    "e\u0301", "\u202e", "CON", "nul.", "a.", ".a", "-", "~", "*", "?", "#", ";", "a", "A", "ep", "etc", "passwd",
    "x" * 100, "x" * 201, "x" * 5000, "secret", "good", ".fastship-tmp", "one-1.part", "0" * 64, "ended", "%20", "+",
    "@", ":", "$(id)", "`id`", "'", "&", "|", "{0}", "%s%n",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "-0", "+1", "1.5", "1e3", "0x10", "00000000000000000001", "999999999999999", "9999999999999999",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" * 400, "\u0665", "\u00b2", "1_000",
    " 1", "1,1", "1;q",
)  # fmt: skip
UNFRAMED = ("Content-Length", "Transfer-Encoding", "Expect", "Connection", "Upgrade")
FIELDS: dict[str, tuple[str, ...]] = {
    "Repr-Digest": (sha256_field(b""), "sha-256=:AAAA:", "sha-256=::", "sha-512=:AAAA:", "sha-256=" * 50),
    "Content-Digest": (sha256_field(b""), "sha-256=:x:"),
    "Want-Repr-Digest": ("sha-256=10", "sha-256=1000000000000"),
    "Fastship-Content-Digest": (f"blake3=:{base64.b64encode(bytes(32)).decode()}:", "blake3=:?:"),
    "Fastship-Content-Length": NUMBERS,
    "Upload-Length": NUMBERS,
    "Upload-Offset": NUMBERS,
    "Upload-Complete": ("?0", "?1", "?", "1", "?1, ?0"),
    "X-Cis490-Code-Commit": ("a" * 40, "g" * 40, "a" * 41, "\u0430" * 40),
    "Range": ("bytes=0-", "bytes=-1", "bytes=9-1", "bytes=0-0,1-1", "bytes=" + "9" * 20 + "-", "bytes=-0"),
    "If-Range": ('"x"', "Wed, 21 Oct 2015 07:28:00 GMT"),
    "If-None-Match": ("*", '"x", W/"y"'),
    "Content-Range": ("bytes 0-1/2",),
    "Content-Encoding": ("gzip", "identity"),
    "Content-Type": ("application/partial-upload", "text/plain"),
    "Content-Length": NUMBERS,
    "Transfer-Encoding": ("chunked", "gzip, chunked", "identity"),
    "Expect": ("100-continue", "x"),
    "Connection": ("close", "keep-alive", "upgrade"),
    "Upgrade": ("h2c", "websocket"),
    "X-Forwarded-For": ("127.0.0.1", "\x1b[2J"),
    "Authorization": (f"Bearer {SECRETS[0]}", "Bearer \xff", "Bearer " + "x" * 5000),
    "Host": ("", "a\tb", "evil/../.."),
}


def _tar(*members: tuple[str, bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    return zstandard.ZstdCompressor().compress(out.getvalue())


def bomb(content_bytes: int, *, sized: bool = True) -> bytes:
    """Zeros, as small as zstd makes them."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=content_bytes if sized else -1)
    pieces = [compressor.compress(bytes(1 << 20)) for _ in range(content_bytes >> 20)]
    return b"".join([*pieces, compressor.flush()])


def seek_table(*entries: tuple[int, int], count: int | None = None) -> bytes:
    body = b"".join(struct.pack("<II", *entry) for entry in entries)
    footer = struct.pack("<IBI", len(entries) if count is None else count, 0, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(body) + 9) + body + footer


_FRAME = zstandard.ZstdCompressor().compress(b"x" * 1000)
_EMPTY = zstandard.ZstdCompressor().compress(b"")
SPOILT_ARTIFACTS: dict[str, Callable[[], bytes]] = {
    "nothing of zstd": lambda: b"PK\x03\x04" + b"no artifact" * 20,
    "bomb with its size": lambda: bomb(64 << 20),
    "bomb without": lambda: bomb(64 << 20, sized=False),
    "a window of 2 GiB": lambda: b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00",
    "a size of 2^63": lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 63) + b"\x01\x00\x00",
    "empty frames": lambda: _EMPTY * 20_000,
    "skippable of 4 GiB": lambda: struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + b"x" * 100,
    "skippables only": lambda: struct.pack("<II", 0x184D2A50, 0) * 20_000,
    "table of a large frame": lambda: _FRAME + seek_table((len(_FRAME), 1 << 30)),
    "table of other sizes": lambda: _FRAME + seek_table((len(_FRAME), 999)),
    "table of a hidden frame": lambda: _FRAME + seek_table((len(_FRAME), 0)),
    "table of 2^32 frames": lambda: _FRAME + seek_table((len(_FRAME), 1000), count=0xFFFFFFFF),
    "table that overlaps": lambda: _FRAME + seek_table((len(_FRAME) - 1, 1000), (1, 0)),
    "a dictionary": lambda: b"\x28\xb5\x2f\xfd\x03\xff\xff\xff\xff\x00\x01\x00\x00",
    "names that lead out": lambda: _tar(("../../etc/passwd", tarfile.REGTYPE, ""), ("/abs", tarfile.REGTYPE, "")),
    "devices and links": lambda: _tar(
        ("null", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("up", tarfile.SYMTYPE, "/"),
        ("h", tarfile.LNKTYPE, "/x"),
    ),
    "a million of nothing": lambda: zstandard.ZstdCompressor().compress(_tar_header() * 20_000),
}


def _tar_header() -> bytes:
    return tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)


def mutate(draw: random.Random, data: bytes) -> bytearray:
    """A few bytes changed, gone, doubled or put in."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(out) + 1)
        what = draw.randrange(5)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del out[at : at + draw.choice([1, 2, 10, 100])]
        elif what == 2:
            out[at:at] = out[at : at + draw.choice([1, 5, 50])]
        elif what == 3:
            out[at:at] = draw.choice(
                [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"\xff", b"\r\n\r\n", b"0"]
            )
        elif out:
            out[at % len(out)] = draw.randrange(256)
    return out


class Answered(NamedTuple):
    status: int
    fields: bytes
    body: bytes


class Line:
    """A connection that is kept while it can be."""

    def __init__(self, address: tuple[str, int], timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._socket: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._buffer = b""

    def exchange(self, attacks: list[Attack]) -> list[Answered]:
        """Send all, one behind the other; the answers that came. What is `cut` stands last."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ended = attacks[-1].cut
        with contextlib.suppress(OSError):
            self._socket.sendall(b"".join(attack.data for attack in attacks))
            if ended:
                self._socket.shutdown(socket.SHUT_WR)
        answers: list[Answered] = []
        for attack in attacks:
            answer = self._read(attack.head)
            if answer is None:
                self.close()
                break
            answers.append(answer)
        if ended and self._socket is not None:
            while (answer := self._read(False)) is not None:
                answers.append(answer)
            self.close()
        return answers

    def _read(self, head: bool) -> Answered | None:
        while True:
            while (match := ANSWER.match(self._buffer)) is None:
                if not self._more():
                    return None
            status, fields = int(match[1]), match[2].lower()
            self._buffer = self._buffer[match.end() :]
            if status >= 200:
                break
        length = re.search(rb"(?:^|\n)content-length: (\d+)\r", fields)
        count = 0 if head or length is None or status in (204, 304) else int(length[1])
        while len(self._buffer) < count:
            if not self._more():
                break
        body, self._buffer = self._buffer[:count], self._buffer[count:]
        if b"connection: close" in fields:
            while self._more():
                pass
            self.close()
        return Answered(status, fields, body)

    def _more(self) -> bool:
        if self._socket is None:
            return False
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionError:
            return False
        self._buffer += data
        return bool(data)
