"""The tar stream does not depend on where frames end, and small and large files meet every edge of one."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastship.frames import ArtifactReader, ArtifactWriter, FramePool
from fastship.pack.stream import TarStream

# Around blocks and frames: 512 is a header, 4096 the smallest frame.
SIZES = sorted({max(0, edge + step) for edge in (0, 512, 3072, 3584, 4096, 8192, 12288) for step in (-1, 0, 1)})


def stream_of(episode: Path, frame_bytes: int) -> tuple[bytes, str, str]:
    out = io.BytesIO()
    with (
        FramePool(1) as pool,
        ArtifactWriter(pool, out.write, level=1, frame_bytes=frame_bytes) as writer,
    ):
        stream = TarStream(writer, "keep", None)
        stream.write_episode(episode)
    data = out.getvalue()
    reader = ArtifactReader(lambda offset, length: data[offset : offset + length], len(data))
    content = b"".join(reader.stream())
    assert stream.content_bytes == len(content)
    return content, stream.digest.hexdigest(), stream.layout.fingerprint()


@given(st.lists(st.sampled_from(SIZES), max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_stream_is_the_same_for_every_frame_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    episode = tmp_path_factory.mktemp("stream") / "ep"
    episode.mkdir()
    for number, size in enumerate(sizes):
        (episode / f"{number}").write_bytes(os.urandom(size))
    expected = stream_of(episode, 1 << 20)
    for frame_bytes in (4096, 4097, 5000, 8192):
        assert stream_of(episode, frame_bytes) == expected
    with tarfile.open(fileobj=io.BytesIO(expected[0]), errorlevel=2) as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is not None:
                assert file.read() == (episode.parent / info.name).read_bytes()
    assert expected[0].endswith(bytes(1024))


def test_stale_bytes_of_the_last_artifact_do_not_leak(tmp_path: Path) -> None:
    """Buffers are used again: the padding of a small file is zeros, not what was there."""
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "file").write_bytes(b"\xff" * 60_000)
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "file").write_bytes(b"x")
    contents = []
    with FramePool(1) as pool:
        for name in ("quiet", "noise", "quiet"):
            out = io.BytesIO()
            with ArtifactWriter(pool, out.write, level=1, frame_bytes=1 << 16) as writer:
                TarStream(writer, "keep", None).write_episode(tmp_path / name)
            contents.append(out.getvalue())
    assert contents[0] == contents[2]


def test_mtimes_are_floored_also_before_the_epoch(tmp_path: Path) -> None:
    episode = tmp_path / "ep"
    episode.mkdir()
    for name, nanoseconds in (("a", -1), ("b", 1_999_999_999), ("c", -1_500_000_000), ("d", 1_699_999_999_999_999_999)):
        (episode / name).touch()
        os.utime(episode / name, ns=(0, nanoseconds))
    content, _, _ = stream_of(episode, 8192)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [info.mtime for info in tar][1:] == [-1, 1, -2, 1_699_999_999]
