"""`measure_link`: how fast the destination takes bytes, found by a real upload that leaves nothing behind.

The same requests as way 3 of docs/protocol.md, through the same `Transfers` as every upload, so that bandwidth limits,
TLS, tokens and proxies count: an upload of random bytes is created, appended to with ``Upload-Complete: ?0``, and
cancelled with DELETE. What always holds: a destination is asked (OPTIONS) whether it keeps unfinished uploads before
anything is sent to it, since another might store what comes; no upload is ever ended, so none can become an episode;
all that were made are cancelled however the measuring ends, and one that could not be is forgotten by the receiver
after its ``upload_max_age_s``.

Imports ``course``, ``curl``, ``native`` and ``verdict``; ``tune`` imports it through the package.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from fastship import fields
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import Answer, Body, Fault, Request
from fastship.upload.curl import Ended, Transfers
from fastship.upload.native import Misbehaviour, UploadPlace, episode_url, read_answer
from fastship.upload.verdict import verdict_of_fault, verdict_of_status

APPEND_S = 0.5
"""An append is as long as the link takes so much time for it: the wait for its answer is then a small part."""

_FIRST_APPEND_BYTES = 128 << 10  # until the rate is known: 1 s on a line of 1 Mbit/s
_SETTLED = 1.5  # an append less than so many times as fast as the one before: the connection's window has grown
_DATA_BYTES = 32 << 20  # and the longest append: the receiver makes so much durable at once
_LATE_S = 10.0  # an append that takes so much longer than the rest of the time is cut
_CANCEL_S = 5.0


class LinkSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """What the destination took and made durable, over ``connections`` at once."""

    bytes_per_s: float
    connections: int
    sent_bytes: int
    cpu_s_per_byte: float  # of this process


class LinkUnknown(msgspec.Struct, frozen=True):
    """The link could not be measured, and why: one sentence without its full stop."""

    reason: str


Measured: TypeAlias = LinkSpeed | LinkUnknown
_Steps: TypeAlias = Generator[Request, Answer | Fault, None]


def measure_link(
    destination: DestinationSettings,
    upload: UploadSettings,
    *,
    connections: int,
    seconds: float,
    limit_bytes: int = 1 << 30,
    code_commit: str | None = None,
) -> Measured:
    """Send random bytes over ``connections`` for about ``seconds``, at most ``limit_bytes``; what came of it.

    ``code_commit`` is told at the creation, for receivers with an allow-list. Blocks. Raises nothing for what the
    network or the destination do.
    """
    data_fd = os.memfd_create("fastship-link")
    try:
        os.write(data_fd, os.urandom(_DATA_BYTES))
        probe = _Probe(destination, upload, data_fd, code_commit)
        try:
            return probe.run(connections, seconds, limit_bytes // connections)
        finally:
            probe.close()
    finally:
        os.close(data_fd)


class _Append(NamedTuple):
    """Taken by the receiver between two times of the monotonic clock."""

    began: float
    ended: float
    size_bytes: int

    def within(self, began: float, ended: float) -> float:
        """Bytes of it between two other times, if it went evenly."""
        common_s = min(self.ended, ended) - max(self.began, began)
        return self.size_bytes * max(0.0, common_s) / (self.ended - self.began)


class _Line:
    """One connection's upload: where it is, and what was taken in how much time."""

    def __init__(self) -> None:
        self.asked = False  # for an upload, which may exist then
        self.place: UploadPlace | None = None
        self.taken: list[_Append] = []  # since the rate has settled
        self.sent_bytes = 0


