"""A backlog of finished episodes in a spool, put back after each run as it was before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from bench import recordings
from bench.corpus import SHAPES, Corpus


class Backlog(NamedTuple):
    """``spool/episodes/*``, every one with its marker; ``raw_bytes`` is the sum of the files' sizes."""

    spool: Path
    episode_count: int
    raw_bytes: int

    @property
    def episodes(self) -> Path:
        return self.spool / "episodes"

    def warm(self) -> None:
        """Read everything once: some programs take what they read out of the page cache (borg does)."""
        for path in self.episodes.glob("**/*"):
            if path.is_file():
                path.read_bytes()

    def restore(self) -> None:
        """What a run moved to ``shipped/`` goes back, what else it made goes away."""
        shipped = self.spool / "shipped"
        if shipped.is_dir():
            for entry in os.scandir(shipped):
                os.rename(entry.path, self.episodes / entry.name)
        for entry in os.scandir(self.spool):
            if entry.name != "episodes":
                shutil.rmtree(entry.path)
        assert len(os.listdir(self.episodes)) == self.episode_count


def _measured(spool: Path) -> Backlog:
    sizes = [path.stat().st_size for path in spool.glob("episodes/**/*") if path.is_file()]
    return Backlog(spool, len(os.listdir(spool / "episodes")), sum(sizes))


def make(directory: Path, shape: str, scale: float, corpus: Corpus) -> Backlog:
    """A shape of the corpus, or a set of real recordings (which have no scale)."""
    spool = directory / shape
    if shape in recordings.SETS:
        recordings.write_recordings(spool / "episodes", shape)
    else:
        corpus.write_shape(spool / "episodes", shape, scale)
    return _measured(spool)


def sample(
    whole: Backlog, directory: Path, shape: str, corpus: Corpus, *, most_bytes: int, most_episodes: int
) -> Backlog:
    """A smaller piece of the same kind, for what is too slow for all of it; ``whole`` where that is small enough.

    Of many small episodes the first ones; of large ones a single one with as many, smaller files.
    """
    episode_bytes = whole.raw_bytes / whole.episode_count
    if whole.raw_bytes <= most_bytes and whole.episode_count <= most_episodes:
        return whole
    spool = directory / f"{shape}-{most_bytes}-{most_episodes}"
    if episode_bytes <= most_bytes:
        names = sorted(os.listdir(whole.episodes))[: max(1, min(most_episodes, int(most_bytes / episode_bytes)))]
        for name in names:  # not as hard links: those are packed as such
            shutil.copytree(whole.episodes / name, spool / "episodes" / name)
    else:
        shrunk = SHAPES[shape]._replace(episodes=1, fewer=False).scaled(most_bytes / SHAPES[shape].episode_bytes)
        corpus.write_episodes(spool / "episodes", shrunk, shape)
    return _measured(spool)
