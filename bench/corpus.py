"""The named shapes of episodes that the benchmarks measure with, of the wheel's seeded telemetry.

python -m bench.corpus DIR --bytes 1GB --file-bytes 64MB     one episode DIR of the mix
python -m bench.corpus DIR --shape small --scale 0.1         the episodes of a named shape below DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from fastship.tune.telemetry import VIDEO, Telemetry


class Shape(NamedTuple):
    """Episodes of ``episode_bytes`` in files of ``file_bytes``. A scale makes fewer of them, or smaller ones."""

    episodes: int
    episode_bytes: int
    file_bytes: int
    kind: str = ""  # of every file; "": the mix
    fewer: bool = False  # scaled by the count of episodes, not by their size

    def scaled(self, scale: float) -> Shape:
        if self.fewer:
            return self._replace(episodes=max(1, round(self.episodes * scale)))
        file_bytes = max(4096, round(self.file_bytes * scale))
        return self._replace(file_bytes=file_bytes, episode_bytes=file_bytes * (self.episode_bytes // self.file_bytes))

    @property
    def total_bytes(self) -> int:
        return self.episodes * self.episode_bytes


SHAPES = {
    "large": Shape(4, 256_000_000, 16_000_000),
    "small": Shape(200, 64 * 16_384, 16_384, fewer=True),
    "tiny": Shape(5000, 20_000, 5_000, fewer=True),
    "huge": Shape(1, 4_000_000_000, 4_000_000_000),
    "video": Shape(4, 256_000_000, 64_000_000, kind=VIDEO),
    "logs": Shape(20, 16_000_000, 4_000_000, kind="log"),
    "arrays": Shape(20, 16_000_000, 4_000_000, kind="f64"),
}
"""The shapes at scale 1. Real recordings are in ``bench.recordings``."""


class Corpus(Telemetry):
    """Any number of episodes and shapes of one seed."""

    def write_shape(self, directory: Path, name: str, scale: float = 1.0) -> list[Path]:
        """Make the episodes of shape ``name`` below ``directory``; their paths in name order."""
        return self.write_episodes(directory, SHAPES[name].scaled(scale), name)

    def write_episodes(self, directory: Path, shape: Shape, prefix: str) -> list[Path]:
        paths = [directory / f"{prefix}-{number:05d}" for number in range(shape.episodes)]
        for number, path in enumerate(paths):
            self.write_episode(path, shape.episode_bytes, shape.file_bytes, number, kind=shape.kind)
        return paths


def _size(text: str) -> int:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description="Make telemetry to measure with.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="the episodes of a shape instead of one episode")
    parser.add_argument("--scale", default=1.0, type=float)
    parser.add_argument("--bytes", default="256MB", type=_size)
    parser.add_argument("--file-bytes", default="16MB", type=_size)
    parser.add_argument("--seed", default=1, type=int)
    arguments = parser.parse_args()
    corpus = Corpus(arguments.seed)
    if arguments.shape:
        print(len(corpus.write_shape(arguments.path, arguments.shape, arguments.scale)), "episodes")
    else:
        print(corpus.write_episode(arguments.path, arguments.bytes, arguments.file_bytes), "bytes")


if __name__ == "__main__":
    main()
