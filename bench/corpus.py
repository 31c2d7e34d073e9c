"""Seeded telemetry to measure with: the same bytes from the same arguments, on any host.

A mix, by bytes: JSON lines 40 %, CSV 25 %, arrays of doubles 20 %, text logs 15 %. A pool of 24 MiB a kind is made row
by row and repeated: more than a frame apart, so no compressor at work here sees the repetition.

    python bench/corpus.py DIR --bytes 1GB --file-bytes 64MB     makes one episode DIR
"""

from __future__ import annotations

import argparse
import math
import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

POOL_BYTES = 24 << 20
_PERIOD = 20  # files after which the mix repeats


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


_KINDS: tuple[tuple[str, int, Callable[[random.Random], Iterator[bytes]]], ...] = (
    ("jsonl", 8, _json_rows),
    ("csv", 5, _csv_rows),
    ("f64", 4, _float_rows),
    ("log", 3, _log_rows),
)


class Corpus:
    """The pools of one seed; ``write_episode`` may be called as often as needed. Making one takes some seconds."""

    def __init__(self, seed: int = 1, pool_bytes: int = POOL_BYTES) -> None:
        self._pools = {}
        for name, _, rows in _KINDS:
            pool = bytearray()
            for row in rows(random.Random(f"{seed} {name}")):
                pool += row
                if len(pool) >= pool_bytes:
                    break
            self._pools[name] = bytes(pool[:pool_bytes])
        self._order = [name for name, share, _ in _KINDS for _ in range(share)]
        random.Random(seed).shuffle(self._order)
        assert len(self._order) == _PERIOD

    def write_episode(self, path: Path, total_bytes: int, file_bytes: int, number: int = 0) -> int:
        """Make the episode ``path`` (marker last) of files of ``file_bytes``; ``number`` varies it. Bytes written."""
        path.mkdir(parents=True)
        written = count = 0
        while written < total_bytes:
            name = self._order[count % _PERIOD]
            size = min(file_bytes, total_bytes - written)
            self._write_file(path / f"{count:06d}.{name}", name, size, (number * 7919 + count) * 104729)
            written += size
            count += 1
        (path / "done.marker").touch()
        return written

    def _write_file(self, path: Path, kind: str, size: int, offset: int) -> None:
        pool = memoryview(self._pools[kind])
        with open(path, "xb", buffering=0) as file:
            while size:
                at = offset % len(pool)
                piece = pool[at : at + min(size, len(pool) - at)]
                file.write(piece)
                size -= len(piece)
                offset += len(piece)


def _size(text: str) -> int:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise AssertionError


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make one episode of telemetry.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--bytes", default="256MB", type=_size)
    parser.add_argument("--file-bytes", default="16MB", type=_size)
    parser.add_argument("--seed", default=1, type=int)
    arguments = parser.parse_args()
    print(Corpus(arguments.seed).write_episode(arguments.path, arguments.bytes, arguments.file_bytes), "bytes")
