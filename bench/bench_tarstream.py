"""The tar stream alone: walk, headers, reading, BLAKE3; no zstd. Beside GNU tar and Python's ``tarfile`` into a sink.

Reaches into ``fastship.pack.stream``: nothing public makes the stream without compressing it. The digest must be the
one that `pack` gives.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.compare import SCALE, beside, pack_into, timed
from bench.corpus import Corpus
from fastship.frames import FramePool
from fastship.pack.stream import TarStream

pytestmark = pytest.mark.timeout(0)

FRAME_BYTES = 8 << 20


class NoIndex:
    def add(self, *_member: object) -> None:
        pass


class Discard:
    """What `TarStream` needs of a writer, without compressing or keeping anything."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(FRAME_BYTES))
        self.index = NoIndex()

    def submit(self, _used: int) -> memoryview:
        return self.buffer

    def finish(self, _used: int) -> None:
        pass


class Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def by_tarfile(episodes: list[Path]) -> None:
    for path in episodes:
        with tarfile.open(fileobj=Nowhere(), mode="w|") as tar:  # type: ignore[call-overload]
            tar.add(path, arcname=path.name)


@pytest.mark.parametrize("shape", ["large", "small", "tiny"])
def test_tar_stream(benchmark: Any, corpus: Corpus, work: Path, shape: str) -> None:
    episodes = corpus.write_shape(work / shape, shape, SCALE)
    with FramePool(1) as pool:
        expected = [pack_into(work, path, pool).manifest.content_blake3 for path in episodes]
    digests: list[str] = []
    raw = 0

    def stream() -> None:
        nonlocal raw
        digests.clear()
        raw = 0
        writer: Any = Discard()  # one buffer for all, as a worker's pool has
        for path in episodes:
            made = TarStream(writer, "keep", None)
            made.write_episode(path)
            digests.append(made.digest.hexdigest())
            raw += made.content_bytes

    stream()
    assert digests == expected
    # Through a pipe: GNU tar sees /dev/null as its output and then reads nothing.
    command = ["bash", "-c", 'tar -cf - -- "$@" | cat > /dev/null', "_", *(path.name for path in episodes)]
    beside(
        benchmark,
        timed(stream),
        {
            "gnu_tar": lambda: measure.run(command, cwd=episodes[0].parent)[0],
            "tarfile": timed(lambda: by_tarfile(episodes)),
        },
        raw_bytes=raw,
    )
    assert digests == expected
