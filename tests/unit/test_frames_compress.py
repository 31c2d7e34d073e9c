"""The frame pool: the same frames in order for any number of threads, however it changes and whatever fails."""

from __future__ import annotations

import random
import threading
import time

import pytest
import zstandard

from fastship.frames import FramePool, compress
from fastship.frames.compress import FrameStream

FRAME = 64 << 10


def content(seed: int, length: int) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(200)]
    return b"".join(rng.choices(words, k=length // 4))[:length]


def run(pool: FramePool, data: bytes, level: int = 3, frame_bytes: int = FRAME) -> list[tuple[bytes, int]]:
    out: list[tuple[bytes, int]] = []
    with pool.open(
        level=level, frame_bytes=frame_bytes, commit=lambda frame, used: out.append((frame, used))
    ) as stream:
        feed(stream, data, frame_bytes)
    return out


def feed(stream: FrameStream, data: bytes, frame_bytes: int) -> None:
    while len(data) >= frame_bytes:
        stream.buffer[:frame_bytes] = data[:frame_bytes]
        data = data[frame_bytes:]
        stream.submit(frame_bytes)
    stream.buffer[: len(data)] = data
    stream.finish(len(data))


DATA = content(1, FRAME * 11 + 12345)
with FramePool(1) as _pool:
    EXPECTED = run(_pool, DATA)


def test_frames_are_independent_sized_and_checked() -> None:
    assert [used for _, used in EXPECTED] == [FRAME] * 11 + [12345]
    at = 0
    for frame, used in EXPECTED:
        parameters = zstandard.get_frame_parameters(frame)
        assert parameters.content_size == used
        assert parameters.has_checksum
        assert zstandard.ZstdDecompressor().decompress(frame) == DATA[at : at + used]
        at += used


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_same_frames_come_whatever_the_threads(threads: int) -> None:
    with FramePool(threads) as pool:
        assert run(pool, DATA) == EXPECTED
        assert run(pool, DATA) == EXPECTED


def test_the_same_frames_come_while_the_threads_change() -> None:
    stop = threading.Event()
    with FramePool(1) as pool:

        def change() -> None:
            rng = random.Random(2)
            while not stop.is_set():
                pool.set_threads(rng.randrange(0, 5))

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(10):
                assert run(pool, DATA) == EXPECTED
        finally:
            stop.set()
            changer.join()


def test_a_change_takes_effect_at_the_next_frame() -> None:
    with FramePool(1) as pool, pool.open(level=1, frame_bytes=FRAME, commit=lambda *_: None) as stream:
        before = threading.active_count()
        stream.submit(FRAME)
        assert threading.active_count() == before
        pool.set_threads(3)
        stream.submit(FRAME)
        assert threading.active_count() == before + 3
        pool.set_threads(2)
        stream.submit(FRAME)
        stream.finish(0)
        assert pool.threads == 2


def test_an_artifact_of_one_frame_starts_no_thread() -> None:
    with FramePool(4) as pool:
        before = threading.active_count()
        assert len(run(pool, DATA[:1000])) == 1
        assert threading.active_count() == before


@pytest.mark.parametrize("most", [0, 1])
def test_where_the_system_has_no_thread_for_it_it_is_done_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == f"frames-{most}":
            raise RuntimeError("can't start new thread")
        start(thread)

    data = content(3, 10 * FRAME)
    with FramePool() as pool:
        expected = run(pool, data)
    monkeypatch.setattr(threading.Thread, "start", refused)
    with FramePool(threads=3) as pool:
        assert run(pool, data) == expected
        assert len(pool._threads) == most


def test_nothing_gives_no_frame() -> None:
    with FramePool(2) as pool:
        assert run(pool, b"") == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_whole_number_of_frames_has_no_empty_one(threads: int) -> None:
    with FramePool(threads) as pool:
        assert [used for _, used in run(pool, DATA[: 3 * FRAME])] == [FRAME] * 3


def test_levels_and_frame_sizes_may_alternate() -> None:
    with FramePool(2) as pool:
        small = run(pool, DATA, level=1, frame_bytes=4096)
        assert run(pool, DATA) == EXPECTED
        assert run(pool, DATA, level=1, frame_bytes=4096) == small


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_fault_in_a_compressor_surfaces_and_the_pool_goes_on(threads: int) -> None:
    with FramePool(threads) as pool:
        with pytest.raises(ValueError, match="no level 99"):  # the thread itself raises
            run(pool, DATA, level=99)
        assert run(pool, DATA) == EXPECTED


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_fault_in_commit_surfaces_and_the_pool_goes_on(threads: int, after: int) -> None:
    committed: list[bytes] = []

    def commit(frame: bytes, used: int) -> None:
        if len(committed) == after:
            raise OSError(28, "full")
        committed.append(frame)

    with FramePool(threads) as pool:
        with pytest.raises(OSError, match="full"), pool.open(level=3, frame_bytes=FRAME, commit=commit) as stream:
            feed(stream, DATA, FRAME)
        assert committed == [frame for frame, _ in EXPECTED[:after]]
        assert run(pool, DATA) == EXPECTED


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_may_be_left_at_any_frame(threads: int) -> None:
    with FramePool(threads) as pool:
        for frames in range(6):
            with pool.open(level=3, frame_bytes=FRAME, commit=lambda *_: None) as stream:
                for _ in range(frames):
                    stream.submit(FRAME)
        assert run(pool, DATA) == EXPECTED


def test_no_more_than_t_plus_2_buffers_are_used() -> None:
    with FramePool(3) as pool, pool.open(level=3, frame_bytes=FRAME, commit=lambda *_: None) as stream:
        seen = set()
        for _ in range(40):
            seen.add(id(stream.buffer.obj))
            stream.submit(FRAME)
        stream.finish(0)
    assert 1 < len(seen) <= 5


def test_one_artifact_at_a_time_and_none_after_the_end() -> None:
    pool = FramePool(1)
    with pool.open(level=1, frame_bytes=FRAME, commit=lambda *_: None), pytest.raises(RuntimeError):
        pool.open(level=1, frame_bytes=FRAME, commit=lambda *_: None)
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError):
        pool.open(level=1, frame_bytes=FRAME, commit=lambda *_: None)


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    pool = FramePool(3)
    run(pool, DATA)
    pool.set_threads(1)
    pool.close()
    assert threading.active_count() == before


def test_what_no_thread_has_begun_is_dropped_when_the_stream_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    gate = threading.Event()

    def run(_self: object, slot: object) -> None:
        begun.append(slot)
        assert gate.wait(30)

    monkeypatch.setattr(compress._Compressors, "run", run)
    with FramePool(2) as pool:
        stream = pool.open(level=1, frame_bytes=4096, commit=lambda *_: None)
        for _ in range(3):
            stream.submit(4096)
        while len(begun) < 2:
            time.sleep(0.001)
        threading.Timer(0.2, gate.set).start()
        stream.abort()
        assert len(begun) == 2


def test_an_interrupt_does_not_wait_for_what_is_being_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    gate = threading.Event()

    def run(_self: object, slot: object) -> None:
        begun.append(slot)
        gate.wait(60)

    monkeypatch.setattr(compress._Compressors, "run", run)

    def pack_and_interrupt() -> None:
        with FramePool(2) as pool, pool.open(level=1, frame_bytes=4096, commit=lambda *_: None) as stream:
            for _ in range(3):
                stream.submit(4096)
            while len(begun) < 2:
                time.sleep(0.001)
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            pack_and_interrupt()
        assert not any(slot.finished for slot in begun)  # type: ignore[attr-defined]
    finally:
        gate.set()
