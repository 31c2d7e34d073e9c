"""The receiver taking an artifact: with digest and sync, with or without its contents verified, beside nginx without.

The client is ``curl -T`` for all; wall is curl's, CPU is the server's own (one worker each). Every stored artifact is
compared with what was sent.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, beside, pack_into
from bench.conftest import Named
from bench.corpus import SHAPES, Corpus
from bench.measure import Cost
from bench.servers import Nginx, Receiver
from fastship.frames import FramePool
from fastship.upload import Artifact

pytestmark = pytest.mark.timeout(0)


def put(server: Nginx | Receiver, artifact: Artifact, path: str) -> Cost:
    """One upload by curl; wall is the client's, CPU and memory the server's."""
    before = server.cpu_s()
    cost, out = measure.run(
        ["curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", "-T", artifact.path, server.url + path]
    )
    assert out in (b"201", b"204"), out
    return Cost(cost.wall_s, server.cpu_s() - before, server.peak_bytes())


def plain_loop(artifact: Artifact, target: Path) -> None:
    """Read, digest, write, sync: what storing needs whoever does it."""
    digest, buffer = hashlib.sha256(), bytearray(256 << 10)
    view = memoryview(buffer)
    with open(artifact.path, "rb", buffering=0) as source, open(target, "wb", buffering=0) as sink:
        while got := source.readinto(buffer):
            digest.update(view[:got])
            sink.write(view[:got])
        os.fsync(sink.fileno())
    assert digest.hexdigest() == artifact.manifest.artifact_sha256


@pytest.fixture(scope="module")
def artifact(corpus: Corpus, work: Path) -> Artifact:
    """Incompressible, so that sending is what takes the time; and one that holds something to decompress."""
    shape = SHAPES["video"].scaled(SCALE)
    corpus.write_episode(work / "video", shape.total_bytes, shape.file_bytes, kind=shape.kind)
    with FramePool(2) as pool:
        return pack_into(work, work / "video", pool)


@pytest.mark.parametrize("verify", ["artifact", "content"])
def test_receive(benchmark: Any, artifact: Artifact, nginx: Nginx, work: Path, fresh: Named, verify: str) -> None:
    os.sync()
    root = work / f"receiver-{verify}"
    with Receiver(root, "--set", "receiver.reserve_bytes=0", "--set", f"receiver.verify={verify}") as receiver:

        def ours() -> Cost:
            name = fresh(verify)
            cost = put(receiver, artifact, f"/v1/episodes/{name}")
            stored = receiver.store / f"{name}.tar.zst"
            with open(stored, "rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == artifact.manifest.artifact_sha256
            stored.unlink()
            return cost

        def theirs() -> Cost:
            nginx.empty()
            cost = put(nginx, artifact, "/artifact")
            assert nginx.stored_bytes() == artifact.manifest.artifact_bytes
            return cost

        def loop() -> Cost:
            cost, _ = measure.metered(lambda: plain_loop(artifact, work / "loop"))
            return cost

        put(receiver, artifact, "/v1/episodes/warm-up")
        compared = beside(
            benchmark, ours, {"nginx": theirs, "plain_loop": loop}, raw_bytes=artifact.manifest.artifact_bytes
        )
    benchmark.extra_info["speed_of_nginx"] = round(1 / compared.wall_ratio("nginx"), 3)
    print("speed of nginx", benchmark.extra_info["speed_of_nginx"])
    shutil.rmtree(root)
