"""What `fastship tune` predicts, beside what `fastship once` then delivers of the same episodes on the same host.

To nginx, where the cores hold back or a bandwidth limit does; and over a link of a known rate (bench/links.py) to
fastship's own receiver, so that the link is measured. That takes from the cores that are to pack; as `tune` believes
the receiver to be on a host of its own, it does not verify contents here. Delivered is the command's own figure,
without its start. Predicted over delivered is to be within 20 % of 1, at scale 1 and on a quiet machine: at 0.1 a
backlog is over before its rate is steady.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import measure
from bench.compare import ROUNDS, SCALE, note
from bench.conftest import Named
from bench.corpus import Corpus
from bench.links import Link, LinkMissing, start_sink
from bench.measure import Cost
from bench.peers import backlog
from bench.peers.programs import FASTSHIP, fastship_command
from bench.servers import Nginx, Receiver

pytestmark = pytest.mark.timeout(0)

WAYS = (("large", "nginx"), ("small", "nginx"), ("small", "limited"), ("small", "200mbit"), ("large", "20mbit"))
LIMITS: dict[str, tuple[str, ...]] = {"nginx": (), "limited": ("upload.bandwidth=20MB",)}
SECONDS = 15 if SCALE >= 1 else 8
SCALES = {"large": max(SCALE, 0.4), "small": 5 * SCALE}  # a GB each at scale 1: seconds of work
LINK_SCALES = {"20mbit": 0.3, "200mbit": 1.0}  # of those


class Way(NamedTuple):
    """Where episodes go, what a command there begins with, and the settings that belong to it."""

    sink: Nginx | Receiver
    prefix: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


@pytest.fixture
def way(request: pytest.FixtureRequest, work: Path, fresh: Named) -> Iterator[Way]:
    """Skips, with the reason, where none can be made."""
    to: str = request.param
    if to in LIMITS:
        yield Way(request.getfixturevalue("nginx"), values=("destination.proof=status", *LIMITS[to]))
    else:
        try:
            with Link(to) as link, start_sink(link, work / fresh(to), "receiver") as sink:
                yield Way(sink, link.near.prefix)
        except LinkMissing as why:
            pytest.skip(str(why))


@pytest.mark.parametrize(
    ("shape", "to", "way"),
    [(shape, to, to) for shape, to in WAYS],
    indirect=["way"],
    ids=[f"{shape}-{to}" for shape, to in WAYS],
)
def test_prediction(benchmark: Any, corpus: Corpus, work: Path, fresh: Named, shape: str, to: str, way: Way) -> None:
    waiting = backlog.make(work / fresh(shape + to), shape, SCALES[shape] * LINK_SCALES.get(to, 1.0), corpus)
    tune = [*way.prefix, *FASTSHIP, "tune", "--json", "--quiet"]
    tune += ["--from", str(waiting.episodes), "--seconds", str(SECONDS)]
    for value in (f"spool.root={waiting.spool}", f"destination.url={way.sink.url}", *way.values):
        tune += ["--set", value]
    reports: list[dict[str, Any]] = []

    def drain() -> Cost:
        way.sink.empty()
        cost, out = measure.run([*way.prefix, *fastship_command(waiting, way.sink.url, *way.values, *chosen)])
        reports.append(json.loads(out))
        assert reports[-1]["shipped"] == waiting.episode_count
        waiting.restore()
        return cost

    chosen: list[str] = []
    predictions, delivered = [], []
    drain()  # once unmeasured: bytecode is compiled, the receiver is warm
    for _ in range(ROUNDS if SCALE >= 1 else 1):
        report = json.loads(measure.run(tune)[1])
        chosen = [
            f"{section}.{key}={value}" for section, keys in report["settings"].items() for key, value in keys.items()
        ]
        predictions.append(report["chosen"]["mb_per_s"])
        drain()
        delivered.append(reports[-1]["bytes_in"] / 1e6 / reports[-1]["seconds"])
        ratio = reports[-1]["bytes_in"] / reports[-1]["bytes_out"]
        print(
            f"\n{shape} to {to}: predicted {predictions[-1]:.0f}, delivered {delivered[-1]:.0f} MB/s, {chosen[0]}",
            f"ratio {report['chosen']['ratio']} and {ratio:.3f}, {report['chosen']['bottleneck']}",
        )
        assert abs(report["chosen"]["ratio"] / ratio - 1) < 0.1
    benchmark.pedantic(lambda: None, rounds=1)  # what was measured is in its extra_info
    note(
        benchmark,
        predicted_mb_per_s=statistics.median(predictions),
        delivered_mb_per_s=statistics.median(delivered),
        predicted_over_delivered=statistics.median(p / d for p, d in zip(predictions, delivered, strict=True)),
        bottleneck=report["chosen"]["bottleneck"],
        host=measure.host(),
        versions=measure.versions(),
    )
    print(benchmark.extra_info)
