"""``python -m bench.peers [--scale S] [--shapes large,small,tiny] [--rounds N] [--write docs/benchmarks.md]``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from bench import measure
from bench.corpus import SHAPES, Corpus
from bench.peers import backlog, programs, report
from bench.peers.backlog import Backlog
from bench.peers.programs import PEERS, Delivered, Missing, Peer, Sinks
from bench.recordings import SETS, NotFetched
from bench.servers import Nginx, Receiver, ServerMissing

_SLOW_LEVEL_BYTES = 64_000_000  # two jobs of zstd -T2 -19: it uses both cores
_SLOW_LEVEL_EPISODES = 24
_SLOW_FILES = 400
_SLOW_EPISODES = 300  # programs started for each episode: 5,000 would take minutes a round


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="fastship beside its peers, in one run.")
    parser.add_argument("--scale", type=float, default=1.0, help="of the shapes (1: 1 GB large, 200 MB small)")
    parser.add_argument("--shapes", default="large,small,tiny,seismic", help="of " + ", ".join([*SHAPES, *SETS]))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="only those with one of these texts in their names, by comma")
    parser.add_argument("--write", type=Path, help="a Markdown file; its chart goes beside it as .svg")
    parser.add_argument("--json", type=Path, help="every figure of every round")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers and the spools go as well
    shapes = [shape for shape in arguments.shapes.split(",") if shape]
    unknown = [shape for shape in shapes if shape not in SHAPES and shape not in SETS]
    if unknown:
        parser.error(f"no shape {unknown[0]}; known: {', '.join([*SHAPES, *SETS])}")
    wanted = [text for text in arguments.peers.split(",") if text]
    peers = [peer for peer in PEERS if not wanted or any(text in peer.name for text in wanted)]

    conditions = {**measure.host(), "scale": arguments.scale, "rounds": arguments.rounds}
    tables = []
    try:
        with tempfile.TemporaryDirectory(prefix="fastship-peers-") as name:
            directory, corpus = Path(name), Corpus()
            with (
                Nginx(directory / "nginx") as plain,
                Receiver(directory / "receiver", "--set", "receiver.reserve_bytes=0") as receiver,
            ):
                for shape in shapes:
                    whole = backlog.make(directory / "spools", shape, arguments.scale, corpus)
                    _say(f"{shape}: {whole.episode_count} episodes, {whole.raw_bytes / 1e6:.0f} MB")
                    rounds = _Rounds(whole, Sinks(plain, receiver), directory, shape, corpus)
                    tables.append(rounds.run(peers, arguments.rounds))
    except (ServerMissing, NotFetched) as error:
        print(error, file=sys.stderr)
        return 3
    conditions["load_after"] = measure.host()["load_before"]
    versions = {**measure.versions(), **programs.program_versions()}
    text = report.markdown(tables, conditions, versions, chart="benchmarks.svg")
    print(text)
    if arguments.write:
        chart = arguments.write.with_suffix(".svg")
        chart.parent.mkdir(parents=True, exist_ok=True)
        chart.write_text(report.chart(tables), encoding="utf-8")
        text = report.markdown(tables, conditions, versions, chart=chart.name)
        report.replace_section(arguments.write, text)
    if arguments.json:
        document = {"conditions": conditions, "versions": versions, "tables": [report.plain(table) for table in tables]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


class _Rounds:
    """All peers of one shape, in turn, as often as there are rounds; the slowest once, on a piece."""

    def __init__(self, whole: Backlog, sinks: Sinks, directory: Path, shape: str, corpus: Corpus) -> None:
        self._whole = whole
        self._sinks = sinks
        self._work = directory / "work"
        self._work.mkdir(exist_ok=True)
        self._shape = shape
        samples = directory / "samples"
        self._pieces = {
            "": whole,
            "level": backlog.sample(
                whole, samples, shape, corpus, most_bytes=_SLOW_LEVEL_BYTES, most_episodes=_SLOW_LEVEL_EPISODES
            ),
            "files": backlog.sample(
                whole,
                samples,
                shape,
                corpus,
                most_bytes=whole.raw_bytes,
                most_episodes=max(1, _SLOW_FILES * whole.episode_count // _count_files(whole)),
            ),
            "episode": backlog.sample(
                whole, samples, shape, corpus, most_bytes=whole.raw_bytes, most_episodes=_SLOW_EPISODES
            ),
        }

    def run(self, peers: list[Peer], rounds: int) -> report.Table:
        for peer in peers[:2]:
            if peer.name.startswith("fastship"):  # once unmeasured: an installation has its bytecode compiled
                peer.deliver(self._pieces["files"], self._sinks, self._work)
        delivered: dict[str, list[Delivered]] = {peer.name: [] for peer in peers}
        missing: dict[str, str] = {}
        for number in range(rounds):
            for peer in peers:
                if peer.name in missing or (peer.slow == "level" and number):
                    continue
                piece = self._pieces[peer.slow]
                piece.warm()
                try:
                    one = peer.deliver(piece, self._sinks, self._work)
                except Missing as why:
                    missing[peer.name] = str(why)
                    _say(f"  {peer.name}: left out: {why}")
                    continue
                delivered[peer.name].append(one)
                _say(
                    f"  {number + 1}/{rounds} {peer.name}: {one.cost.wall_s:.2f} s,"
                    f" {one.cost.megabytes_per_s(piece.raw_bytes):.1f} MB/s"
                )
        self._sinks.plain.empty()
        rows = [
            report.Row.of(peer, self._pieces[peer.slow], self._whole, delivered[peer.name])
            for peer in peers
            if delivered[peer.name]
        ]
        return report.Table(self._shape, self._whole.episode_count, self._whole.raw_bytes, rows, missing)


def _count_files(whole: Backlog) -> int:
    return sum(len(files) for _, _, files in os.walk(whole.episodes))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
