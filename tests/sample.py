"""Values and directories that the tests of the spool and of the lifecycle begin with."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from fastship.episode import (
    MARKER,
    Manifest,
    Outcome,
    Receipt,
    ReceivedArtifact,
    ReceivedContent,
    Scope,
    Verdict,
)
from fastship.spool import HoldRecord, Spool

MTIME_NS = 1_600_000_000_123_456_789


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(
    episode: str, *, artifact: bytes = b"artifact", fingerprint: str = "f00d", boot_id: str = ""
) -> Manifest:
    return Manifest(
        episode=episode,
        artifact_sha256=hashlib.sha256(artifact).hexdigest(),
        artifact_bytes=len(artifact),
        content_blake3=digest(episode),
        content_bytes=1024,
        members=3,
        frames=1,
        frame_bytes=8 << 20,
        levels={3: 1},
        fingerprint=fingerprint,
        boot_id=boot_id,
    )


def receipt_of(manifest: Manifest) -> Receipt:
    return Receipt(
        episode=manifest.episode,
        artifact=ReceivedArtifact(manifest.artifact_sha256, manifest.artifact_bytes),
        content=ReceivedContent(manifest.content_blake3, manifest.content_bytes, manifest.members),
        verified="content",
    )


def shipped(manifest: Manifest) -> Verdict:
    return Verdict(outcome=Outcome.SHIPPED, scope=Scope.EPISODE, status=201, receipt=receipt_of(manifest))


def verdict(
    outcome: Outcome, scope: Scope, *, status: int | None = None, retry_after_s: float | None = None
) -> Verdict:
    return Verdict(outcome=outcome, scope=scope, status=status, error=f"{outcome} {scope}", retry_after_s=retry_after_s)


def hold_record(episode: str, *, reason: str = "conflict") -> HoldRecord:
    return HoldRecord(
        episode=episode,
        reason=reason,
        status=409,
        error="another content",
        body="{}",
        fingerprint="f00d",
        artifact_sha256=digest(episode),
        held_at="2026-01-02T03:04:05Z",
    )


def make_episode(parent: Path, name: str, *, marker: bool = True, content: bytes | None = None) -> Path:
    """A small episode with a subdirectory, its directory's mtime `MTIME_NS`."""
    path = parent / name
    (path / "sub").mkdir(parents=True)
    (path / "data.bin").write_bytes(os.fsencode(name) * 50 if content is None else content)
    (path / "sub" / "log.txt").write_bytes(b"line\n")
    if marker:
        (path / MARKER).touch()
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


def put_artifact(spool: Spool, episode: str, data: bytes = b"artifact") -> Manifest:
    """An artifact in the outbox, as a worker leaves it."""
    manifest = manifest_of(episode, artifact=data)
    with spool.outbox.begin(episode) as sink:
        sink.write(data)
        sink.truncate()
    spool.outbox.commit(manifest)
    return manifest


def files_below(top: Path) -> dict[str, bytes]:
    """Every regular file below ``top`` by its relative path."""
    return {
        os.path.relpath(os.path.join(directory, name), top): (Path(directory) / name).read_bytes()
        for directory, _, names in os.walk(top)
        for name in names
    }


def journal_lines(spool: Spool) -> list[dict[str, object]]:
    """Every line of the journals of receipts, oldest first; torn ones are passed over."""
    found = []
    for path in sorted(spool.paths.receipts.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(msgspec.json.decode(line, type=dict[str, object]))
    return found
