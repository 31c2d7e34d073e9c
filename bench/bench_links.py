"""Over links of 10, 100 and 1000 Mbit/s: the adaptive level beside fixed ones, and one large episode beside its parts.

A backlog is drained at every fixed level once, then at ``auto`` in turn with the two best of them; the command's own
``seconds`` are compared, which leave out its start. One large episode is timed from its marker to retired, beside
packing alone and sending alone (``curl -T`` to the same receiver). The receiver shares the two cores with the shipper.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import measure
from bench.compare import ROUNDS, SCALE, beside, note, pack_into
from bench.corpus import Corpus
from bench.links import (
    LOADS,
    Drained,
    Link,
    LinkMissing,
    Load,
    check_stored,
    drain,
    make_backlog,
    piece_of,
    start_sink,
)
from bench.measure import Cost
from bench.peers.backlog import Backlog
from bench.peers.programs import FASTSHIP
from bench.servers import Receiver
from fastship.episode import MARKER
from fastship.frames import FramePool
from fastship.pack import PackOptions

pytestmark = pytest.mark.timeout(0)

ADAPTIVE = "auto"
FIXED = ("1", "3", "6", "9", "12", "15", "19")
FEW = {"10mbit": ("6", "9"), "100mbit": ("1", "9"), "1gbit": ("1", "3")}
"""At a small scale: the best ones, as they were found at scale 1."""
PIECES = {"100mbit": {"15": 4, "19": 4}, "1gbit": {"9": 12, "12": 6, "15": 2, "19": 2}}
"""Where cores and nothing else hold a level back, so many episodes stand for all; scaled by bytes."""
HELD_BY_CORES = 0.5  # of the link at most is then used

EPISODES = {"1gbit": (1_000_000_000, ("1", "3")), "100mbit": (200_000_000, ("1", "9"))}
"""Bytes of the one episode, and the fixed levels beside ``auto``."""
LIMIT_S = 120.0


@pytest.fixture
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """Skips, with the reason, where none can be made."""
    try:
        with Link(request.param) as made:
            yield made
    except LinkMissing as why:
        pytest.skip(str(why))


def scaled(load: Load) -> Load:
    episodes = max(4, round(load.episodes * SCALE))
    return Load(episodes, int(load.episodes * load.episode_bytes * min(SCALE, 1.0) / episodes))


# --- a backlog ---------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One level's figures for the whole backlog. ``piece``: measured with so many episodes and scaled; 0: with all."""

    done: Drained
    seconds: float
    piece: int

    def shown(self, rate_bits_per_s: int) -> dict[str, float]:
        done = self.done
        return {
            "seconds": round(self.seconds, 2),
            "whole_s": round(done.cost.wall_s, 2),
            "mb_per_s": round(done.raw_bytes / 1e6 / done.seconds, 1),
            "ratio": round(done.ratio, 3),
            "link_used": round(done.link_used(rate_bits_per_s), 3),
            "cpu_s": round(done.cost.cpu_s, 2),
            "sink_cpu_s": round(done.sink_cpu_s, 2),
            "piece_episodes": self.piece,
        }


def measure_level(link: Link, rate: str, backlog: Backlog, sink: Receiver, level: str) -> Line:
    piece = PIECES.get(rate, {}).get(level, backlog.episode_count)
    with piece_of(backlog, piece) as part:
        done = drain(link, part, sink, level)
    print(f"\n{done.line(link.rate_bits_per_s)}", end="")
    if done.raw_bytes == backlog.raw_bytes:
        return Line(done, done.seconds, 0)
    assert done.link_used(link.rate_bits_per_s) < HELD_BY_CORES, "a piece stands for the whole only where cores hold it"
    return Line(done, done.seconds * backlog.raw_bytes / done.raw_bytes, piece)


