"""Resuming: an upload of which the receiver holds half already, beside the whole upload to the same receiver.

The half is put there by another client, over the wire of docs/protocol.md. What is asserted: only the rest is sent.
"""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from bench import measure
from bench.compare import SCALE, beside, pack_into
from bench.conftest import Named
from bench.corpus import SHAPES, Corpus
from bench.measure import Cost
from bench.servers import Receiver
from fastship import fields
from fastship.episode import Outcome
from fastship.frames import FramePool
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, ship

pytestmark = pytest.mark.timeout(0)


def leave_half(receiver: Receiver, artifact: Artifact) -> int:
    """Create the upload and append half of the artifact; the receiver's offset."""
    manifest = artifact.manifest
    half = manifest.artifact_bytes // 2
    connection = http.client.HTTPConnection(urlsplit(receiver.url).netloc, timeout=60)
    try:
        announced = {
            "Content-Length": "0",
            fields.UPLOAD_COMPLETE: "?0",
            fields.UPLOAD_LENGTH: str(manifest.artifact_bytes),
            fields.REPR_DIGEST: fields.format_digest("sha-256", manifest.artifact_sha256),
        }
        connection.request("PUT", f"/v1/episodes/{manifest.episode}", b"", announced)
        created = connection.getresponse()
        created.read()
        assert created.status == 201, created.status
        append = {"Content-Type": fields.PARTIAL_UPLOAD, fields.UPLOAD_OFFSET: "0", fields.UPLOAD_COMPLETE: "?0"}
        with open(artifact.path, "rb") as file:
            body = file.read(half)
        connection.request("PATCH", urlsplit(created.headers["Location"]).path, body, append)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 204, answer.status
        return int(answer.headers[fields.UPLOAD_OFFSET])
    finally:
        connection.close()


def test_resume(benchmark: Any, corpus: Corpus, receiver: Receiver, work: Path, fresh: Named) -> None:
    shape = SHAPES["video"].scaled(SCALE)
    corpus.write_episode(work / "video", shape.total_bytes, shape.file_bytes, kind=shape.kind)
    with FramePool(2) as pool:
        packed = pack_into(work, work / "video", pool)
    total = packed.manifest.artifact_bytes
    destination = DestinationSettings(url=receiver.url)

    def named() -> Artifact:
        return Artifact(msgspec.structs.replace(packed.manifest, episode=fresh("resume")), packed.path)

    def whole() -> Cost:
        artifact = named()
        os.sync()
        cost, verdict = measure.metered(lambda: ship(artifact, destination, UploadSettings()))
        assert verdict.outcome is Outcome.SHIPPED, verdict
        assert verdict.sent_bytes == total
        return cost

    def rest() -> Cost:
        artifact = named()
        offset = leave_half(receiver, artifact)
        os.sync()
        cost, verdict = measure.metered(lambda: ship(artifact, destination, UploadSettings(), first_attempt=False))
        assert verdict.outcome is Outcome.SHIPPED, verdict
        assert verdict.receipt is not None
        assert verdict.receipt.artifact.sha256 == packed.manifest.artifact_sha256
        assert (verdict.resumed_at, verdict.sent_bytes) == (offset, total - offset)
        return cost

    beside(benchmark, rest, {"whole": whole}, raw_bytes=total, resumed_at_part=0.5)
