"""A link of a known rate on this machine: two network namespaces, joined by a veth pair shaped both ways (tc-tbf(8)).

What always holds: traffic stays between the two namespaces (addresses of 198.18.0.0/15, RFC 2544, seen nowhere else);
names carry the process's id, so that two runs do not meet; and both are gone when the ``with`` block ends, and also
when this process is killed: a shell waits for that at the other end of a pipe. Needs root and iproute2.

    python -m bench.links --rate 100mbit --level 6 --mb 200      a backlog over a link, a line of figures a level
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import zstandard

from bench import measure
from bench.corpus import Corpus, Shape
from bench.measure import MIB, Cost
from bench.peers.backlog import Backlog
from bench.peers.programs import fastship_command
from bench.servers import Nginx, Place, Receiver, ServerMissing
from fastship.episode import ARTIFACT_SUFFIX

NEAR, FAR = "198.18.0.1", "198.18.0.2"
QUEUE_MS = 50
"""What the shaper holds at most: of the order of what a router does, and enough for TCP to fill the link."""
GOODPUT_S = 2.0
_BURST_S = 0.002  # tbf needs what comes between two of its ticks; more would pass unshaped
_SMALLEST_BURST_BYTES = 16 << 10
_MORE_PATHS = ":/usr/sbin:/sbin"

# Its standard input ends when nobody holds the other end of the pipe any more, however that came about.
_REMOVE = """read -r _
for each in "$@"; do
  ip netns pids "$each" | while read -r pid; do kill -KILL "$pid"; done
  ip netns del "$each"
