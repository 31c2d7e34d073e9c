"""Draining: a backlog from its markers to retired, by ``fastship once``, to nginx and to fastship's own receiver.

Beside the plainest shell loop (`tar | zstd -T0 -3 | curl -T -`) to the same sink, and for packing the floor's CPU. The
command is measured whole, its start and its workers' included; ``seconds`` is its own word, without the start, and
``episodes_per_s`` goes by it. ``an_episode`` has the rate and the CPU of the whole command, beside the loop's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, beside, note
from bench.conftest import Named
from bench.corpus import Corpus
from bench.measure import Cost
from bench.peers import backlog
from bench.peers.programs import PEERS, Sinks, fastship_command
from bench.servers import Nginx, Receiver

pytestmark = pytest.mark.timeout(0)

LOOP = next(peer for peer in PEERS if peer.name == "tar, zstd -T0 -3, curl -T -")


@pytest.mark.parametrize("to", ["nginx", "receiver"])
@pytest.mark.parametrize("shape", ["large", "small", "tiny"])
def test_drain(
    benchmark: Any, corpus: Corpus, nginx: Nginx, receiver: Receiver, work: Path, fresh: Named, shape: str, to: str
) -> None:
    waiting = backlog.make(work / fresh(shape + to), shape, SCALE, corpus)
    sink = nginx if to == "nginx" else receiver
    proof = ["destination.proof=status"] if to == "nginx" else []
    reports: list[dict[str, Any]] = []

    def drain() -> Cost:
        sink.empty()
        cost, out = measure.run(fastship_command(waiting, sink.url, *proof))
        reports.append(json.loads(out))
        assert reports[-1]["shipped"] == waiting.episode_count
        assert len(sink.artifacts()) == waiting.episode_count
        assert len(list((waiting.spool / "shipped").iterdir())) == waiting.episode_count
        waiting.restore()
        return cost

    def loop() -> Cost:
        return LOOP.deliver(waiting, Sinks(nginx, receiver), work).cost

    # The loop is the same whatever fastship ships to; with tiny episodes it takes long, and once is enough.
    references = {} if (shape, to) == ("tiny", "receiver") else {"shell_loop": loop}
    drain()  # once unmeasured: bytecode is compiled, the receiver is warm
    reports.clear()
    compared = beside(benchmark, drain, references, raw_bytes=waiting.raw_bytes)
    seconds = sorted(one["seconds"] for one in reports)[len(reports) // 2]
    count = waiting.episode_count
    pieces = {
        name: {"episodes_per_s": round(count / cost.wall_s, 1), "cpu_ms": round(1e3 * cost.cpu_s / count, 3)}
        for name, costs in {"fastship": compared.actual, **compared.references}.items()
        for cost in [measure.median(costs)]
    }
    note(
        benchmark,
        ratio=reports[-1]["bytes_in"] / reports[-1]["bytes_out"],
        episodes_per_s=count / seconds,
        start_and_end_s=measure.median(compared.actual).wall_s - seconds,
        an_episode=pieces,
    )
    print({name: benchmark.extra_info[name] for name in ("ratio", "episodes_per_s", "start_and_end_s", "an_episode")})
