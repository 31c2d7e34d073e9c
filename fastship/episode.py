"""What is known of one episode, as values: its id, manifest, receipt, verdict, and the recorder's commit.

What always holds: these are immutable values that travel between processes (msgspec) and stand on disk
(JSON); digests are lower-case hex here, and only `fastship.fields` turns them into HTTP's base64.

Imports only ``errors``; everything above may import it.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import time
from pathlib import Path
from typing import Any

import msgspec

MARKER = "done.marker"
"""Its presence in an episode's directory says that the recorder is finished with it."""

ARTIFACT_SUFFIX = ".tar.zst"

_EPISODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_COMMIT = re.compile(r"[0-9a-fA-F]{40}")
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}  # nor a FIFO or a device that waits
_META_LIMIT_BYTES = 1 << 20  # a meta.json is some kB; nothing of 1 MiB is one


_WALL = "%Y-%m-%dT%H:%M:%SZ"


def now_wall() -> str:
    """The time as fastship writes it into its files: UTC, whole seconds."""
    return time.strftime(_WALL, time.gmtime())


def read_wall(text: str) -> float:
    """Seconds since the epoch of what `now_wall` gave. Raises ``ValueError``."""
    from calendar import timegm  # datetime with it, which nobody else needs at each start

    return float(timegm(time.strptime(text, _WALL)))


def is_episode_id(name: str) -> bool:
    """Whether ``name`` may be an episode's id on disk and in a URL (docs/protocol.md, Resources)."""
    return _EPISODE_ID.fullmatch(name) is not None


def episode_of_artifact(name: str) -> str | None:
    """The id of the episode whose artifact is called so; None for what is no artifact's name."""
    episode = name.removesuffix(ARTIFACT_SUFFIX)
    return episode if name != episode and is_episode_id(episode) else None


def read_code_commit(episode: Path) -> str | None:
    """The recorder's commit from ``meta.json``'s ``code_version.commit``: 40 lower-case hex digits, or None.

    Missing or malformed gives None: the receiver decides what that means. Raises ``OSError`` where it is there and
    cannot be read now (no descriptor, a fault of the disk): sent without its commit, the episode would be refused.
    """
    try:
        # Not to wait for a writer where somebody made it a FIFO.
        with open(episode / "meta.json", "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            raw = file.read(_META_LIMIT_BYTES + 1)
        commit: Any = msgspec.json.decode(raw)["code_version"]["commit"]
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.MsgspecError):
        return None
    if isinstance(commit, str) and _COMMIT.fullmatch(commit):
        return commit.lower()
    return None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What packing learned of an artifact. Written beside it in the outbox as ``<id>.manifest.json``."""

    episode: str
    artifact_sha256: str  # hex, of the artifact's bytes
    artifact_bytes: int
    content_blake3: str  # hex, of the tar stream: the episode's identity
    content_bytes: int  # of the tar stream
    members: int  # tar members, directories included
    frames: int
    frame_bytes: int
    levels: dict[int, int]  # frames by zstd level; 0: taken over from a packing that was interrupted
    fingerprint: str  # hex, of every member's name, kind, mode, size, mtime: has the episode changed since?
    code_commit: str | None = None
    skipped: tuple[str, ...] = ()  # sockets, as paths within the episode; the first 100
    boot_id: str = ""  # of the boot that wrote the artifact
    seconds: float = 0.0  # wall
    cpu_seconds: float = 0.0  # of the whole process while packing


class ReceivedArtifact(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class ReceivedContent(msgspec.Struct, frozen=True):
    blake3: str
    bytes: int
    members: int | None = None


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """From where the receiver read what it digested: ``arriving``, ``file`` or ``disk`` (see docs/protocol.md)."""

    artifact: str
    content: str | None = None  # None: not unpacked
    at: str = ""  # UTC, when the last of it was read


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The receiver's word of what it stored and verified (docs/protocol.md, The receiver's promises)."""

    episode: str
    artifact: ReceivedArtifact
    content: ReceivedContent | None = None
    verified: str  # "content", "artifact", or "status" where the receiver could not say
    stored_at: str = ""  # UTC, %Y-%m-%dT%H:%M:%SZ
    receiver: str = ""
    read: Read | None = None  # None: a receiver that does not say


class Outcome(enum.StrEnum):
    """What became of an attempt."""

    SHIPPED = "shipped"  # 200, 201 with proof
    CONFLICT = "conflict"  # the receiver holds another content under this id
    REJECTED = "rejected"  # the receiver will never take this episode as it is
    TRANSIENT = "transient"  # try again later, nothing is wrong with the episode as far as is known
    DAMAGED = "damaged"  # the artifact in the outbox is not what its manifest says: pack again


class Scope(enum.StrEnum):
    """Whose fault a verdict is: only EPISODE may quarantine an episode."""

    EPISODE = "episode"
    DESTINATION = "destination"
    NETWORK = "network"  # one attempt's bad luck until it repeats


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the destination's final answer (or its absence) means for one episode."""

    outcome: Outcome
    scope: Scope
    status: int | None = None  # HTTP status, None when no answer came
    error: str = ""  # one sentence
    body: str = ""  # the answer's body as text, at most 64 KiB
    retry_after_s: float | None = None  # what the destination asked for
    receipt: Receipt | None = None  # with SHIPPED, always
    sent_bytes: int = 0  # body bytes sent in this attempt, resends included
    resumed_at: int = 0  # the receiver's offset at which the attempt (last) went on; 0: from the start
