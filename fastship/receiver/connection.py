"""One client's connection: what it may cost before there is a request that can be decided on.

What always holds: the line and fields of a request (and the trailers of a body) take at most `HEAD_BYTES` of memory and
`HEAD_TIMEOUT_S` to come, and a new connection has as long to begin; who needs more is cut. After that the
application's own limits hold. uvicorn has none of its own for these.

Imported by ``server``, when it has found uvicorn to be there.
"""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_log = logging.getLogger("fastship.receiver")

HEAD_BYTES = 64 << 10  # ours are under 1 kB; proxies and browsers stop at 8 to 32 KiB
HEAD_TIMEOUT_S = 60.0


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits."""

    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES:
            self._cut("its fields are too long")

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

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
