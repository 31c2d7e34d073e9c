"""Something measured beside its references, in turn, within one run; and what every benchmark reports of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench import measure
from bench.measure import Cost
from fastship.episode import ARTIFACT_SUFFIX
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
from fastship.upload import Artifact

SCALE = float(os.environ.get("FASTSHIP_BENCH_SCALE", "0.1"))
"""Of the shapes. 0.1 keeps all suites together under four minutes on two cores; 1 is what figures are quoted from."""

ROUNDS = int(os.environ.get("FASTSHIP_BENCH_ROUNDS", "3"))

Work = Callable[[], Cost]


class Compared(NamedTuple):
    actual: list[Cost]
    references: dict[str, list[Cost]]

    def cpu_ratio(self, reference: str) -> float:
        """Actual over reference CPU, the least of each: noise only adds."""
        return measure.least(self.actual).cpu_s / max(measure.least(self.references[reference]).cpu_s, 1e-9)

    def wall_ratio(self, reference: str) -> float:
        """Actual over reference wall, medians."""
        return measure.median(self.actual).wall_s / measure.median(self.references[reference]).wall_s


def beside(
    benchmark: Any,
    actual: Work,
    references: Mapping[str, Work],
    *,
    raw_bytes: int,
    rounds: int = ROUNDS,
    **facts: Any,
) -> Compared:
    """Run the references and then the actual work, ``rounds`` times in turn; put everything into ``extra_info``."""
    compared = Compared([], {name: [] for name in references})

    def run_references() -> None:
        for name, work in references.items():
            compared.references[name].append(work())

    benchmark.pedantic(lambda: compared.actual.append(actual()), setup=run_references, rounds=rounds)
    info = benchmark.extra_info
    info.update(raw_mb=round(raw_bytes / 1e6, 1), scale=SCALE, host=measure.host(), versions=measure.versions())
    info["actual"] = _shown(measure.median(compared.actual), raw_bytes)
    for name, costs in compared.references.items():
        info[name] = _shown(measure.median(costs), raw_bytes)
        info[f"cpu_over_{name}"] = round(compared.cpu_ratio(name), 3)
        info[f"wall_over_{name}"] = round(compared.wall_ratio(name), 3)
    note(benchmark, **facts)
    ratios = {key: value for key, value in info.items() if key.startswith(("cpu_over", "wall_over"))}
    print(f"\n{benchmark.name}: {info['actual']} {ratios} {facts}")
    return compared


def note(benchmark: Any, **facts: Any) -> None:
    benchmark.extra_info.update(
        {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}
    )


def _shown(cost: Cost, raw_bytes: int) -> dict[str, float]:
    return {
        "wall_s": round(cost.wall_s, 4),
        "cpu_s": round(cost.cpu_s, 4),
        "mb_per_s": round(cost.megabytes_per_s(raw_bytes), 1),
        "cpu_s_a_gb": round(cost.a_gigabyte(raw_bytes), 3),
        "peak_mib": round(cost.peak_bytes / measure.MIB, 1),
    }


def timed(work: Callable[[], object]) -> Work:
    """``work`` in this process, as something that gives its cost."""
    return lambda: measure.metered(work)[0]


def pack_into(directory: Path, episode: Path, pool: FramePool, options: PackOptions | None = None) -> Artifact:
    """Pack to ``directory/<id>.tar.zst``."""
    path = directory / (episode.name + ARTIFACT_SUFFIX)
    with open(path, "wb", buffering=0) as sink:
        return Artifact(pack(episode, sink, options or PackOptions(), pool), path)
