"""What docs/protocol.md says of a receiver, as a small program without files, threads or HTTP.

`Model` answers requests as the document says they are answered, one after the other; ``crash/test_receiver_model.py``
holds it beside the real application. Where a request is still under way when another comes, it says between which
bounds things may be.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zstandard
from receiver_process import make_artifact

from fastship import fields
from fastship.frames import verify_content

MAX_BYTES = 4000


class Artifact(NamedTuple):
    """What a client has to send; ``blake3`` None: it cannot be unpacked."""

    data: bytes
    blake3: str | None = None
    content_bytes: int = 0

    def __repr__(self) -> str:
        return f"<{len(self.data)} bytes>"

    @property
    def sha256(self) -> str:
        return sha256(self.data)


class Told(NamedTuple):
    """What must be answered. ``offset`` None: none is told; ``codes`` of errors, any of which will do."""

    status: int
    codes: tuple[str, ...] = ()
    complete: str | None = None
    offset: int | None = None


class Said(NamedTuple):
    """What a request says of the artifact, right or wrong."""

    sha256: str | None = None
    length: int | None = None
    blake3: str | None = None
    content_bytes: int | None = None


@dataclass
class Stored:
    """``data`` is what the file has; ``sha256`` and ``blake3`` what the receipt says."""

    data: bytes
    sha256: str
    blake3: str | None
    is_right: bool = True  # the file is what the receipt says


@dataclass
class Upload:
    episode: str
    owner: str
    said: Said
    data: bytes = b""
    told: int = 0  # the highest offset that was ever told


@dataclass
class Ended:
    owner: str
    episode: str
    told: Told
    sha256: str = ""  # of the receipt in it


@dataclass
class Model:
    """``artifacts``: all that can be unpacked, by their SHA-256."""

    artifacts: dict[str, Artifact]
    stored: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    rotted: list[bytes] = field(default_factory=list)

    # --- what is known from the fields --------------------------------------------------------------------------

    def compare(self, episode: str, said: Said) -> Told | None:
        """200, 409, or None: not known yet."""
        stored = self.stored.get(episode)
        if stored is None:
            return None
        if said.sha256 == stored.sha256:
            return STORED_ALREADY
        if stored.blake3 is not None and said.blake3 is not None:
            return STORED_ALREADY if said.blake3 == stored.blake3 else CONFLICT
        return CONFLICT if said.sha256 is not None else None

    def before_body(self, episode: str, said: Said, body_bytes: int | None, *, whole: bool) -> Told | None:
        length = said.length
        if None not in (body_bytes, length) and (body_bytes > length or (whole and body_bytes != length)):  # type: ignore[operator]
            return LENGTH
        size = body_bytes if whole and body_bytes is not None else said.length
        if size is not None and size > MAX_BYTES:
            return TOO_LARGE
        return self.compare(episode, said)

    def verdict(self, episode: str, said: Said, data: bytes) -> Told:
        """On a whole artifact; stores it where that is 201."""
        found = sha256(data)
        if said.sha256 not in (None, found):
            return ARTIFACT_MISMATCH
        stored = self.stored.get(episode)
        if stored is not None and found == stored.sha256:
            return STORED_ALREADY
        if stored is not None and stored.blake3 is None:
            return CONFLICT
        known = self.artifacts.get(found)
        is_as_said = known is not None and (
            said.blake3 in (None, known.blake3) and said.content_bytes in (None, known.content_bytes)
        )
        if known is None or not is_as_said:
            return CONFLICT if stored is not None else INVALID
        if stored is not None:
            return STORED_ALREADY if stored.blake3 == known.blake3 else CONFLICT
        self.stored[episode] = Stored(data, found, known.blake3)
        return STORED_NOW

    # --- requests -----------------------------------------------------------------------------------------------

    def put(self, key: str | None, episode: str, said: Said, data: bytes, *, declared: bool, body_right: bool) -> Told:
        """One body that is the whole artifact; ``declared``: with its length. ``key``: the upload of this artifact."""
        known = self.before_body(episode, said, len(data) if declared else None, whole=True)
        if known is not None:
            return known
        if len(data) > (said.length if said.length is not None else MAX_BYTES):
            return LENGTH if said.length is not None else TOO_LARGE
        if said.length not in (None, len(data)):
            return LENGTH
        if not body_right:
            return ARTIFACT_MISMATCH
        return self.whole(key, episode, said, data)

    def whole(self, key: str | None, episode: str, said: Said, data: bytes) -> Told:
        """A whole artifact that has come in one body: once it is stored its upload is of no use."""
        told = self.verdict(episode, said, data)
        if told.status < 300 and key is not None and self.ended.pop(key, None) is None:
            self.uploads.pop(key, None)
        return told

    def create(self, key: str, owner: str, episode: str, said: Said, body: bytes, *, body_right: bool) -> Told:
        known = self.before_body(episode, said, len(body), whole=False)
        if known is not None:
            return known
        self.ended.pop(key, None)
        upload = self.uploads.get(key)
        if upload is None:
            upload = self.uploads[key] = Upload(episode, owner, said)
        else:
            if said.length is not None and said.length < len(upload.data):
                return LENGTH
            new = {name: value for name, value in said._asdict().items() if value is not None}
            upload.said = upload.said._replace(**new)
        if body and not upload.data:
            length = upload.said.length
            if len(body) > (MAX_BYTES if length is None else length):
                return TOO_LARGE if length is None else self.at(upload, LENGTH)
            if not body_right:
                return self.at(upload, BODY_MISMATCH)
            upload.data = body
        return self.at(upload, CREATED)

    def append(
        self,
        key: str,
        owner: str,
        offset: int,
        body: bytes,
        *,
        last: bool,
        length: int | None,
        declared: bool,
        body_right: bool,
        cut_at: int | None = None,
    ) -> Told | None:
        """``declared``: with a content length; ``cut_at``: the client leaves after so many bytes. None: no answer."""
        ended = self.ended_as(key, owner)
        if ended is not None:
            return ended
        if last and declared:
            if length not in (None, offset + len(body)):
                return LENGTH
            length = offset + len(body)
        upload = self.uploads.get(key)
        if upload is None or upload.owner != owner:
            return UNKNOWN
        if offset != len(upload.data):
            return self.at(upload, OFFSET)
        known = self.compare(upload.episode, upload.said)
        if known is not None:
            return self.end(key, known)
        if length is not None:
            if upload.said.length is None and length > MAX_BYTES:
                return TOO_LARGE
            if length < offset or upload.said.length not in (None, length):
                return self.at(upload, LENGTH)
            upload.said = upload.said._replace(length=length)
        limit = (MAX_BYTES if upload.said.length is None else upload.said.length) - offset
        came = body if cut_at is None else body[:cut_at]
        if len(came) > limit:
            return TOO_LARGE if upload.said.length is None else self.at(upload, LENGTH)
        if not body_right:
            return None if cut_at is not None else self.at(upload, BODY_MISMATCH)
        upload.data += came
        if cut_at is not None:
            return None
        return self.finish(key) if last else self.at(upload, APPENDED)

    def finish(self, key: str) -> Told:
        upload = self.uploads[key]
        if upload.said.length not in (None, len(upload.data)):
            return self.at(upload, LENGTH)
        return self.end(key, self.verdict(upload.episode, upload.said, upload.data))

    def end(self, key: str, told: Told) -> Told:
        upload = self.uploads.pop(key)
        stored = self.stored[upload.episode].sha256 if told.status < 300 else ""
        self.ended[key] = Ended(upload.owner, upload.episode, told, stored)
        return told

    def look(self, key: str, owner: str) -> Told:
        ended = self.ended_as(key, owner)
        if ended is not None:
            return ended if ended == UNKNOWN else Told(204, (), "?1")
        upload = self.uploads.get(key)
        return UNKNOWN if upload is None or upload.owner != owner else self.at(upload, APPENDED)

    def delete(self, key: str, owner: str) -> Told:
        for known in (self.ended, self.uploads):
            if key in known and known[key].owner == owner:
                del known[key]
                return Told(204)
        return UNKNOWN

    def ended_as(self, key: str, owner: str) -> Told | None:
        ended = self.ended.get(key)
        if ended is None or ended.owner != owner:
            return None
        stored = self.stored.get(ended.episode)
        if ended.told.status < 300 and (stored is None or stored.sha256 != ended.sha256):
            return UNKNOWN
        return ended.told

    def keep(self, key: str, owner: str, episode: str, said: Said, data: bytes, *, begin_only: bool) -> None:
        """What came of a body that was cut."""
        upload = self.uploads.get(key)
        if not data or episode in self.stored:
            return
        if upload is None:
            self.uploads[key] = Upload(episode, owner, said, data)
        elif not begin_only and len(upload.data) < len(data) <= (upload.said.length or len(data)):
            upload.data = data

    # --- what befalls the store ---------------------------------------------------------------------------------

    def read_again(self, episode: str) -> str:
        """The verdict of a verification or of scrub."""
        stored = self.stored[episode]
        if stored.is_right:
            return "sound"
        self.rotted.append(stored.data)
        del self.stored[episode]
        return "rotted"

    def age(self, *, long: bool) -> None:
        """An hour or two, or more than ``max-age``."""
        self.uploads = {
            key: upload for key, upload in self.uploads.items() if not long and upload.episode not in self.stored
        }
        if long:
            self.ended.clear()

    @staticmethod
    def at(upload: Upload, told: Told) -> Told:
        """An offset that is told is never less later."""
        assert len(upload.data) >= upload.told
        upload.told = len(upload.data)
        return told._replace(offset=upload.told)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wrong(value: str) -> str:
    """Another hex digest."""
    return sha256(value.encode())


STORED_NOW = Told(201, (), "?1")
STORED_ALREADY = Told(200, (), "?1")
CREATED = Told(201, (), "?0")
APPENDED = Told(204, (), "?0")
CONFLICT = Told(409, ("conflict",), "?1")
LENGTH = Told(400, ("inconsistent-length",), "?0")
OFFSET = Told(409, ("offset-mismatch",), "?0")
BODY_MISMATCH = Told(400, ("digest-mismatch",), "?0")
ARTIFACT_MISMATCH = Told(400, ("digest-mismatch",), "?1")
INVALID = Told(422, ("artifact-invalid", "content-mismatch"), "?1")
TOO_LARGE = Told(413, ("too-large",), "?1")
UNKNOWN = Told(404, ("unknown-upload",), "?0")
UNAUTHORIZED = Told(401, ("unauthorized",))
NOT_FOUND = Told(404, ("not-found",))

# --- how a client says it ------------------------------------------------------------------------------------------


def owner(client: str) -> str:
    return f"name:{client}"


def token(client: str) -> tuple[str, str]:
    return "authorization", f"Bearer token-of-{client}"


def of_artifact(said: Said) -> list[tuple[str, str]]:
    found = []
    if said.sha256 is not None:
        found.append(("repr-digest", fields.format_digest("sha-256", said.sha256)))
    if said.length is not None:
        found.append(("upload-length", str(said.length)))
    if said.blake3 is not None:
        found.append(("fastship-content-digest", fields.format_digest("blake3", said.blake3)))
    if said.content_bytes is not None:
        found.append(("fastship-content-length", str(said.content_bytes)))
    return found


def of_body(body: bytes, says: bool | None) -> list[tuple[str, str]]:
    digest = sha256(body) if says else wrong(sha256(body))
    return [] if says is None else [("content-digest", fields.format_digest("sha-256", digest))]


def framing(way: str, size: int) -> list[tuple[str, str]]:
    if way == "chunked":
        return [("transfer-encoding", "chunked")]
    return [("content-length", str(size)), *([("expect", "100-continue")] if way == "expect" else [])]


def cut(data: bytes, pieces: int) -> list[bytes]:
    """In as many pieces, one of them empty."""
    edges = [len(data) * number // (pieces + 1) for number in range(pieces + 2)]
    return [data[first:end] for first, end in itertools.pairwise(edges)] + [b""] * (pieces > 5)


def known(data: bytes, directory: Path) -> Artifact:
    path = directory / "artifact"
    path.write_bytes(data)
    content = verify_content(path)
    return Artifact(data, content.blake3, content.bytes)


def artifacts() -> list[Artifact]:
    """Two contents; the first packed twice, cut, and none at all; and one that is larger than is taken."""
    first = make_artifact("a", 1500, 1)
    content = zstandard.ZstdDecompressor().stream_reader(first).read()
    again = zstandard.ZstdCompressor(level=7, write_checksum=True).compress(content) + b"\x50\x2a\x4d\x18\0\0\0\0"
    with tempfile.TemporaryDirectory() as name:
        right = [known(data, Path(name)) for data in (first, again, make_artifact("b", 900, 2))]
    return [*right, Artifact(first[:1200]), Artifact(b"no artifact" * 50), Artifact(make_artifact("c", 6000, 3))]


ARTIFACTS = artifacts()


ARTIFACTS = artifacts()
RIGHT = {artifact.sha256: artifact for artifact in ARTIFACTS[:3]}
