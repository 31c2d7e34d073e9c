"""Uploading alone: a `Session` beside ``curl -T`` of the same files to the same sink (nginx, no digest, no sync)."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, beside, pack_into
from bench.conftest import Named
from bench.corpus import Corpus
from bench.measure import Cost
from bench.servers import Nginx
from fastship.episode import Outcome, Verdict
from fastship.frames import FramePool
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload import Artifact, Session

pytestmark = pytest.mark.timeout(0)


def curl(artifacts: list[Artifact], sink: Nginx, work: Path) -> Cost:
    """One curl for all of them: one connection, kept alive."""
    lines = []
    for number, one in enumerate(artifacts):
        lines += ["next"] * bool(number)
        lines += [f'upload-file = "{one.path}"', f'url = "{sink.url}/curl/{one.manifest.episode}"', "fail", "silent"]
        lines += ['output = "/dev/null"']
    (work / "curl.conf").write_text("\n".join(lines) + "\n")
    cost, _ = measure.run(["curl", "-K", work / "curl.conf"])
    assert len(list((sink.store / "curl").iterdir())) == len(artifacts)
    return cost


def ship_artifacts(artifacts: list[Artifact], destination: DestinationSettings) -> Cost:
    """Ship them in one session of this process."""
    verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()

    def work() -> None:
        with Session(destination, UploadSettings(), on_verdict=lambda _id, verdict: verdicts.put(verdict)) as session:
            for one in artifacts:
                session.submit(one, first_attempt=True)
            for _ in artifacts:
                verdict = verdicts.get()
                assert verdict.outcome is Outcome.SHIPPED, verdict

    return measure.metered(work)[0]


@pytest.mark.parametrize("shape", ["video", "small", "tiny"])
def test_upload(benchmark: Any, corpus: Corpus, nginx: Nginx, work: Path, fresh: Named, shape: str) -> None:
    episodes = corpus.write_shape(work / fresh(shape), shape, SCALE)
    with FramePool(1) as pool:
        artifacts = [pack_into(work, path, pool) for path in episodes]
    sent = sum(one.manifest.artifact_bytes for one in artifacts)

    def by_curl() -> Cost:
        nginx.empty()
        return curl(artifacts, nginx, work)

    def by_session() -> Cost:
        nginx.empty()
        cost = ship_artifacts(artifacts, DestinationSettings(url=nginx.url, proof="status"))
        assert nginx.stored_bytes() == sent
        return cost

    compared = beside(benchmark, by_session, {"curl": by_curl}, raw_bytes=sent, artifacts=len(artifacts))
    benchmark.extra_info["artifacts_per_s"] = round(len(artifacts) / measure.median(compared.actual).wall_s, 1)