class _Probe:
    def __init__(
        self, destination: DestinationSettings, upload: UploadSettings, data_fd: int, code_commit: str | None
    ) -> None:
        self._destination = destination
        self._timeout_s = upload.answer_timeout_s
        self._data_fd = data_fd
        self._commit = code_commit
        # Every line its own connection: libcurl keeps no more than this.
        self._transfers: Transfers[int] = Transfers(destination, msgspec.structs.replace(upload, connections=64))
        self._lines: dict[int, _Line] = {}
        self._sending: dict[int, _Steps] = {}
        self._url = episode_url(destination, f"fastship-link-{secrets.token_hex(8)}")
        self._failed: LinkUnknown | None = None
        self._limit_bytes = 0  # of each line
        self._waiting: deque[Ended[int]] = deque()

    def run(self, connections: int, seconds: float, limit_bytes: int) -> Measured:
        self._limit_bytes = limit_bytes
        self._drive({0: self._ask()}, self._timeout_s)
        if self._failed is None:
            cpu = time.process_time()
            self._lines = {number: _Line() for number in range(connections)}
            deadline = time.monotonic() + seconds
            self._sending = {number: self._send(line, deadline) for number, line in self._lines.items()}
            self._drive(dict(self._sending), seconds + _LATE_S)
            cpu = time.process_time() - cpu
        if self._failed is not None:
            return self._failed
        lines = [line.taken for line in self._lines.values() if line.taken]
        if not lines:
            return LinkUnknown(f"it took nothing within {seconds + _LATE_S:.0f} s")
        sent = sum(line.sent_bytes for line in self._lines.values())
        return LinkSpeed(
            bytes_per_s=_rate(lines),
            connections=connections,
            sent_bytes=sent,
            cpu_s_per_byte=cpu / sent,
        )

    def close(self) -> None:
        """Cancel the uploads and give all back."""
        self._failed = None
        deadline = time.monotonic() + _CANCEL_S
        # Creations under way: until they are answered, nobody knows what to cancel.
        while self._creating() and (left := deadline - time.monotonic()) > 0:
            for number, result, _ in self._results(left):
                if self._lines[number].place is None:
                    with contextlib.suppress(StopIteration):
                        self._sending[number].send(result)
                    self._lines[number].asked = False
        for number in self._lines:
            self._transfers.cancel(number)
        made = {number: line.place.url for number, line in self._lines.items() if line.place is not None}
        self._failed = None
        self._drive({number: self._forget(url) for number, url in made.items()}, _CANCEL_S)
        self._transfers.close()

    def _creating(self) -> bool:
        return any(line.asked and line.place is None for line in self._lines.values())

    def _drive(self, steps: dict[int, _Steps], limit_s: float) -> None:
        """Carry out requests until all is done, one has failed, or the time is over."""
        deadline = time.monotonic() + limit_s
        for number, line in list(steps.items()):
            self._transfers.start(number, next(line), self._data_fd)
        while steps and self._failed is None and (left := deadline - time.monotonic()) > 0:
            for number, result, sent_bytes in self._results(left):
                if number in self._lines:
                    self._lines[number].sent_bytes += sent_bytes
                try:
                    self._transfers.start(number, steps[number].send(result), self._data_fd)
                except StopIteration:
                    del steps[number]
        for number in steps:
            if number not in self._lines or self._lines[number].place is not None:
                self._transfers.cancel(number)

    def _results(self, wait_s: float) -> Iterator[Ended[int]]:
        """Those of `Transfers.poll`. An interruption at one leaves the others to `close`, which cancels them."""
        if not self._waiting:
            self._waiting.extend(self._transfers.poll(wait_s))
        while self._waiting:
            yield self._waiting.popleft()

    def _ask(self) -> _Steps:
        answer = yield Request(method="OPTIONS", url=self._url, answer_timeout_s=self._timeout_s)
        knows_options = not isinstance(answer, Answer) or answer.status not in (404, 405, 501)
        if knows_options and self._read(answer) is None:
            return
        if not isinstance(answer, Answer) or answer.field(fields.UPLOAD_LIMIT) is None:
            self._failed = LinkUnknown("what answers there keeps no unfinished uploads: what is sent would be stored")

    def _send(self, line: _Line, deadline: float) -> _Steps:
        commit = ((self._destination.commit_field, self._commit),) if self._commit else ()
        request = Request(
            method="PUT",
            url=self._url,
            fields=(
                ("Content-Type", "application/zstd"),
                (fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION),
                (fields.UPLOAD_COMPLETE, fields.format_boolean(False)),
                *commit,
            ),
            body=Body(),
            answer_timeout_s=self._timeout_s,
        )
        line.asked = True
        answer = self._read((yield request))
        line.place = self._place(request, answer, 0, None) if answer else None
        line.asked = line.place is not None
        length, rate = _FIRST_APPEND_BYTES, 0.0
        while line.place is not None and not (line.taken and self._is_enough(line, deadline)):
            length = min(length, line.place.append_limit_bytes or length)
            request = _append(line.place, length, self._timeout_s)
            started = time.monotonic()
            answer = self._read((yield request))
            place = self._place(request, answer, line.place.offset + length, line.place.url) if answer else None
            if place is None:
                return
            line.place, done = place, _Append(started, time.monotonic(), length)
            before, rate = rate, length / (done.ended - done.began)
            if line.taken or rate < _SETTLED * before or self._is_enough(line, deadline):
                line.taken.append(done)
            length = max(_FIRST_APPEND_BYTES, min(_DATA_BYTES, int(rate * APPEND_S)))

    def _is_enough(self, line: _Line, deadline: float) -> bool:
        taken = line.place.offset if line.place else 0
        return time.monotonic() >= deadline or taken >= self._limit_bytes

    def _forget(self, url: str) -> _Steps:
        yield Request(method="DELETE", url=url, answer_timeout_s=_CANCEL_S)

    def _read(self, result: Answer | Fault) -> Answer | None:
        """The answer when it is a success, else None, and the measuring has failed."""
        if isinstance(result, Answer) and result.status // 100 == 2:
            return result
        verdict = verdict_of_fault(result) if isinstance(result, Fault) else verdict_of_status(result)
        self._failed = LinkUnknown(verdict.error)
        return None

    def _place(self, request: Request, answer: Answer, most_bytes: int, known_url: str | None) -> UploadPlace | None:
        reading = read_answer(request, answer, most_bytes, known_url)
        if isinstance(reading, UploadPlace):
            return reading
        odd = f"status {answer.status} does not say where the upload stands"
        self._failed = LinkUnknown(reading.error if isinstance(reading, Misbehaviour) else odd)
        return None


def _rate(lines: Sequence[Sequence[_Append]]) -> float:
    """Bytes a second of all lines together, while all were at it.

    Not the sum of each one's own rate: who is alone on the link at the beginning or the end has all of it for himself.
    """
    began, ended = max(line[0].began for line in lines), min(line[-1].ended for line in lines)
    if ended <= began:  # one had ended before another had settled: they shared the link all the same
        began, ended = min(line[0].began for line in lines), max(line[-1].ended for line in lines)
    return sum(append.within(began, ended) for line in lines for append in line) / (ended - began)


def _append(place: UploadPlace, length: int, timeout_s: float) -> Request:
    return Request(
        method="PATCH",
        url=place.url,
        fields=(
            ("Content-Type", fields.PARTIAL_UPLOAD),
            (fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION),
            (fields.UPLOAD_OFFSET, str(place.offset)),
            (fields.UPLOAD_COMPLETE, fields.format_boolean(False)),
        ),
        body=Body(0, length),
        answer_timeout_s=timeout_s,
    )
