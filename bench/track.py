"""Has fastship become slower? Ratios taken within one run, compared with those that are committed.

    python -m bench.track [--json FILE]        compares; exit 1 on a real loss; under 90 s
    python -m bench.track --update [--runs 7]  measures that often and rewrites bench/baseline.json

Every ratio is the CPU of a reference over the CPU of fastship's own work on the same bytes, taken in turn in the same
minute: larger is better, and a busy or another host moves both sides. Never seconds by themselves. What counts is the
least of each side: noise only adds.

The tolerance of each ratio comes from the runs of ``--update``: `MARGIN` times the way from the median down to the
lowest run, and at least `LEAST_TOLERANCE`. A ratio below that is measured again, up to `REPEATS` times, and its best
counts: a loss in the code is there each time, a busy neighbour is not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench import bench_receiver, bench_scan, measure
from bench.bench_upload import ship_artifacts
from bench.compare import pack_into
from bench.corpus import Corpus, Shape
from bench.floor import Floor
from bench.servers import Receiver
from fastship.episode import Outcome
from fastship.frames import FramePool
from fastship.settings import DestinationSettings, UploadSettings
from fastship.spool import Spool
from fastship.upload import Artifact, ship

BASELINE = Path(__file__).with_name("baseline.json")
LEAST_TOLERANCE = 0.20  # two kinds of CPU differ by a tenth: only a loss that no machine makes counts
MOSTLY_KERNEL = {"receiver": 0.40, "upload": 0.40}  # pages and sockets: the same commit went from 0.40 to 0.69 here
MARGIN = 1.5  # with the repeats: a loss must be lower three times running than ever seen, by half as much again
REPEATS = 2
ROUNDS = 5
_POOL_BYTES = 8 << 20  # makes the corpus in some seconds; still far more than level 3's window of 2 MiB


class Stage:
    """What the ratios are measured on: made once, kept for repeats."""

    def __init__(self, directory: Path) -> None:
        corpus = Corpus(pool_bytes=_POOL_BYTES)
        self.directory = directory
        self.large = corpus.write_episodes(directory / "large", Shape(1, 64_000_000, 4_000_000), "large")
        self.small = corpus.write_shape(directory / "small", "small", 0.15)
        self.tiny = corpus.write_shape(directory / "tiny", "tiny", 0.06)
        self.video = corpus.write_episodes(directory / "video", Shape(1, 100_000_000, 50_000_000, "h264"), "video")
        self.spool = directory / "spool"
        for number in range(10_000):
            (self.spool / "episodes" / f"ep-{number:05d}").mkdir(parents=True)
        self._names = itertools.count()

    def pack_efficiency(self, episodes: list[Path]) -> float:
        outbox = self.directory / "outbox"
        outbox.mkdir(exist_ok=True)
        floor = Floor(3, 1, self.directory / "scratch")
        floors, actuals = [], []
        with FramePool(1) as pool:
            made = [pack_into(outbox, path, pool) for path in episodes]
            for _ in range(ROUNDS):
                least = floor.cost(episodes, [one.path for one in made])
                assert least.contents == [one.manifest.content_blake3 for one in made]
                floors.append(least.cpu_s)
                cost, made = measure.metered(lambda: [pack_into(outbox, path, pool) for path in episodes])
                actuals.append(cost.cpu_s)
        shutil.rmtree(outbox)
        return min(floors) / min(actuals)

    def _packed_video(self) -> Artifact:
        with FramePool(1) as pool:
            return pack_into(self.directory, self.video[0], pool)

    def upload(self) -> float:
        """curl's CPU over the session's, to a sink that drops everything."""
        artifacts = [self._packed_video()]
        curls, ours = [], []
        with _discard() as url:
            destination = DestinationSettings(url=url, proof="status")
            command = ["curl", "-fsS", "-o", "/dev/null", "-T", str(artifacts[0].path), f"{url}/curl"]
            for _ in range(2 * ROUNDS):
                curls.append(measure.run(command)[0])
                ours.append(ship_artifacts(artifacts, destination))
        return measure.least(curls).cpu_s / measure.least(ours).cpu_s

    def receiver(self) -> float:
        """The CPU of reading, digesting, writing and syncing the artifact in a loop, over the receiver's."""
        packed = self._packed_video()
        loops: list[float] = []
        root = self.directory / "receiver"
        with Receiver(root, "--set", "receiver.reserve_bytes=0", "--set", "receiver.verify=artifact") as receiver:
            destination = DestinationSettings(url=receiver.url)
            self._ship_once(packed, destination)
            before = receiver.cpu_s()
            for _ in range(2 * ROUNDS):  # the sum of all rounds: the kernel counts another process in ticks of 10 ms
                # A new file each time, as the receiver makes: pages used before cost half as much.
                target = root / f"loop{next(self._names)}"
                loops.append(measure.metered(functools.partial(bench_receiver.plain_loop, packed, target))[0].cpu_s)
                self._ship_once(packed, destination)
            used = receiver.cpu_s() - before
        shutil.rmtree(root)
        return sum(loops) / used

    def _ship_once(self, packed: Artifact, destination: DestinationSettings) -> None:
        named = msgspec.structs.replace(packed.manifest, episode=f"e{next(self._names)}")
        verdict = ship(Artifact(named, packed.path), destination, UploadSettings())
        assert verdict.outcome is Outcome.SHIPPED, verdict

    def scan(self) -> float:
        looker = Spool(self.spool)
        looker.create()
        bare, looks = [], []
        for _ in range(3 * ROUNDS):
            bare.append(measure.metered(lambda: bench_scan.bare(self.spool))[0])
            looks.append(measure.metered(looker.look)[0])
        return measure.least(bare).cpu_s / measure.least(looks).cpu_s

    def ratios(self) -> dict[str, Callable[[], float]]:
        found: dict[str, Callable[[], float]] = {
            "pack_large": lambda: self.pack_efficiency(self.large),
            "pack_small": lambda: self.pack_efficiency(self.small),
            "pack_tiny": lambda: self.pack_efficiency(self.tiny),
            "receiver": self.receiver,
            "scan": self.scan,
        }
        if shutil.which("curl"):
            found["upload"] = self.upload
        else:
            print("upload: not measured: curl is not installed (apt install curl)", file=sys.stderr)
        return found