@pytest.mark.parametrize(("rate", "link"), [(rate, rate) for rate in LOADS], indirect=["link"], ids=list(LOADS))
def test_backlog(benchmark: Any, corpus: Corpus, work: Path, link: Link, rate: str) -> None:
    goodput = link.goodput_bits_per_s(work)
    backlog = make_backlog(work / rate, scaled(LOADS[rate]), corpus)
    with start_sink(link, work / f"sink-{rate}", "receiver") as sink:
        assert isinstance(sink, Receiver)
        with piece_of(backlog, 1) as part:
            drain(link, part, sink, "1")  # once unmeasured: bytecode is compiled, the receiver is warm
        lines = {level: measure_level(link, rate, backlog, sink, level) for level in FIXED if SCALE >= 1}
        best = tuple(sorted(lines, key=lambda level: lines[level].seconds)[:2]) or FEW[rate]
        taken: dict[str, list[Drained]] = {level: [] for level in (*best, ADAPTIVE)}

        def at(level: str) -> Cost:
            taken[level].append(drain(link, backlog, sink, level))
            print(f"\n{taken[level][-1].line(link.rate_bits_per_s)}", end="")
            return taken[level][-1].cost

        beside(
            benchmark,
            lambda: at(ADAPTIVE),
            {f"level_{level}": lambda level=level: at(level) for level in best},
            raw_bytes=backlog.raw_bytes,
            rounds=ROUNDS if SCALE >= 1 else 1,
        )
    for level, all_of_it in taken.items():
        middle = sorted(all_of_it, key=lambda one: one.seconds)[len(all_of_it) // 2]
        lines[level] = Line(middle, statistics.median(one.seconds for one in all_of_it), 0)
    best_s = min(lines[level].seconds for level in best)
    note(
        benchmark,
        goodput_mbit_per_s=goodput / 1e6,
        levels={level: line.shown(link.rate_bits_per_s) for level, line in lines.items()},
        best_fixed=min(best, key=lambda level: lines[level].seconds),
        auto_over_best_fixed=lines[ADAPTIVE].seconds / best_s,
    )
    print("auto over the best fixed level:", benchmark.extra_info["auto_over_best_fixed"])


# --- one episode -------------------------------------------------------------------------------------------------


class Shipped(NamedTuple):
    """``cost``: wall from the marker to retired, CPU of the shipper, which was there before."""

    cost: Cost
    sink_cpu_s: float


class Daemon:
    """``fastship run`` at the near end. Ships one episode again and again, each time under another name."""

    def __init__(self, link: Link, spool: Path, sink: Receiver, level: str) -> None:
        self._spool, self._sink = spool, sink
        self._names = (f"level-{level}-{number}" for number in itertools.count())
        values = (f"spool.root={spool}", f"destination.url={sink.url}", f"pack.level={level}", "log.level=error")
        values += ("host.give_way=false",)  # what packs and sends alone beside it is no neighbour to give way to
        settings = [part for value in values for part in ("--set", value)]
        self._process = subprocess.Popen(
            [*link.near.prefix, *FASTSHIP, "run", "--quiet", *settings],
            stdout=subprocess.DEVNULL,
            env=measure.installed_environment(),
        )

    def __enter__(self) -> Daemon:
        try:
            self._finish(f"first-{next(self._names)}")  # it has looked, started its workers and connected
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(LIMIT_S)

    def ship(self, home: Backlog) -> Shipped:
        """The one episode of ``home``, which is there again afterwards."""
        name = next(self._names)
        (episode,) = home.episodes.iterdir()
        (episode / MARKER).unlink(missing_ok=True)
        self._sink.empty()
        os.rename(episode, self._spool / "episodes" / name)
        os.sync()
        cpu_s, sink_cpu_s = measure.tree_cpu_s(self._process.pid), self._sink.cpu_s()
        seconds = self._finish(name)
        cpu_s, sink_cpu_s = measure.tree_cpu_s(self._process.pid) - cpu_s, self._sink.cpu_s() - sink_cpu_s
        os.rename(self._spool / "shipped" / name, home.episodes / name)
        check_stored(self._sink, home)
        return Shipped(Cost(seconds, cpu_s, measure.tree_peak_bytes(self._process.pid)), sink_cpu_s)

    def _finish(self, name: str) -> float:
        """Write the episode's marker; seconds until it is in ``shipped/``."""
        episode, shipped = self._spool / "episodes" / name, self._spool / "shipped" / name
        episode.mkdir(parents=True, exist_ok=True)
        time.sleep(0.3)  # the new directory is noticed and watched
        start = time.perf_counter()
        (episode / MARKER).touch()
        while not shipped.exists():
            assert time.perf_counter() - start < LIMIT_S
            time.sleep(0.002)
        return time.perf_counter() - start


@pytest.mark.parametrize("verify", ["artifact", "content"])
@pytest.mark.parametrize(("rate", "link"), [(rate, rate) for rate in EPISODES], indirect=["link"], ids=list(EPISODES))
def test_episode(benchmark: Any, corpus: Corpus, work: Path, link: Link, rate: str, verify: str) -> None:
    """``over_parts``: of a level, its time over the longer of packing and sending; of auto, over the best level's."""
    episode_bytes, levels = EPISODES[rate]
    root = work / f"one-{rate}-{verify}"
    home = make_backlog(root, Load(1, int(episode_bytes * min(SCALE, 1.0))), corpus)
    costs: dict[str, list[float]] = {}
    sink_cpu: dict[str, list[float]] = {}
    sent = itertools.count()

    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(start_sink(link, work / f"sink-{rate}-{verify}", "receiver", verify))
        pool = stack.enter_context(FramePool(len(os.sched_getaffinity(0))))
        assert isinstance(sink, Receiver)
        daemons = {
            level: stack.enter_context(Daemon(link, work / f"spool-{rate}-{verify}-{level}", sink, level))
            for level in (*levels, ADAPTIVE)
        }

        def kept(what: str, cost: Cost) -> Cost:
            costs.setdefault(what, []).append(cost.wall_s)
            return cost

        def pack_alone(level: str) -> Cost:
            (episode,) = home.episodes.iterdir()
            options = PackOptions(level=int(level))
            return kept(f"pack_{level}", measure.metered(lambda: pack_into(root, episode, pool, options))[0])

        def send_alone(level: str) -> Cost:
            """What was packed at that level just before."""
            (artifact,) = root.glob("*.zst")
            url = f"{sink.url}/v1/episodes/alone-{level}-{next(sent)}"
            ask = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-T", str(artifact), url]
            cost, out = measure.run([*link.near.prefix, *ask])
            assert out == b"201", out
            artifact.unlink()
            return kept(f"send_{level}", cost)

        def episode_at(level: str) -> Cost:
            shipped = daemons[level].ship(home)
            sink_cpu.setdefault(level, []).append(shipped.sink_cpu_s)
            return kept(f"episode_{level}", shipped.cost)

        episode_at(levels[0])  # once unmeasured
        costs.clear()
        references = {}
        for level in levels:
            references[f"pack_{level}"] = functools.partial(pack_alone, level)
            references[f"send_{level}"] = functools.partial(send_alone, level)
            references[f"episode_{level}"] = functools.partial(episode_at, level)
        rounds = ROUNDS if SCALE >= 1 else 1
        beside(benchmark, lambda: episode_at(ADAPTIVE), references, raw_bytes=home.raw_bytes, rounds=rounds)

    seconds = {what: statistics.median(all_of_it) for what, all_of_it in costs.items()}
    parts = {level: max(seconds[f"pack_{level}"], seconds[f"send_{level}"]) for level in levels}
    over = {level: round(seconds[f"episode_{level}"] / parts[level], 3) for level in levels}
    over[ADAPTIVE] = round(seconds[f"episode_{ADAPTIVE}"] / min(parts.values()), 3)
    note(
        benchmark,
        seconds={what: round(value, 3) for what, value in seconds.items()},
        sink_cpu_s={level: round(statistics.median(all_of_it), 2) for level, all_of_it in sink_cpu.items()},
        over_parts=over,
    )
    print({name: benchmark.extra_info[name] for name in ("seconds", "sink_cpu_s", "over_parts")})
