"""Seeded telemetry to measure with: the same bytes from the same arguments, on any host.

The mix, by bytes: JSON lines 40 %, CSV 25 %, arrays of doubles 20 %, text logs 15 %. A pool of some MiB a kind is made
row by row and used again and again, each time in another permutation of its digits (of all byte values for doubles).
To zstd a permuted text is as compressible as the original, but no two passes share long matches: neither a
deduplicating program nor long-distance matching gains what real telemetry would not give it.

Imports nothing of fastship; `fastship.tune.episodes` and the benchmarks import it.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

POOL_BYTES = 24 << 20  # more than a frame and than the window of every level: no compressor sees the repetition
_PERIOD = 20  # files after which the mix repeats
_PIECE_BYTES = 1 << 20
_MARKER = "done.marker"


def _json_rows(rng: random.Random) -> Iterator[bytes]:
    time_ms, load = 1_700_000_000_000, 0.4
    while True:
        time_ms += rng.randint(95, 105)
        load = min(max(load + rng.gauss(0, 0.03), 0.0), 1.0)
        yield b'{"t":%d,"host":"lab-%02d","cpu":%.4f,"rss":%d,"proc":"%b","state":"%b","io":{"r":%d,"w":%d}}\n' % (
            time_ms,
            rng.randrange(12),
            load,
            rng.randrange(1 << 31),
            rng.choice((b"python3", b"sshd", b"postgres", b"recorder", b"kworker/0:1")),
            rng.choice((b"R", b"S", b"S", b"S", b"D")),
            rng.randrange(5000),
            rng.randrange(90000),
        )


def _csv_rows(rng: random.Random) -> Iterator[bytes]:
    yield b"t,ax,ay,az,gx,gy,gz,temp\n"
    time_s, heat = 0.0, 35.0
    while True:
        time_s += 0.005
        heat += rng.gauss(0, 0.01)
        axes = b",".join(b"%.5f" % (math.sin(time_s * (i + 1)) + rng.gauss(0, 0.02)) for i in range(6))
        yield b"%.3f,%b,%.2f\n" % (time_s, axes, heat)


def _float_rows(rng: random.Random) -> Iterator[bytes]:
    level = 0.0
    while True:
        row = array("d")
        for _ in range(512):
            level += rng.gauss(0, 0.5)
            row.append(round(level, 3))
        yield row.tobytes()


def _log_rows(rng: random.Random) -> Iterator[bytes]:
    second = 0
    while True:
        second += rng.randrange(3)
        yield b"2026-11-%02d %02d:%02d:%02d %b [%b:%d] %b id=%08x took %d us\n" % (
            1 + second // 86400 % 28,
            second // 3600 % 24,
            second // 60 % 60,
            second % 60,
            rng.choice((b"INFO", b"INFO", b"INFO", b"DEBUG", b"WARNING", b"ERROR")),
            rng.choice((b"scheduler", b"camera.capture", b"bus.can0", b"storage")),
            rng.randrange(400),
            rng.choice((b"frame written", b"retrying after timeout", b"buffer flushed", b"peer connected")),
            rng.getrandbits(32),
            rng.randrange(100000),
        )


class _Kind(NamedTuple):
    share: int  # of _PERIOD files of the mix
    rows: Callable[[random.Random], Iterator[bytes]]
    permuted: bytes  # the byte values that change places from one use of the pool to the next


_DIGITS = b"0123456789"
_KINDS = {
    "jsonl": _Kind(8, _json_rows, _DIGITS),
    "csv": _Kind(5, _csv_rows, _DIGITS),
    "f64": _Kind(4, _float_rows, bytes(range(256))),
    "log": _Kind(3, _log_rows, _DIGITS),
}
VIDEO = "h264"  # random bytes: what a camera's encoder leaves to a compressor


class Telemetry:
    """The pools of one seed, each made when it is first needed (some seconds); any number of episodes from them."""

    def __init__(self, seed: int = 1, pool_bytes: int = POOL_BYTES) -> None:
        self._seed = seed
        self._pool_bytes = pool_bytes
        self._pools: dict[str, bytes] = {}
        self._order = [name for name, kind in _KINDS.items() for _ in range(kind.share)]
        random.Random(seed).shuffle(self._order)
        assert len(self._order) == _PERIOD

    def write_episode(self, path: Path, total_bytes: int, file_bytes: int, number: int = 0, *, kind: str = "") -> int:
        """Make the episode ``path`` (marker last) of files of ``file_bytes``; ``number`` varies it. Bytes written."""
        path.mkdir(parents=True)
        written = count = 0
        while written < total_bytes:
            name = kind or self._order[(number + count) % _PERIOD]
            size = min(file_bytes, total_bytes - written)
            rng = random.Random(f"{self._seed} {name} {number} {count}")
            with open(path / f"{count:06d}.{name}", "xb", buffering=0) as file:
                for piece in self._pieces(name, size, rng):
                    file.write(piece)
            written += size
            count += 1
        (path / _MARKER).touch()
        return written

    def _pieces(self, kind: str, size: int, rng: random.Random) -> Iterator[bytes]:
        """``size`` bytes of a kind, from a random place of its pool on."""
        if kind == VIDEO:
            while size:
                piece = rng.randbytes(min(size, _PIECE_BYTES))
                yield piece
                size -= len(piece)
            return
        pool, permuted = self._pool(kind), _KINDS[kind].permuted
        at = rng.randrange(len(pool))
        table = _permutation(permuted, rng)
        while size:
            piece = pool[at : at + min(size, _PIECE_BYTES)].translate(table)
            yield piece
            size -= len(piece)
            at += len(piece)
            if at == len(pool):
                at, table = 0, _permutation(permuted, rng)

    def _pool(self, kind: str) -> bytes:
        if kind not in self._pools:
            pool = bytearray()
            for row in _KINDS[kind].rows(random.Random(f"{self._seed} {kind}")):
                pool += row
                if len(pool) >= self._pool_bytes:
                    break
            self._pools[kind] = bytes(pool[: self._pool_bytes])
        return self._pools[kind]


def _permutation(values: bytes, rng: random.Random) -> bytes:
    shuffled = list(values)
    rng.shuffle(shuffled)
    return bytes.maketrans(values, bytes(shuffled))