@contextlib.contextmanager
def _discard() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-m", "bench.discard"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.terminate()


def tolerance(values: list[float]) -> float:
    """As a part of the median."""
    middle = statistics.median(values)
    return round(max(LEAST_TOLERANCE, MARGIN * (middle - min(values)) / middle), 3)


def compare(ratios: dict[str, Callable[[], float]], baseline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each ratio's best of as many measurements as it needs, beside its baseline; ``lost`` says the verdict."""
    found: dict[str, dict[str, Any]] = {}
    for name, take in ratios.items():
        measured = [take()]
        known = baseline["ratios"].get(name)
        least = known["value"] * (1 - known["tolerance"]) if known else 0.0
        while max(measured) < least and len(measured) <= REPEATS:
            measured.append(take())
        best = max(measured)
        found[name] = {
            "value": round(best, 4),
            "measured": [round(value, 4) for value in measured],
            "baseline": known["value"] if known else None,
            "least": round(least, 4),
            "lost": best < least,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.track", description="Compare ratios with the baseline.")
    parser.add_argument("--json", type=Path, help="write what was measured")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("--runs", type=int, default=7, help="of --update")
    arguments = parser.parse_args()
    start = time.monotonic()
    facts = {"host": measure.host(), "versions": measure.versions()}
    with tempfile.TemporaryDirectory(prefix="fastship-track-") as directory:
        ratios = Stage(Path(directory)).ratios()
        if arguments.update:
            return _update(ratios, arguments.runs, facts)
        baseline = json.loads(BASELINE.read_text())
        found = compare(ratios, baseline)
    for name, one in found.items():
        told = "LOST" if one["lost"] else "ok"
        print(f"{name:12} {one['value']:6.3f}  baseline {one['baseline']}, least {one['least']:.3f}  {told}")
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "ratios": found}, indent=1) + "\n")
    lost = [name for name, one in found.items() if one["lost"]]
    if lost:
        print(
            f"slower than the baseline: {', '.join(lost)}. Find it with py-spy or perf on bench/; if it is meant,"
            " say why in the commit and run: python -m bench.track --update",
            file=sys.stderr,
        )
    return 1 if lost else 0


def _update(ratios: dict[str, Callable[[], float]], runs: int, facts: dict[str, Any]) -> int:
    measured: dict[str, list[float]] = {name: [] for name in ratios}
    for number in range(runs):
        for name, take in ratios.items():
            measured[name].append(round(take(), 4))
        print(f"run {number + 1}: " + ", ".join(f"{name} {values[-1]}" for name, values in measured.items()))
    document = {
        **facts,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ratios": {
            name: {
                "value": statistics.median(values),
                "tolerance": max(tolerance(values), MOSTLY_KERNEL.get(name, 0.0)),
                "runs": values,
            }
            for name, values in measured.items()
        },
    }
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
