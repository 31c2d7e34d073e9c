"""Reading artifacts: ours and stock ones, whole and in part; nothing a file says is believed."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import tarfile
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.errors import ArtifactError
from fastship.frames import ArtifactReader, ArtifactWriter, FramePool, Kind, reader, seektable

FRAME = 8192


def tar_stream() -> bytes:
    rng = random.Random(3)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(40):
            info = tarfile.TarInfo(f"ep/{number:03d}")
            info.size = rng.randrange(4000)
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size // 2) * 2 + bytes(info.size % 2)))
    return out.getvalue()


CONTENT = tar_stream()


def artifact(content: bytes = CONTENT, frame_bytes: int = FRAME) -> bytes:
    out = io.BytesIO()
    with FramePool(1) as pool, ArtifactWriter(pool, out.write, level=3, frame_bytes=frame_bytes) as writer:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for info in tar:
                writer.index.add(info.offset, info.size, 0, 0, 0, info.mode, Kind.FILE, info.name.encode(), b"")
        while len(content) >= frame_bytes:
            writer.buffer[:] = content[:frame_bytes]
            content = content[frame_bytes:]
            writer.submit(frame_bytes)
        writer.buffer[: len(content)] = content
        writer.finish(len(content))
    return out.getvalue()


ARTIFACT = artifact()


def over(data: bytes) -> ArtifactReader:
    return ArtifactReader(lambda offset, length: data[offset : offset + length], len(data))


def whole(data: bytes, threads: int = 1) -> bytes:
    return b"".join(over(data).stream(threads))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_stream_is_the_tar_stream(threads: int) -> None:
    assert whole(ARTIFACT, threads) == CONTENT


def test_what_is_known_without_reading() -> None:
    artifact_reader = over(ARTIFACT)
    assert artifact_reader.frames == -(-len(CONTENT) // FRAME)
    assert artifact_reader.content_bytes == len(CONTENT)
    assert [member.name for member in artifact_reader.members()] == [b"ep/%03d" % number for number in range(40)]


@given(st.integers(0, len(CONTENT) + 10), st.integers(0, 3 * FRAME), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_any_part_is_read(start: int, length: int, threads: int) -> None:
    assert b"".join(over(ARTIFACT).stream(threads, start=start, end=start + length)) == CONTENT[start : start + length]
    stock = zstandard.ZstdCompressor().compress(CONTENT)
    assert over(stock).read(start, length) == CONTENT[start : start + length]


def test_a_part_decompresses_only_its_frames() -> None:
    asked: list[tuple[int, int]] = []

    def read_at(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return ARTIFACT[offset : offset + length]

    artifact_reader = ArtifactReader(read_at, len(ARTIFACT))
    asked.clear()
    assert artifact_reader.read(3 * FRAME + 10, 20) == CONTENT[3 * FRAME + 10 : 3 * FRAME + 30]
    assert artifact_reader.read(3 * FRAME + 100, 20) == CONTENT[3 * FRAME + 100 : 3 * FRAME + 120]
    assert len(asked) == 1
    assert asked[0][1] <= FRAME


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_remembered_of_a_part_comes_in_its_place(threads: int) -> None:
    artifact_reader = over(ARTIFACT)
    for number in range(len(CONTENT) // FRAME + 1):
        part = artifact_reader.read(number * FRAME, FRAME + 100)
        assert part == CONTENT[number * FRAME : (number + 1) * FRAME + 100]
        assert b"".join(artifact_reader.stream(threads)) == CONTENT


def test_stock_zstd_reads_it() -> None:
    done = subprocess.run(["zstd", "-d", "-c"], input=ARTIFACT, capture_output=True, check=True)
    assert done.stdout == CONTENT
    assert subprocess.run(["zstd", "-t"], input=ARTIFACT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "options", [["-3"], ["-3", "--no-content-size"], ["--long=27", "-1"], ["-1", "--no-check"], ["-T2", "-B512K"]]
)
def test_stock_files_are_read(options: list[str]) -> None:
    data = subprocess.run(["zstd", "-c", *options], input=CONTENT * 20, capture_output=True, check=True).stdout
    artifact_reader = over(data)
    assert artifact_reader.frames is None
    assert b"".join(artifact_reader.stream(2)) == CONTENT * 20
    assert sum(1 for _ in artifact_reader.members()) == 40
    with pytest.raises(ArtifactError):
        whole(data[: len(data) // 2])


def test_frames_of_several_writers_one_after_the_other_are_read() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"note"
    data = b"".join([skippable, compressor.compress(CONTENT[:999]), skippable, compressor.compress(CONTENT[999:])])
    assert whole(data) == CONTENT
    assert whole(data + skippable) == CONTENT
    for cut in (1, 5, 10):
        with pytest.raises(ArtifactError):
            whole((data + skippable)[:-cut])
    with pytest.raises(ArtifactError):
        whole(data + b"trailing junk")


@given(st.integers(1, len(ARTIFACT) - 1))
@settings(max_examples=150, deadline=None)
def test_a_cut_is_noticed_unless_it_leaves_whole_frames(cut: int) -> None:
    try:
        got = whole(ARTIFACT[:cut])
    except ArtifactError:
        return
    # The tail (index and seek table) may be missing: then it is a stock file whose frames are all there.
    edges = over(ARTIFACT).table
    assert edges is not None
    assert cut in edges.compressed_offsets
    assert got == CONTENT[: len(got)]


@pytest.mark.parametrize("checksum", [False, True])
def test_a_cut_within_bytes_that_do_not_compress_is_noticed(checksum: bool) -> None:
    """zstd keeps them as they are, and takes whatever follows a cut for the rest of them."""
    stock = zstandard.ZstdCompressor(write_checksum=checksum).compress(random.Random(1).randbytes(200_000))
    assert len(stock) > 200_000
    for cut in [*range(1, len(stock), 499), *range(len(stock) - 2000, len(stock))]:
        with pytest.raises(ArtifactError):
            whole(stock[:cut])


@given(st.integers(0, len(ARTIFACT) - 1), st.integers(0, 7), st.integers(1, 2))
@settings(max_examples=300, deadline=None)
def test_a_flip_anywhere_is_noticed_or_changes_nothing(at: int, bit: int, threads: int) -> None:
    bad = bytearray(ARTIFACT)
    bad[at] ^= 1 << bit
    try:
        artifact_reader = over(bytes(bad))
        got = b"".join(artifact_reader.stream(threads))
        names = [member.name for member in artifact_reader.members()]
    except ArtifactError:
        return
    assert got == CONTENT
    assert len(names) == 40


@given(st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(ArtifactError):
        whole(junk)


def table_over(frames: list[tuple[bytes, int]]) -> bytes:
    entries = array("I", [size for frame, content in frames for size in (len(frame), content)])
    return b"".join(frame for frame, _ in frames) + seektable.encode(entries)


def test_a_seek_table_that_lies_is_refused() -> None:
    good = zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT[:5000])
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT[:5000])
    assert whole(table_over([(good, 5000)])) == CONTENT[:5000]
    assert whole(table_over([(streamed, 5000)])) == CONTENT[:5000]
    for lie in (0, 1, 4999, 5001, 1 << 30):
        for frame in (good, streamed):
            with pytest.raises(ArtifactError):
                whole(table_over([(frame, lie)]))
    with pytest.raises(ArtifactError):  # two frames in one entry: what zstd -d gives would not be what we give
        whole(table_over([(good + good, 5000)]))
    with pytest.raises(ArtifactError):
        whole(table_over([(b"x" + good, 5000)]))


def test_large_frames_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WHOLE_FRAME_BYTES", 10_000)
    monkeypatch.setattr(reader, "_PIECE_BYTES", 1000)
    data = artifact(frame_bytes=16384)
    pieces = list(over(data).stream(3))
    assert b"".join(pieces) == CONTENT
    assert max(len(piece) for piece in pieces[:10]) <= 2000
    for lie in (16383, 16385):
        frame = zstandard.ZstdCompressor().compress(CONTENT[:16384])
        with pytest.raises(ArtifactError):
            whole(table_over([(frame, lie)]))


def test_a_window_over_128_mib_is_refused_with_the_way_out() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(CONTENT) + compressor.flush()
    with pytest.raises(ArtifactError) as caught:
        whole(data)
    assert "--long=31" in caught.value.remedy


def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ArtifactError, match=str(path)), ArtifactReader.open(path) as artifact_reader:
            list(artifact_reader.stream())
    (tmp_path / "empty").touch()
    with pytest.raises(ArtifactError), ArtifactReader.open(tmp_path / "empty") as artifact_reader:
        list(artifact_reader.stream())


def test_no_thread_is_started_for_the_one_frame_that_most_artifacts_have() -> None:
    single = artifact(CONTENT, len(CONTENT) + 1)
    assert (over(single).frames, over(single).has_index) == (1, True)
    before = threading.active_count()
    stream = over(single).stream(3)
    assert next(stream) == CONTENT
    assert threading.active_count() == before
    assert list(stream) == []


@pytest.mark.parametrize("most", [0, 1])
def test_where_the_system_has_no_thread_for_it_it_is_read_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == f"frames-read-{most}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert whole(artifact(), threads=3) == CONTENT


def test_a_stream_left_early_ends_its_threads() -> None:
    before = threading.active_count()
    stream: Iterator[bytes] = over(ARTIFACT).stream(3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_bombs_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """2 GiB of zeros: as one stock frame, and as one frame of 1 GiB behind a seek table."""
    whole_gib = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 30)
    gib = b"".join(whole_gib.compress(bytes(1 << 20)) for _ in range(1024)) + whole_gib.flush()
    (tmp_path / "stock").write_bytes(gib + gib)
    (tmp_path / "table").write_bytes(table_over([(gib, 1 << 30)]))
    script = """
import sys
def peak_kib():  # not ru_maxrss: a process started by vfork begins with its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
from fastship.frames import ArtifactReader
with ArtifactReader.open(sys.argv[1]) as reader:
    before = peak_kib()
    print(sum(len(piece) for piece in reader.stream(4)))
print((peak_kib() - before) // 1024)
"""
    for name, length in (("stock", 2 << 30), ("table", 1 << 30)):
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        total, grown_mib = map(int, done.stdout.split())
        assert total == length
        assert grown_mib < 64