done 2>/dev/null"""


class LinkMissing(Exception):
    """No link can be made here; says why."""


class Link:
    """``with Link("100mbit") as link: ...``. Raises `LinkMissing` where namespaces cannot be made."""

    _count = itertools.count()

    def __init__(self, rate: str) -> None:
        self.rate_bits_per_s = parse_rate(rate)
        name = f"fastship-{os.getpid()}-{next(self._count)}"
        self._names = (f"{name}-near", f"{name}-far")
        self.near, self.far = (
            Place(address, ("ip", "netns", "exec", name))
            for address, name in zip((NEAR, FAR), self._names, strict=True)
        )

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise LinkMissing("a shaped link needs network namespaces, and these need root")
        for program in ("ip", "tc"):
            if shutil.which(program, path=os.environ.get("PATH", "") + _MORE_PATHS) is None:
                raise LinkMissing(f"{program} is not installed; on Debian and Ubuntu: apt install iproute2")
        command = ["sh", "-c", _REMOVE, "remove", *self._names]
        self._remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        near, far = self._names
        for name in self._names:
            _do("ip", "netns", "add", name)
        _do("ip", "link", "add", "wire", "netns", near, "type", "veth", "peer", "name", "wire", "netns", far)
        burst = max(_SMALLEST_BURST_BYTES, int(self.rate_bits_per_s / 8 * _BURST_S))
        shaped = ["rate", f"{self.rate_bits_per_s}bit", "burst", str(burst), "latency", f"{QUEUE_MS}ms"]
        for name, address in ((near, NEAR), (far, FAR)):
            _do("ip", "-n", name, "addr", "add", f"{address}/30", "dev", "wire")
            _do("ip", "-n", name, "link", "set", "lo", "up")
            _do("ip", "-n", name, "link", "set", "wire", "up")
            _do("tc", "-n", name, "qdisc", "add", "dev", "wire", "root", "tbf", *shaped)

    def _remove(self) -> None:
        assert self._remover.stdin is not None
        self._remover.stdin.close()
        self._remover.wait()

    def goodput_bits_per_s(self, directory: Path) -> float:
        """What ``curl -T`` of random bytes reaches over it, within 10 % of the rate. Takes some seconds."""
        payload = directory / "random"
        payload.write_bytes(os.urandom(int(self.rate_bits_per_s / 8 * GOODPUT_S)))
        command = [*self.far.prefix, sys.executable, "-m", "bench.discard", FAR]
        checkout = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=checkout) as sink:
            try:
                assert sink.stdout is not None
                url = sink.stdout.readline().decode().strip()
                ask = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code} %{time_total}", "-T", str(payload), url]
                _, out = measure.run([*self.near.prefix, *ask])
            finally:
                sink.terminate()
        code, seconds = out.split()
        assert code == b"201", out
        goodput = payload.stat().st_size * 8 / float(seconds)
        payload.unlink()
        assert 0.9 < goodput / self.rate_bits_per_s < 1.1, f"{goodput / 1e6:.2f} Mbit/s over {self.rate_bits_per_s}"
        return goodput


def parse_rate(text: str) -> int:
    """``100mbit`` -> 100,000,000, as tc(8) writes rates. Raises ``ValueError``."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(k|m|g)bit", text)
    if not match:
        raise ValueError(f"{text}: not a rate like 10mbit or 1gbit")
    return int(float(match[1]) * {"k": 10**3, "m": 10**6, "g": 10**9}[match[2]])


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise LinkMissing(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")


# --- a backlog over it -------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What a rate is measured with: some 15 to 40 s at the best level on two cores."""

    episodes: int
    episode_bytes: int


LOADS = {"10mbit": Load(10, 10_000_000), "100mbit": Load(30, 32_000_000), "1gbit": Load(60, 100_000_000)}
FILE_BYTES = 2_000_000


class Drained(NamedTuple):
    """``seconds`` is the command's own word, without its start; ``cost`` is of the whole command."""

    level: str
    seconds: float
    cost: Cost
    sink_cpu_s: float
    raw_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.stored_bytes

    def link_used(self, rate_bits_per_s: int) -> float:
        """Of its nominal rate, over the whole time; the fields of TCP and IP leave 0.956 for artifacts."""
        return self.stored_bytes * 8 / self.seconds / rate_bits_per_s

    def line(self, rate_bits_per_s: int) -> str:
        wall_s, cpu_s, peak_bytes = self.cost
        used = self.link_used(rate_bits_per_s)
        return (
            f"level {self.level:>4}: {self.seconds:7.2f} s ({wall_s:6.2f} whole), "
            f"{self.raw_bytes / 1e6 / self.seconds:6.1f} MB/s raw, ratio {self.ratio:5.2f}, link {used:4.0%}, "
            f"CPU {cpu_s:6.1f} s + sink {self.sink_cpu_s:5.1f} s, peak {peak_bytes / MIB:4.0f} MiB"
        )


def make_backlog(spool: Path, load: Load, corpus: Corpus) -> Backlog:
    shape = Shape(load.episodes, load.episode_bytes, min(FILE_BYTES, load.episode_bytes))
    corpus.write_episodes(spool / "episodes", shape, "link")
    return Backlog(spool, load.episodes, shape.total_bytes)


@contextlib.contextmanager
def piece_of(whole: Backlog, episodes: int) -> Iterator[Backlog]:
    """The first episodes of a backlog as one of their own, while the block lasts; the whole if it has no more."""
    if episodes >= whole.episode_count:
        yield whole
        return
    piece = Backlog(whole.spool.with_name(whole.spool.name + "-piece"), episodes, 0)
    piece.episodes.mkdir(parents=True)
    names = sorted(os.listdir(whole.episodes))[:episodes]
    for name in names:
        os.rename(whole.episodes / name, piece.episodes / name)
    try:
        yield piece._replace(raw_bytes=whole.raw_bytes * episodes // whole.episode_count)
    finally:
        for name in names:
            os.rename(piece.episodes / name, whole.episodes / name)
        shutil.rmtree(piece.spool)


def drain(link: Link, backlog: Backlog, sink: Nginx | Receiver, level: str, *values: str) -> Drained:
    """``fastship once`` over the link; what the sink has then is checked, and the backlog put back."""
    sink.empty()
    os.sync()  # what earlier runs left to be written is not this one's cost
    if isinstance(sink, Nginx):
        values = ("destination.proof=status", *values)
    before = sink.cpu_s()
    command = fastship_command(backlog, sink.url, f"pack.level={level}", *values)
    cost, out = measure.run([*link.near.prefix, *command])
    sink_cpu_s = sink.cpu_s() - before
    report = json.loads(out)
    assert report["shipped"] == backlog.episode_count, report
    backlog.restore()
    check_stored(sink, backlog)
    return Drained(level, report["seconds"], cost, sink_cpu_s, backlog.raw_bytes, sink.stored_bytes())


def check_stored(sink: Nginx | Receiver, backlog: Backlog) -> None:
    """Every episode is there, and the first and the last byte for byte: their files are compared with the backlog's."""
    artifacts = sink.artifacts()
    assert len(artifacts) == backlog.episode_count, f"{len(artifacts)} artifacts of {backlog.episode_count}"
    for path in {artifacts[0], artifacts[-1]}:
        with (
            open(path, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            found = 0
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                stored = hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]
                with open(backlog.episodes / member.name, "rb") as original:
                    assert stored == hashlib.file_digest(original, "sha256").digest(), member.name
                found += 1
        assert found == len(os.listdir(backlog.episodes / path.name.removesuffix(ARTIFACT_SUFFIX)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Drain a backlog over a link of a known rate, once a level.")
    parser.add_argument("--rate", default="100mbit", help="10mbit, 100mbit, 1gbit: as tc(8) writes it")
    parser.add_argument("--level", default="3", help="pack.level; several with commas")
    parser.add_argument("--mb", type=int, help="of telemetry; default: what the rate is measured with")
    parser.add_argument("--episodes", type=int, help="that it comes in")
    parser.add_argument("--sink", choices=["receiver", "nginx"], default="receiver")
    parser.add_argument("--verify", choices=["artifact", "content"], default="artifact", help="by the receiver")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the shipper")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the data goes")
    arguments = parser.parse_args()
    usual = LOADS.get(arguments.rate, LOADS["100mbit"])
    episodes = arguments.episodes or usual.episodes
    total_bytes = (arguments.mb * 10**6) if arguments.mb else usual.episodes * usual.episode_bytes
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="fastship-links-") as name:
        work = Path(name)
        backlog = make_backlog(work / "spool", Load(episodes, total_bytes // episodes), Corpus())
        try:
            with Link(arguments.rate) as link:
                print(f"{arguments.rate}: curl reaches {link.goodput_bits_per_s(work) / 1e6:.2f} Mbit/s", flush=True)
                with start_sink(link, work / "sink", arguments.sink, arguments.verify) as sink:
                    for level in arguments.level.split(","):
                        done = drain(link, backlog, sink, level, *arguments.set)
                        print(done.line(link.rate_bits_per_s), flush=True)
        except (LinkMissing, ServerMissing) as why:
            sys.exit(str(why))


def start_sink(link: Link, root: Path, kind: str, verify: str = "artifact") -> Nginx | Receiver:
    """A server at the far end."""
    if kind == "nginx":
        return Nginx(root, place=link.far)
    options = ("--set", "receiver.reserve_bytes=0", "--set", f"receiver.verify={verify}")
    return Receiver(root, *options, place=link.far)


if __name__ == "__main__":
    main()
