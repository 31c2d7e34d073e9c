"""The digests alone: BLAKE3 and SHA-256 as packing calls them, beside ``sha256sum`` and a copy of the same bytes."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import blake3
import pytest

from bench import measure
from bench.compare import SCALE, beside, timed

pytestmark = pytest.mark.timeout(0)

PIECE_BYTES = 8 << 20


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_digest(benchmark: Any, work: Path, algorithm: str) -> None:
    data = random.Random(1).randbytes(round(1_000_000_000 * SCALE))
    path = work / "data"
    path.write_bytes(data)
    view = memoryview(data)
    pieces = [view[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    target = bytearray(PIECE_BYTES)
    found = ""

    def digest() -> None:
        nonlocal found
        made: Any = blake3.blake3() if algorithm == "blake3" else hashlib.sha256()
        for piece in pieces:
            made.update(piece)
        found = made.hexdigest()

    def copy() -> None:
        for piece in pieces:
            target[: len(piece)] = piece

    beside(
        benchmark,
        timed(digest),
        {"copy": timed(copy), "sha256sum": lambda: measure.run(["sha256sum", path])[0]},
        raw_bytes=len(data),
    )
    if algorithm == "sha256":
        assert found == measure.run(["sha256sum", path])[1].split()[0].decode()
    else:
        assert found == blake3.blake3(data).hexdigest()
