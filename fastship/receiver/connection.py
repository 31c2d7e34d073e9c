"""One client's connection: what it may cost before there is a request that can be decided on.

What always holds: the line and fields of a request (and the trailers of a body) take at most `HEAD_BYTES` of memory and
`HEAD_TIMEOUT_S` to come, and a new connection has as long to begin; who needs more is cut. After that the
application's own limits hold. uvicorn has none of its own for these.

A body with a length over plain TCP may be lent to the application, which then reads it from the socket (`_Lent`). The
parser knows nothing of what was read so; from the first loan to the end of that body this class counts in its stead.

Imported by ``server``, when it has found uvicorn to be there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastship import fields
from fastship.receiver.direct import EXTENSION

_log = logging.getLogger("fastship.receiver")

HEAD_BYTES = 64 << 10  # ours are under 1 kB; proxies and browsers stop at 8 to 32 KiB
HEAD_TIMEOUT_S = 60.0


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits."""

    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None
    _body_left = 0  # of the body that is being received, where it has a length
    _counting = False  # the parser has not seen all of that body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._counting:
            body, data = data[: self._body_left], data[self._body_left :]
            self.on_body(body)
            self._end_counted()
            if not data:
                return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES:
            self._cut("its fields are too long")

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_came()
        names = dict(self.headers)
        length = None if b"transfer-encoding" in names else names.get(b"content-length", b"0").decode("latin-1")
        self._body_left = fields.parse_integer(length) or 0
        if self._body_left and self.scheme == "http":
            self.scope["extensions"] = {EXTENSION: {"body": _Lent(self)}}
        super().on_headers_complete()

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

    def _cut(self, why: str) -> None:
        self._late = None
        if not self.transport.is_closing():
            _log.warning("a connection is cut: %s", why)
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
        self._socket = socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno()))
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
