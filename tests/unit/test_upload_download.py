"""Fetching what a destination stored: what is right, what is wrong and how, and what says nothing of an episode."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
import zstandard
from blake3 import blake3
from scripted_server import UPLOAD, Head, Peer, Server

from fastship.errors import EXIT_NOT_SHIPPED, DestinationError
from fastship.frames.seektable import SEEKABLE_MAGIC
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Reread, Wanted, download

QUICK = msgspec.structs.replace(UPLOAD, retries=3)
FRAME = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(hashlib.sha512(b"seed").digest() * 20_000)
NOISE = hashlib.shake_128(b"noise").digest(300_000)
STREAM = NOISE + b"end"
TABLE = (0x184D2A5E).to_bytes(4, "little") + (4).to_bytes(4, "little") + SEEKABLE_MAGIC.to_bytes(4, "little")
DATA = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(STREAM) + TABLE
SHIPPED = Wanted(episode="ep1", artifact_sha256=hashlib.sha256(DATA).hexdigest(), artifact_bytes=len(DATA))
Script = Callable[[Peer, Head], None]


def fetch(script: Script, *wanted: Wanted, proof: str = "status", upload: UploadSettings = QUICK) -> list[Reread]:
    with Server(script) as server:
        to = msgspec.convert({"url": server.url, "proof": proof}, DestinationSettings)
        return list(download(wanted or (SHIPPED,), to, upload))


def one(script: Script, *wanted: Wanted, proof: str = "status") -> Reread:
    (found,) = fetch(script, *wanted, proof=proof)
    return found


def spoilt(at: int = 150_000) -> bytes:
    return DATA[:at] + bytes([DATA[at] ^ 16]) + DATA[at + 1 :]


class Store:
    """A server of one artifact that knows ranges; ``cuts``: after so many bytes of a body its connection is cut."""

    def __init__(self, data: bytes = DATA, *cuts: int, etag: str = '"1"', ranges: bool = True) -> None:
        self.data, self.etag, self.ranges = data, etag, ranges
        self.cuts = list(cuts)
        self.heads: list[Head] = []

    def __call__(self, peer: Peer, head: Head) -> None:
        assert (head.method, head.fields["accept-encoding"]) == ("GET", "identity")
        self.heads.append(head)
        start, status, more = 0, 200, ""
        range_ = head.fields.get("range", "")
        if self.ranges and range_ and head.fields.get("if-range") == self.etag:
            start, status = int(range_.removeprefix("bytes=").removesuffix("-")), 206
            more = f"Content-Range: bytes {start}-{len(self.data) - 1}/{len(self.data)}\r\n"
        tag = f"ETag: {self.etag}\r\n" if self.etag else ""
        body = self.data[start:]
        line = f"HTTP/1.1 {status} So\r\nContent-Length: {len(body)}\r\n{tag}{more}\r\n"
        cut = self.cuts.pop(0) if self.cuts else None
        peer.sock.sendall(line.encode() + body[:cut])
        if cut is not None:
            peer.cut()

    @property
    def ranges_asked(self) -> list[str]:
        return [head.fields.get("range", "") for head in self.heads]


def test_what_is_there_is_sound() -> None:
    found = one(Store())
    assert (found.verdict, found.artifact_sha256, found.artifact_bytes) == ("sound", SHIPPED.artifact_sha256, len(DATA))
    assert (found.read_from, found.error) == ("download", "")
    assert found.began_at <= found.ended_at


def test_a_cut_download_goes_on_where_it_was() -> None:
    store = Store(DATA, 100_000, 50_000)
    assert one(store).verdict == "sound"
    assert store.ranges_asked == ["", "bytes=100000-", "bytes=150000-"]


@pytest.mark.parametrize(("etag", "ranges"), [('"1"', False), ("", True), ('W/"1"', True)])
def test_where_ranges_are_ignored_or_not_to_be_trusted_it_begins_again(etag: str, ranges: bool) -> None:
    store = Store(DATA, 100_000, 150_000, 200_000, etag=etag, ranges=ranges)
    assert one(store).verdict == "sound"
    assert len(store.heads) == 4
    assert store.ranges_asked[1] == ("bytes=100000-" if etag == '"1"' else "")


def test_cuts_that_bring_no_more_end_the_asking() -> None:
    store = Store(DATA, *[100_000] * 100, ranges=False)
    with pytest.raises(DestinationError, match="cannot be asked about ep1: the connection failed"):
        one(store)
    assert len(store.heads) == 2 + QUICK.retries - 1


def test_what_changes_between_two_ranges_is_not_digested_as_one() -> None:
    store = Store(spoilt(), 100_000, etag='"old"')

    def script(peer: Peer, head: Head) -> None:
        store(peer, head)
        store.data, store.etag = DATA, '"new"'

    assert one(script).verdict == "sound"
    assert store.ranges_asked == ["", "bytes=100000-"]


@pytest.mark.parametrize(
    "fields",
    [
        {"Content_Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"},
        {"Content_Range": f"bytes 100000-{len(DATA)}/{len(DATA) + 1}"},
        {"Content_Range": f"bytes 100000-{len(DATA) - 1}/{len(DATA)}", "ETag": '"2"'},
        {"Content_Range": "pages 1-2/3"},
        {},
    ],
)
@pytest.mark.parametrize("length", [len(DATA) - 100_000, 3 << 20])
def test_a_206_of_something_else_is_not_taken_for_the_rest(fields: dict[str, str], length: int) -> None:
    store = Store(DATA, 100_000)

    def script(peer: Peer, head: Head) -> None:
        if "range" in head.fields:
            peer.answer(206, bytes(length), **fields)
        else:
            store(peer, head)

    assert one(script).verdict == "sound"
    assert store.ranges_asked == ["", ""]


def test_what_can_never_be_fetched_whole_is_told_of_that_episode_alone() -> None:
    def script(peer: Peer, head: Head) -> None:
        if head.target.endswith("/ep2"):
            peer.answer(206, b"xx", Content_Range="bytes 5-6/7")
        else:
            Store()(peer, head)

    found = {each.episode: each for each in fetch(script, SHIPPED, msgspec.structs.replace(SHIPPED, episode="ep2"))}
    assert (found["ep1"].verdict, found["ep2"].verdict) == ("sound", "failed")
    assert "cannot be fetched whole" in found["ep2"].error


def test_a_server_that_gives_so_much_at_once_is_asked_for_the_rest() -> None:
    def script(peer: Peer, head: Head) -> None:
        start = int(head.fields.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start == 0:
            whole = f'HTTP/1.1 200 So\r\nContent-Length: {len(DATA)}\r\nETag: "1"\r\n\r\n'
            peer.sock.sendall(whole.encode() + DATA[:70_000])
            peer.cut()
            return
        end = min(start + 70_000, len(DATA))
        peer.answer(206, DATA[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(DATA)}", ETag='"1"')

    assert one(script).verdict == "sound"


def test_an_old_date_is_a_validator_and_a_new_one_is_not() -> None:
    day = "Tue, 24 Nov 2026"
    for modified, asked in ((f"{day} 15:00:00 GMT", ["", "bytes=100000-"]), (f"{day} 15:00:10 GMT", ["", ""])):
        heads: list[Head] = []

        def script(peer: Peer, head: Head, modified: str = modified, heads: list[Head] = heads) -> None:
            heads.append(head)
            dated = f"Date: {day} 15:00:10 GMT\r\nLast-Modified: {modified}\r\n"
            if "range" in head.fields:
                assert head.fields["if-range"] == modified
                peer.answer(206, DATA[100_000:], Content_Range=f"bytes 100000-{len(DATA) - 1}/{len(DATA)}")
                return
            cut = 100_000 if len(heads) == 1 else None
            peer.sock.sendall(f"HTTP/1.1 200 So\r\nContent-Length: {len(DATA)}\r\n{dated}\r\n".encode() + DATA[:cut])
            if cut:
                peer.cut()

        assert one(script).verdict == "sound"
        assert [head.fields.get("range", "") for head in heads] == asked


def test_a_byte_that_rotted_is_told_when_it_came_twice() -> None:
    store = Store(spoilt())
    found = one(store)
    assert found.verdict == "rotted"
    assert found.artifact_sha256 == hashlib.sha256(spoilt()).hexdigest()
    assert f"its {len(DATA)} bytes have SHA-256 {found.artifact_sha256} there" in found.error
    assert "the zstd frame that begins at its byte 0 is damaged" in found.error
    assert store.ranges_asked == ["", ""]


def test_a_byte_that_the_line_changed_is_not_the_servers() -> None:
    bodies = [spoilt(), DATA]
    assert one(lambda peer, _head: peer.answer(200, bodies.pop(0))).verdict == "sound"


def test_what_comes_otherwise_each_time_is_not_known() -> None:
    bodies = [spoilt(), spoilt(1000)]
    found = one(lambda peer, _head: peer.answer(200, bodies.pop(0)))
    assert found.verdict == "failed"
    assert "twice it came otherwise" in found.error


@pytest.mark.parametrize("end", [0, 1, 1000, len(DATA) - len(TABLE), len(DATA) - 1])
def test_what_is_shorter_is_rotted(end: int) -> None:
    found = one(Store(DATA[:end]))
    assert found.verdict == "rotted"
    assert f"{end} bytes are there, {len(DATA)} were shipped" in found.error


def test_another_artifact_is_told_from_one_that_rotted_and_its_content_is_named() -> None:
    other = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(STREAM + bytes(1 << 20)) + TABLE
    found = one(Store(other))
    assert (found.verdict, found.artifact_sha256) == ("sound", hashlib.sha256(other).hexdigest())
    assert found.content_blake3 == blake3(STREAM + bytes(1 << 20)).hexdigest()
    packed_otherwise = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(STREAM) + TABLE + TABLE
    assert one(Store(packed_otherwise)).content_blake3 == blake3(STREAM).hexdigest()


def test_without_a_receipt_what_is_sound_is_named() -> None:
    store = Store()
    found = one(store, Wanted(episode="ep1"))
    assert (found.verdict, found.content_blake3) == ("sound", blake3(STREAM).hexdigest())
    assert len(store.heads) == 1
    assert one(Store(spoilt()), Wanted(episode="ep1")).verdict == "rotted"


@pytest.mark.parametrize(
    ("status", "body", "proof"),
    [(404, b"<html>", "status"), (410, b"", "status"), (404, b'{"error": "", "code": "not-found"}', "receipt")],
)
def test_what_is_not_there_is_missing(status: int, body: bytes, proof: str) -> None:
    found = one(lambda peer, _head: peer.answer(status, body), proof=proof)
    assert (found.verdict, found.artifact_bytes, found.read_from) == ("missing", 0, "")


@pytest.mark.parametrize(
    ("status", "fields", "body", "proof", "said"),
    [
        (404, {}, b"<html>", "receipt", "does not give out"),  # a receiver has its own word for that
        (405, {}, b"", "status", "does not give out"),
        (501, {}, b"", "status", "does not give out"),
        (204, {}, b"", "status", "does not give out"),
        (200, {"Content_Type": "text/html; charset=utf-8"}, b"<html>log in</html>", "status", "a page"),
        (401, {}, b"", "status", "token"),
        (403, {}, b"<Error>AccessDenied</Error>", "status", "access"),
        (302, {"Location": "http://elsewhere.example/"}, b"", "status", "redirect"),
        (307, {"Location": "http://elsewhere.example/"}, b"", "status", "redirect"),
        (503, {}, b"", "status", "cannot be asked"),
        (503, {"Retry_After": "3600"}, b"", "status", "overloaded"),
        (500, {}, b"", "status", "cannot be asked"),
    ],
)
def test_what_is_the_destinations_fault_ends_the_asking_with_a_sentence(
    status: int, fields: dict[str, str], body: bytes, proof: str, said: str
) -> None:
    with pytest.raises(DestinationError) as caught:
        one(lambda peer, _head: peer.answer(status, body, **fields), proof=proof)
    assert said in caught.value.message
    assert caught.value.remedy
    assert caught.value.exit_code == EXIT_NOT_SHIPPED


def test_a_moment_of_weakness_is_waited_for_and_gone_on_after() -> None:
    store = Store(DATA, 100_000)
    requests = itertools.count()

    def script(peer: Peer, head: Head) -> None:
        if next(requests) in (1, 2):
            peer.answer(503)
        else:
            store(peer, head)

    assert one(script).verdict == "sound"
    assert store.ranges_asked == ["", "bytes=100000-"]


def test_a_length_that_nobody_said_is_that_of_what_came() -> None:
    def until_it_closes(peer: Peer, _head: Head) -> None:
        peer.sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + DATA)
        peer.cut()

    def chunked(peer: Peer, _head: Head) -> None:
        peer.sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(DATA), 5000):
            piece = DATA[at : at + 5000]
            peer.sock.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        peer.sock.sendall(b"0\r\n\r\n")

    assert [one(script).verdict for script in (until_it_closes, chunked)] == ["sound", "sound"]


def test_a_download_that_stands_still_is_gone_on_with_elsewhere() -> None:
    released = threading.Event()
    store = Store()
    first = itertools.count()

    def script(peer: Peer, head: Head) -> None:
        if next(first) == 0:
            peer.sock.sendall(
                f'HTTP/1.1 200 So\r\nContent-Length: {len(DATA)}\r\nETag: "1"\r\n\r\n'.encode() + DATA[:9000]
            )
            released.wait()
        else:
            store(peer, head)

    try:
        with Server(script) as server:
            to = DestinationSettings(url=server.url, proof="status")
            (found,) = download([SHIPPED], to, msgspec.structs.replace(QUICK, stall_timeout_s=0.3))
            released.set()
    finally:
        released.set()
    assert (found.verdict, store.ranges_asked) == ("sound", ["bytes=9000-"])


def test_it_keeps_to_the_bandwidth() -> None:
    rate = 400_000
    began = time.monotonic()
    (found,) = fetch(Store(), upload=msgspec.structs.replace(QUICK, bandwidth=rate))
    assert found.verdict == "sound"
    assert time.monotonic() - began >= (len(DATA) - (64 << 10)) / rate  # no sooner than the limit lets it


def test_who_wants_no_more_is_let_go_in_the_middle() -> None:
    gone = threading.Event()

    def endless(peer: Peer, head: Head) -> None:
        if head.target.endswith("/ep1"):
            Store()(peer, head)
            return
        peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                peer.sock.sendall(bytes(10_000))
        except OSError:
            gone.set()

    with Server(endless) as server:
        to = DestinationSettings(url=server.url, proof="status")
        asking = download([SHIPPED, msgspec.structs.replace(SHIPPED, episode="ep2")], to, QUICK)
        assert next(asking).episode == "ep1"
        asking.close()
        assert gone.wait(30)
