"""The receiver's application, called as an ASGI server calls it, without one: every event at a moment of one's choice.

`Asking` is one request under way. It sees to the server's half of the ASGI specification (HTTP 2.x), and holds the
application to its own: a start, then bodies, then nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Message = dict[str, Any]
App = Callable[..., Any]

WAIT_S = 60.0


class Reply:
    """What was answered; ``headers`` by lower-case name."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error."""
        return str(self.json()["code"]) if self.status >= 400 and self.body else ""

    @property
    def offset(self) -> int | None:
        told = self.headers.get("upload-offset")
        return None if told is None else int(told)

    @property
    def complete(self) -> str | None:
        return self.headers.get("upload-complete")


def scope_of(method: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> Message:
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": encoded,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


class Asking:
    """A request under way on the running loop; `feed` gives it events, after `disconnect` or the answer's end there is
    nothing but disconnects."""

    def __init__(self, app: App, scope: Message, *, send_fails: bool = False) -> None:
        self.messages: list[Message] = []
        self.unsendable = False
        self.unread_bytes = 0  # of the body, when the answer began
        self.asked = 0  # times that the application wanted an event
        self._send_fails = send_fails
        self._events: deque[Message] = deque()
        self._gone = False
        self._changed = asyncio.Event()
        self._hungry = asyncio.Event()
        self._task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def feed(self, *events: Message) -> None:
        self._events.extend(events)
        self._hungry.clear()
        self._changed.set()

    def body(self, data: bytes, *, more: bool) -> None:
        self.feed({"type": "http.request", "body": data, "more_body": more})

    def disconnect(self) -> None:
        self._gone = True
        self._changed.set()

    async def settled(self) -> None:
        """Wait until the application has taken all events and wants more, or is through."""
        hungry = asyncio.ensure_future(self._hungry.wait())
        await asyncio.wait([hungry, self._task], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        hungry.cancel()

    async def ended(self) -> Reply | None:
        """The answer; None where nobody was left to be answered. Raises what the application raises."""
        async with asyncio.timeout(WAIT_S):
            await self._task
        if self.unsendable:
            return None
        if self.messages:
            assert not self.messages[-1].get("more_body", False), "the answer has no end"
        return Reply(self.messages) if self.messages else None

    @property
    def answered(self) -> bool:
        return bool(self.messages)

    async def _receive(self) -> Message:
        self.asked += 1
        while not self._events:
            if self._gone or self._is_over():
                return {"type": "http.disconnect"}
            self._hungry.set()
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    async def _send(self, message: Message) -> None:
        if self._send_fails and self._gone and not self._events:
            self.unsendable = True
            raise OSError("the client has gone")  # as servers of spec version 2.4 do
        if message["type"] == "http.response.start":
            assert not self.messages, "a second answer"
            self.unread_bytes = sum(len(event.get("body", b"")) for event in self._events)
            assert 200 <= message["status"] <= 599
            for name, value in message["headers"]:
                assert name == name.lower(), name
                assert not set(name + value) & {0, 10, 13}, (name, value)
        else:
            assert message["type"] == "http.response.body", message["type"]
            assert self.messages, "a body before the start"
            assert not self._is_over(), "a body after the end"
        self.messages.append(message)
        self._changed.set()

    def _is_over(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1].get("more_body", False)


async def ask(
    app: App, method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: Sequence[bytes] = (b"",)
) -> Reply:
    """One whole request; ``body`` in its pieces."""
    asking = Asking(app, scope_of(method, path, headers))
    for number, piece in enumerate(body, 1):
        asking.body(piece, more=number < len(body))
    reply = await asking.ended()
    assert reply is not None
    return reply


class LifeSpan:
    """Starts the application as a server does, and ends it."""

    def __init__(self, app: App) -> None:
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        self._task = asyncio.ensure_future(app({"type": "lifespan"}, self._events.get, self._told.put))

    async def start(self) -> None:
        await self._step("startup")

    async def end(self) -> None:
        await self._step("shutdown")
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _step(self, name: str) -> None:
        await self._events.put({"type": f"lifespan.{name}"})
        async with asyncio.timeout(WAIT_S):
            assert await self._told.get() == {"type": f"lifespan.{name}.complete"}
