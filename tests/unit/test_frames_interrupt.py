"""Ctrl-C at any instruction of packing and reading: it surfaces, nothing hangs, and the next artifact is right.

Each runs in a process of its own: an interrupt may also fall into pytest's own code, or into a callback of the
interpreter that can only print it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from fastship.frames import ArtifactReader, ArtifactWriter, FramePool

FRAME_BYTES = 4096
CONTENT = bytes(range(256)) * 16 * 60
TRY_S = 2.0


def interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def interrupted_after(seconds: float, work: Callable[[], object]) -> None:
    """``KeyboardInterrupt`` in ``work``, unless it is over by then."""
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)


def packed(pool: FramePool) -> bytes:
    out = bytearray()
    with pool.open(level=1, frame_bytes=FRAME_BYTES, commit=lambda frame, _: out.extend(frame)) as stream:
        for at in range(0, len(CONTENT), FRAME_BYTES):
            stream.buffer[:] = CONTENT[at : at + FRAME_BYTES]
            stream.submit(FRAME_BYTES)
        stream.finish(0)
    return bytes(out)


def at_every_time(work: Callable[[], object], check: Callable[[], object]) -> int:
    """Interrupt ``work`` a little later each time; ``check`` after each. How often that was."""
    began = time.monotonic()
    work()
    lasts = time.monotonic() - began
    end, tries = time.monotonic() + TRY_S, 0
    while time.monotonic() < end or tries < 10:
        tries += 1
        with contextlib.suppress(KeyboardInterrupt):  # it fell between the handlers
            interrupted_after(max(1e-5, lasts * (tries * 0.6180339887 % 1)), work)
        check()
    return tries


def interrupt_pool() -> None:
    with FramePool(1) as alone:
        expected = packed(alone)
    pools = [FramePool(3)]

    def check() -> None:
        if pools[0]._stream is not None:  # it fell into the clearing up
            pools[0] = FramePool(3)
        assert packed(pools[0]) == expected

    assert at_every_time(lambda: packed(pools[0]), check) >= 10
    pools[0].close()


def interrupt_reader() -> None:
    out = bytearray()
    with FramePool(1) as pool, ArtifactWriter(pool, out.extend, level=1, frame_bytes=FRAME_BYTES) as writer:
        for at in range(0, len(CONTENT), FRAME_BYTES):
            writer.buffer[:] = CONTENT[at : at + FRAME_BYTES]
            writer.submit(FRAME_BYTES)
        writer.finish(0)
    artifact = bytes(out)
    reader = ArtifactReader(lambda offset, length: artifact[offset : offset + length], len(artifact))

    def read() -> bytes:
        return b"".join(reader.stream(3))

    def check() -> None:
        assert read() == CONTENT

    assert at_every_time(read, check) >= 10


@pytest.mark.parametrize("what", ["pool", "reader"])
def test_an_interrupt_at_any_time_is_outlived(what: str) -> None:
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    {"pool": interrupt_pool, "reader": interrupt_reader}[sys.argv[1]]()
