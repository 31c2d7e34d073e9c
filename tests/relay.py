"""A line between a client and a server of this host: what is carried over it, and what is done to that.

`Relay` carries both ways, connection by connection, until it is closed; who makes a line that does something else to
the bytes says so in `Relay.carry`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Relay:
    """Stands before ``port`` of this host, at ``url``. Close it: what it carries is cut then."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
        """All of one direction of the connection ``number``; ``outward``: to the server. May raise ``OSError``."""
        while piece := source.recv(1 << 16):
            sink.sendall(piece)

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            for source, sink, outward in ((near, far, True), (far, near, False)):
                thread = threading.Thread(target=self._carry, args=(number, source, sink, outward))
                self._threads.append(thread)
                thread.start()
            number += 1

    def _carry(self, number: int, source: socket.socket, sink: socket.socket, outward: bool) -> None:
        try:
            with contextlib.suppress(OSError):
                self.carry(number, source, sink, outward=outward)
        finally:
            _shut(source, sink)

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self._threads[0].join()  # no more come
        _shut(*self._open)
        for thread in self._threads[1:]:
            thread.join()
        for end in self._open:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
