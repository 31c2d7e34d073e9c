"""What comes back of one request: an answer's field lines and the pieces of its body, and the `Answer` they become.

What always holds: an `Answer` has its whole head, to the empty line behind the fields, which libcurl does not mind:
without the rest of them its status may mean something else; where a refusal's body echoes the token, it is taken out;
no more of a body is kept than `BODY_LIMIT_BYTES`.

No I/O. Imports ``course``; ``curl`` imports it.
"""

from __future__ import annotations

from fastship.upload.course import BODY_LIMIT_BYTES, Answer, Fault, FaultKind, Taker

ANSWER_LIMIT_BYTES = 1 << 20
"""An answer's body that goes on for longer is cut: nothing of ours is so long."""

TOKEN_SECRET_CHARACTERS = 8
"""A shorter token is no secret, and may be part of any word."""


class Incoming:
    """An answer as it comes. ``taker`` may have its body."""

    def __init__(self, taker: Taker | None) -> None:
        self._taker = taker
        self._taken: bool | None = None  # whether it has the body; None: it was not asked yet
        self._status = 0
        self._head: list[bytes] = []  # field lines
        self._head_whole = False
        self._body = bytearray()
        self.body_bytes = 0

    @property
    def began(self) -> bool:
        """Whether a field of it is there."""
        return bool(self._head)

    @property
    def taken(self) -> bool:
        """Whether somebody has the body, as far as he was asked."""
        return bool(self._taken)

    @property
    def too_long(self) -> bool:
        return self.body_bytes > ANSWER_LIMIT_BYTES and not self._taken

    def field(self, line: bytes) -> None:
        """The next line of the head, its line end included."""
        if line.startswith(b"HTTP/"):  # what came before was interim (RFC 9110, 15.2) or a proxy's
            self._head = []
            self._head_whole = False
            number = line[:16].split(b" ")[1:2]  # libcurl tells it only when no callback of it runs
            self._status = int(number[0]) if number and number[0].strip().isdigit() else 0
        elif line in (b"\r\n", b"\n"):
            self._head_whole = True
        elif not self._head_whole:  # else a trailer, which nothing of ours reads
            self._head.append(line)

    def is_for_taker(self) -> bool:
        """Whether the body is to be given to the taker: asked once, when the head is there."""
        if self._taken is None:
            self._taken = self._taker is not None and self._taker.begin(Answer(self._status, self._fields()))
        return self._taken

    def add(self, piece: bytes) -> bool:
        """The next bytes of the body. False: it goes on for too long."""
        self.body_bytes += len(piece)
        if self.is_for_taker():
            assert self._taker is not None
            self._taker.take(piece)
        else:
            self._body += piece[: BODY_LIMIT_BYTES - len(self._body)]
        return not self.too_long

    def answer(self, status: int, token: str) -> Answer | Fault:
        """What has come to its end. ``status`` as libcurl has it, when it says that all is well."""
        if not self._head_whole or status < 200:
            return Fault(FaultKind.NETWORK, "the connection was cut within the fields of the answer")
        self.is_for_taker()  # where nothing came of the body there was none
        body = bytes(self._body)
        if status >= 300 and len(token) >= TOKEN_SECRET_CHARACTERS:  # what is kept and logged, never a receipt
            body = body.replace(token.encode("ascii"), b"(the token)")
        return Answer(status, self._fields(), body)

    def _fields(self) -> dict[str, str]:
        fields: dict[str, str] = {}
        for line in self._head:
            name, _, value = line.decode("iso-8859-1").partition(":")
            name, value = name.strip().lower(), value.strip()
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        return fields
