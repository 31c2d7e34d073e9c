"""What a dialect and the session say to each other: the seam that each dialect is built on.

A dialect is one generator for each attempt, its *course*: it yields what is to be done next (a `Request` to send, a
`Wait`, a `CheckArtifact`), is sent what came of it (an `Answer` or a `Fault`, ``None``, a `Checked`), and
returns the `Verdict`. It does no I/O and reads no clock, so any course can be played through in a test, and a
further dialect is one more module with one more generator.

What always holds: everything here is an immutable value; no value carries a secret (the token is added by the
module that talks to the network, at the last moment), so each may be logged and shown.

Imports ``episode``; every module of ``upload`` may import it.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec

from fastship.episode import Manifest, Verdict

BODY_LIMIT_BYTES = 64 << 10
"""So much of an answer's body is kept; the receiver's longest own answer is a receipt of under 1 kB."""


class Artifact(msgspec.Struct, frozen=True):
    """An artifact in the outbox: what is known of it, and the file that holds it."""

    manifest: Manifest
    path: Path


class Growing(msgspec.Struct, frozen=True):
    """An artifact that is sent while it is packed: what is known of it from the start."""

    episode: str
    path: Path  # of its file, while it grows
    code_commit: str | None = None


class Body(msgspec.Struct, frozen=True):
    """The piece of the artifact that a request sends: ``length_bytes`` from ``offset``. Length 0: an empty body."""

    offset: int = 0
    length_bytes: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request. Without a ``body`` it has none at all (HEAD)."""

    method: str
    url: str
    fields: tuple[tuple[str, str], ...] = ()
    body: Body | None = None
    answer_timeout_s: float  # from the last byte of the request that moved to the end of the final answer
    alive: bool = False  # the answer takes its time and shows it: counts from the last byte of it that came


class Answer(msgspec.Struct, frozen=True):
    """A final answer that came whole. ``fields`` has lower-case names; repeated ones are joined with commas."""

    status: int
    fields: dict[str, str] = {}
    body: bytes = b""  # at most BODY_LIMIT_BYTES of it

    def field(self, name: str) -> str | None:
        return self.fields.get(name.lower())

    @property
    def text(self) -> str:
        """The body for people: whatever bytes it has, never an exception."""
        return self.body[:BODY_LIMIT_BYTES].decode("utf-8", errors="replace")


class Taker(Protocol):
    """Who wants the body of an answer, however long it is, as it comes. Called in the thread that moves the bytes."""

    def begin(self, answer: Answer) -> bool:
        """The final answer's status and fields are there: whether its body is to come here, and not into the `Answer`.

        A request that libcurl repeats by itself has had no answer. Must not raise, nor must `take`.
        """

    def take(self, piece: bytes) -> None:
        """The next bytes of it, up to 16 KiB."""


class FaultKind(enum.StrEnum):
    """Why there is no answer; `fastship.upload.verdict` says what each one means."""

    DNS = "dns"
    TLS = "tls"
    SETTINGS = "settings"  # something of ours: a certificate or token file, the URL
    ARTIFACT = "artifact"  # the file in the outbox is missing, too short or unreadable
    STALL = "stall"  # no byte moved for too long
    NETWORK = "network"  # refused, reset, cut, timed out


class Fault(msgspec.Struct, frozen=True):
    """No final answer came, or not whole."""

    kind: FaultKind
    message: str  # one sentence


class Wait(msgspec.Struct, frozen=True):
    """Do nothing for so long, then send ``None``. A session that drains may end the course here instead."""

    seconds: float
    verdict: Verdict  # what it comes to if the course is not continued


class CheckArtifact(msgspec.Struct, frozen=True):
    """Read the artifact's file again and send a `Checked`: is its SHA-256 still the manifest's?

    ``content``: and is its content what the manifest says? ``why``: what the receiver said, one sentence.
    """

    content: bool = False
    why: str = ""


class Checked(msgspec.Struct, frozen=True):
    intact: bool


class AwaitGrowth(msgspec.Struct, frozen=True):
    """Wait until the artifact has at least ``bytes`` that may be sent, or is whole, or is dropped: then a `Growth`."""

    bytes: int


class Growth(msgspec.Struct, frozen=True):
    """How far an artifact is that is sent while it is being packed."""

    bytes: int = 0  # of its file that will not change any more
    manifest: Manifest | None = None  # once it is whole; ``bytes`` is all of it then
    dropped: bool = False  # packing failed: nothing follows, and what was sent is worth nothing


class Remember(msgspec.Struct, frozen=True):
    """Keep the upload's URL, so that the next attempt finds what the receiver has; "": forget it. Then ``None``."""

    url: str


Step: TypeAlias = Request | Wait | CheckArtifact | AwaitGrowth | Remember
Result: TypeAlias = Answer | Fault | Checked | Growth | None
Course: TypeAlias = Generator[Step, Result, Verdict]
