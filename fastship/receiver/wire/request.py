"""One HTTP request and its response, as ASGI gives and takes them.

What always holds: a final answer to a request whose body was not read to its end carries ``Connection: close``, is
sent whole at once, and what the client still sends is read and dropped for a while before the connection is
closed: otherwise the kernel resets the connection and the client may never see the answer.

Imported by ``app``, ``reading`` and ``verification``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec

from fastship import fields
from fastship.receiver.policy.access import Caller
from fastship.receiver.policy.answers import Answer
from fastship.receiver.wire.direct import EXTENSION, Direct
from fastship.receiver.wire.ingest import Message, Receive

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_LINGER_S = 3.0  # for a client that sends on after the answer; libcurl stops at once
_JSON_TAIL = b"\n"
_CLOSE = ("Connection", "close")


class Left(Exception):
    """The server says, by failing to send (ASGI 2.4), that there is nobody to answer any more."""


class Request:
    """``headers`` have lower-case names; several lines of one field are joined as RFC 9110, 5.3 says.

    Everything that sends raises `Left`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1").strip()
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
        self.status = 0
        self.body_bytes = 0
        self.caller = Caller()
        self._receive = receive
        self._send = send
        length = self.headers.get("content-length", "0").strip()
        ours = (scope.get("extensions") or {}).get(EXTENSION, {})
        self.direct: Direct | None = ours.get("body")
        self.cut: Callable[[str], None] = ours.get("cut", lambda _why: None)  # the connection, at once
        self._unread = "transfer-encoding" in self.headers or length != "0"

    @property
    def unread(self) -> bool:
        """Whether there is body that was not read."""
        return self._unread

    async def receive(self) -> Message:
        """The next piece of the body (ASGI); lets the server send 100 Continue."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.body_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def left(self) -> None:
        """Until the client has gone away; what it still sends is dropped."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        self.status = status
        headers = [*headers, _CLOSE] if self._unread and _CLOSE not in headers else headers
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._say({"type": "http.response.start", "status": status, "headers": encoded})

    async def send_body(self, body: bytes, *, more: bool = False) -> None:
        await self._say({"type": "http.response.body", "body": body, "more_body": more})

    async def _say(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise Left from error

    async def answer(self, answer: Answer) -> None:
        """Send ``answer`` as JSON, whole."""
        headers = [*answer.fields, ("Cache-Control", "no-store")]
        if any(name == fields.UPLOAD_COMPLETE for name, _ in answer.fields):
            headers.append((fields.UPLOAD_DRAFT_INTEROP_VERSION, fields.INTEROP_VERSION))
        body = b"" if answer.body is None else msgspec.json.encode(answer.body) + _JSON_TAIL
        if body:
            headers.append(("Content-Type", answer.content_type))
        if answer.status != 204:
            headers.append(("Content-Length", str(len(body))))
        await self._answer(answer.status, headers, body)

    async def text(self, body: bytes, content_type: str) -> None:
        await self._answer(200, [("Content-Type", content_type), ("Content-Length", str(len(body)))], body)

    async def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        await self.start(status, headers)
        if not self._unread:
            await self.send_body(body)
            return
        await self.send_body(body, more=True)
        await self._linger()
        await self.send_body(b"")

    async def _linger(self) -> None:
        deadline = time.monotonic() + _LINGER_S
        try:
            async with asyncio.timeout(_LINGER_S):
                while self._unread and time.monotonic() < deadline:
                    await self.receive()
        except TimeoutError:
            pass
