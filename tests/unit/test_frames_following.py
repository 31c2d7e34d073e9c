"""Verification beside the writing: what it finds is what `verify_content` finds, or nothing."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from fastship.errors import ArtifactError
from fastship.frames import Bomb, Following, FramePool, following, verify, verify_content
from fastship.pack import PackOptions, pack

FRAME_BYTES = 1 << 16


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of some thirty frames, with member index and seek table."""
    episode = tmp_path_factory.mktemp("e") / "ep"
    episode.mkdir()
    generator = random.Random(1)
    for number in range(40):
        (episode / f"{number:03}").write_bytes(generator.randbytes(50_000))
    out = episode.parent / "a.tar.zst"
    with FramePool(1) as pool, open(out, "wb", buffering=0) as sink:
        pack(episode, sink, PackOptions(frame_bytes=FRAME_BYTES), pool)
    return out.read_bytes()


@pytest.fixture(autouse=True)
def _start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "START_BYTES", 1)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def follow(fd: int, pieces: list[bytes], threads: int = 1) -> Following:
    ended = threading.Event()
    followed = Following(threads=threads, place=lambda: ended.set)
    end = 0
    for piece in pieces:
        os.pwrite(fd, piece, end)
        end += len(piece)
        followed.advance(fd, end)
    return followed


def go_on() -> bool:
    return False


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("piece_bytes", [1 << 30, 100_000, 997])
def test_it_finds_what_is_found_in_the_whole(
    fd: int, tmp_path: Path, artifact: bytes, piece_bytes: int, threads: int
) -> None:
    pieces = [artifact[at : at + piece_bytes] for at in range(0, len(artifact), piece_bytes)]
    followed = follow(fd, pieces, threads)
    found = followed.finish(len(artifact), go_on)
    assert found == verify_content(tmp_path / "part")
    assert found is not None
    assert found.members == 41
    assert followed.finish(len(artifact), go_on) == found
    assert followed.finish(len(artifact) + 1, go_on) is None
    assert followed.is_under_way


def test_stock_frames_of_known_size_are_followed(fd: int, tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=False)
    data = b"".join(compressor.compress(bytes([number]) * 400_000) for number in range(5))
    found = follow(fd, [data]).finish(len(data), go_on)
    assert found is not None
    assert found == verify_content(tmp_path / "part")


def test_a_flip_in_any_place_is_never_passed_over(fd: int, tmp_path: Path, artifact: bytes) -> None:
    """Nothing is found, or what the whole file's verification finds, too (zstd has bits that mean nothing)."""
    generator = random.Random(2)
    places = {*generator.sample(range(len(artifact)), 60), *range(18), *range(len(artifact) - 700, len(artifact), 7)}
    for at in sorted(places):
        spoilt = bytearray(artifact)
        spoilt[at] ^= 1 << generator.randrange(8)
        os.ftruncate(fd, 0)
        found = follow(fd, [bytes(spoilt)]).finish(len(spoilt), go_on)
        if found is not None:
            assert found == verify_content(tmp_path / "part"), at


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_what_is_cut_or_longer_is_not_found(fd: int, tmp_path: Path, artifact: bytes, kept: float) -> None:
    cut = artifact[: int(len(artifact) * kept)]
    assert follow(fd, [cut]).finish(len(cut), go_on) is None
    os.ftruncate(fd, 0)
    frame = zstandard.ZstdCompressor().compress(b"hidden" * 1000)
    assert follow(fd, [frame + artifact]).finish(len(frame + artifact), go_on) is None
    with pytest.raises(ArtifactError):
        verify_content(tmp_path / "part")


def test_frames_that_fastship_does_not_write_are_left_to_the_end(fd: int) -> None:
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100_000)
    large = zstandard.ZstdCompressor().compress(bytes((32 << 20) + 1))
    claims = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60)
    empty = zstandard.ZstdCompressor().compress(b"")
    reserved = b"\x28\xb5\x2f\xfd\x20\x05" + (7 | 5 << 3).to_bytes(3, "little") + b"hello"
    for data in (unknown, large, claims + bytes(100), empty + unknown, reserved, b"plain text", b"\x28\xb5\x2f\xfd"):
        os.ftruncate(fd, 0)
        followed = follow(fd, [data])
        assert followed.finish(len(data), go_on) is None, data[:20]
        assert not followed.is_under_way


def test_crumbs_are_left_to_the_end(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MAX_FRAMES", 100)
    data = zstandard.ZstdCompressor().compress(b"x") * 101
    assert follow(fd, [data]).finish(len(data), go_on) is None


def test_it_ends_when_it_is_abandoned_stopped_or_left_alone(
    fd: int, artifact: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = artifact[: len(artifact) // 2]

    def ends(act: Callable[[Following], object]) -> None:
        ended = threading.Event()
        followed = Following(threads=2, place=lambda: ended.set)
        os.pwrite(fd, half, 0)
        followed.advance(fd, len(half))
        act(followed)
        assert ended.wait(30)
        assert followed.finish(len(half), go_on) is None

    def stop(followed: Following) -> None:
        with pytest.raises(InterruptedError):
            followed.finish(len(half), lambda: True)

    ends(Following.abandon)
    ends(stop)
    monkeypatch.setattr(following, "_IDLE_S", 0.05)
    ends(lambda _followed: time.sleep(0))


def no_descriptor(_fd: int) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("owner", "name", "refused"), [(os, "dup", no_descriptor), (threading.Thread, "start", no_thread)]
)
def test_where_the_system_gives_no_descriptor_or_thread_the_whole_is_left_to_the_end(
    fd: int, artifact: bytes, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, refused: object
) -> None:
    """What is written counts all the same, and who waits for the end does not wait for ever."""
    ended = threading.Event()
    followed = Following(threads=1, place=lambda: ended.set)
    os.pwrite(fd, artifact, 0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refused)
        followed.advance(fd, len(artifact) // 2)
    assert ended.is_set()
    assert not followed.is_under_way
    followed.advance(fd, len(artifact))
    looks = iter(range(5))
    assert followed.finish(len(artifact), lambda: next(looks, 5) == 5) is None


def test_more_members_than_there_may_be_are_left_to_the_end(
    fd: int, tmp_path: Path, artifact: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which refuses them: the verdict on an artifact must not depend on whether there was a place."""
    os.pwrite(fd, artifact, 0)
    for most, found in ((41, True), (40, False)):  # the files and their directory
        monkeypatch.setattr(verify, "_MEMBERS_FROM", most - len(artifact))
        followed = Following(threads=1, place=lambda: lambda: None, max_ratio=1000)
        followed.advance(fd, len(artifact))
        assert (followed.finish(len(artifact), go_on) is not None) == found
    with pytest.raises(Bomb, match="members"):
        verify_content(tmp_path / "part", max_ratio=1000)


def test_where_there_is_no_place_it_does_not_begin(fd: int, artifact: bytes) -> None:
    before = threading.active_count()
    os.pwrite(fd, artifact, 0)
    followed = Following(threads=1, place=lambda: None)
    followed.advance(fd, len(artifact))
    assert threading.active_count() == before
    assert not followed.is_under_way
    assert followed.finish(len(artifact), go_on) is None
