"""A sink for uploads that does nothing with them: to measure a client where no nginx is installed.

    python -m bench.discard [ADDRESS]     listens on 127.0.0.1 or there; prints its URL; ends with SIGTERM

Answers every PUT 201 when its ``Content-Length`` bytes have come. One thread a connection; keeps connections open.
"""

from __future__ import annotations

import socket
import sys
import threading

_BUFFER_BYTES = 256 << 10


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(_BUFFER_BYTES)
    pending = b""
    with connection:
        while True:
            while b"\r\n\r\n" not in pending:
                piece = connection.recv(1 << 16)
                if not piece:
                    return
                pending += piece
            head, _, pending = pending.partition(b"\r\n\r\n")
            fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
            if b"expect" in fields:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            rest = int(fields.get(b"content-length", b"0")) - len(pending)
            while rest > 0:
                got = connection.recv_into(buffer, min(rest, _BUFFER_BYTES))
                if not got:
                    return
                rest -= got
            pending = pending[len(pending) + rest :] if rest < 0 else b""
            connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    with socket.create_server((address, 0)) as listener:
        print(f"http://{address}:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
