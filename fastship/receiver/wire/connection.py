"""One client's connection: what it may cost before there is a request that can be decided on.

What always holds: the line and fields of a request (and the trailers of a body) take at most `HEAD_BYTES`, are at
most `HEAD_FIELDS`, and take `HEAD_TIMEOUT_S` to come; a new connection has as long to begin; who needs more is cut.
After that the application's own limits hold. uvicorn has none of its own for these.

A body with a length over plain TCP may be lent to the application, which then reads it from the socket (`_Lent`). The
parser knows nothing of what was read so; from the first loan to the end of that body this class counts in its stead.

A process has at most `Connection.most` connections: one more takes the place of the one that has waited longest for a
request, begun or not, and is cut itself where all are being served. So those that ask for nothing keep nobody out.

Imported by ``server``, when it has found uvicorn to be there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastship import fields
from fastship.receiver.wire.direct import EXTENSION

_log = logging.getLogger(__name__)  # a name of its own: `quiet` bounds what clients can make us log

HEAD_BYTES = 64 << 10  # ours are under 1 kB; proxies and browsers stop at 8 to 32 KiB
HEAD_FIELDS = 256  # ours are under 20; Apache takes 100
HEAD_TIMEOUT_S = 60.0
_ASK_S = 1.0  # a few turns of a slow line; so many connections a second are too many for anything else as well


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits."""

    most = 1 << 20  # in this process
    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None
    _body_left = 0  # of the body that is being received, where it has a length
    _counting = False  # the parser has not seen all of that body

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._cycles: list[RequestResponseCycle] = []  # uvicorn's, of requests that are not answered yet
        self._asked = time.monotonic()  # when a request last came

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._client_gone()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._client_gone()  # the transport closes now, whatever is being answered

    def send_400_response(self, msg: str) -> None:
        self._client_gone()  # as above: nothing can be said any more to what came before
        super().send_400_response(msg)

    def data_received(self, data: bytes) -> None:
        if self._counting:
            body, data = data[: self._body_left], data[self._body_left :]
            self.on_body(body)
            self._end_counted()
            if not data:
                return
        while data and not self.transport.is_closing():
            # What is not taken for a body is parsed as far as it may be long: parsing costs ten times its memory.
            some = data if self._late is None else data[: HEAD_BYTES + 1 - self._head_bytes]
            self._head_bytes += len(some)
            super().data_received(some)
            if self._head_bytes > HEAD_BYTES:
                self._cut("its fields are too long")
            data = data[len(some) :]

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= HEAD_FIELDS:
            raise ValueError("too many fields")  # ends the parser, too: 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_came()
        self._asked = time.monotonic()
        names = dict(self.headers)
        length = None if b"transfer-encoding" in names else names.get(b"content-length", b"0").decode("latin-1")
        self._body_left = fields.parse_integer(length) or 0
        ours: dict[str, Any] = {"cut": self._cut}
        if self._body_left and self.scheme == "http":
            ours["body"] = _Lent(self)
        self.scope["extensions"] = {EXTENSION: ours}  # type: ignore[dict-item]
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        self._body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def _end_counted(self) -> None:
        """Where the body that the parser did not see has ended: a new parser for what follows it."""
        if not self._body_left:
            self._counting = False
            self.on_message_complete()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _await_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._cut, "its request does not come")

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _make_room(self) -> None:
        waiting = [one for one in self.connections if isinstance(one, Connection) and one._is_waiting()]
        longest = min(waiting, key=lambda one: one._asked, default=self)
        longest._cut("there are too many")

    def _is_waiting(self) -> bool:
        """Whether no request of it is being served; not a new one that has not had the time to ask."""
        served = any(not cycle.response_complete for cycle in self._cycles)
        return not served and not self.transport.is_closing() and self._asked < time.monotonic() - _ASK_S

    def _client_gone(self) -> None:
        """Tell every request that is being served or waits: uvicorn tells only the last one, and that late, and writing
        to a transport that is closed raises."""
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        self._cycles.clear()

    def _cut(self, why: str) -> None:
        self._head_came()  # else its timer would keep all of this for a minute
        if not self.transport.is_closing():
            _log.warning("a connection is cut: %s", why)
            self._client_gone()
            self.transport.abort()


class _Lent:
    """`direct.Direct` of the request whose body is being received: no other is until that has come."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._socket: socket.socket | None = None

    @property
    def left(self) -> int:
        return self._connection._body_left

    def borrow(self) -> socket.socket | None:
        connection = self._connection
        cycle = connection.cycle
        if not self.left or cycle.body or cycle.disconnected or connection.transport.is_closing():
            return None
        connection.flow.pause_reading()
        # A descriptor of its own: the transport may be closed meanwhile, and its number be another file's.
        try:
            self._socket = socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno()))
        except OSError:  # none to be had
            return None
        return self._socket

    def give_back(self, taken: int) -> None:
        connection = self._connection
        assert self._socket is not None
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._socket.close()
        if taken and not connection.cycle.disconnected:
            connection._counting = True
            connection._body_left -= taken
            connection._end_counted()
        # Reading goes on when the application calls ``receive``.
