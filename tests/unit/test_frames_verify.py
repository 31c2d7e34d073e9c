"""Verification: the truth about sound artifacts, an error about all others, in bounded memory."""

from __future__ import annotations

import io
import resource
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from fastship.errors import ArtifactError
from fastship.frames import ArtifactWriter, Bomb, FramePool, Kind, verify, verify_content
from fastship.pack import PackOptions, pack


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    episode = tmp_path / "ep"
    episode.mkdir()
    for number in range(50):
        (episode / f"{number:03d}{'x' * (number * 4)}").write_bytes(bytes([number]) * number * 500)
    (episode / "é").symlink_to("nowhere")
    path = tmp_path / "ep.tar.zst"
    with FramePool(1) as pool, open(path, "wb") as sink:
        pack(episode, sink, PackOptions(frame_bytes=65536), pool)
    return path


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_it_finds_what_zstd_and_tarfile_find(packed: Path, threads: int) -> None:
    content = subprocess.run(["zstd", "-dc", packed], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = len(tar.getmembers())
    found = verify_content(packed, threads=threads)
    assert (found.blake3, found.bytes, found.members) == (blake3(content).hexdigest(), len(content), members)
    assert verify_content(packed, max_content_bytes=len(content)) == found


def test_stock_files_are_verified(packed: Path, tmp_path: Path) -> None:
    content = subprocess.run(["zstd", "-dc", packed], capture_output=True, check=True).stdout
    (tmp_path / "stock").write_bytes(zstandard.ZstdCompressor().compress(content))
    assert verify_content(tmp_path / "stock") == verify_content(packed)


def test_what_is_no_tar_has_no_members(tmp_path: Path) -> None:
    for content in (b"just text" * 1000, b"", b"x" * 511, bytes(100) + b"y" * 10_000):
        (tmp_path / "text.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
        found = verify_content(tmp_path / "text.zst")
        assert (found.blake3, found.bytes, found.members) == (blake3(content).hexdigest(), len(content), None)


def test_a_tar_cut_before_compression_has_no_members(packed: Path, tmp_path: Path) -> None:
    content = subprocess.run(["zstd", "-dc", packed], capture_output=True, check=True).stdout
    (tmp_path / "cut").write_bytes(zstandard.ZstdCompressor().compress(content[: len(content) // 2 + 7]))
    assert verify_content(tmp_path / "cut").members is None


def test_a_flip_in_any_region_is_an_error(packed: Path) -> None:
    good = packed.read_bytes()
    found = verify_content(packed)
    noticed = harmless = 0
    # Every 37th byte, and all of the index's and the seek table's frames and headers.
    for at in sorted({*range(0, len(good), 37), *range(len(good) - 300, len(good))}):
        bad = bytearray(good)
        bad[at] ^= 0x10
        packed.write_bytes(bad)
        try:
            assert verify_content(packed) == found, at  # zstd and the seek table have unused bits
            harmless += 1
        except ArtifactError:
            noticed += 1
    assert noticed > 20 * harmless


def test_cuts_and_trailing_bytes_are_errors(packed: Path) -> None:
    good = packed.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], good[1:], good + b"\0", b"", good[:3]):
        packed.write_bytes(bad)
        with pytest.raises(ArtifactError):
            verify_content(packed)


def test_an_index_of_other_members_is_an_error(packed: Path, tmp_path: Path) -> None:
    with (
        FramePool(1) as pool,
        open(tmp_path / "lying", "wb") as sink,
        ArtifactWriter(pool, sink.write, level=1, frame_bytes=4096) as writer,
    ):
        writer.index.add(0, 0, 0, 0, 0, 0, Kind.FILE, b"ghost", b"")
        writer.buffer[:1024] = bytes(1024)
        writer.finish(1024)
    with pytest.raises(ArtifactError, match="index"):
        verify_content(tmp_path / "lying")


@pytest.mark.parametrize("size_known", [True, False])
def test_more_than_is_allowed_is_refused_early(tmp_path: Path, size_known: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=size_known).compressobj()
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(2000)) + compressor.flush()
    (tmp_path / "bomb").write_bytes(bomb)
    with pytest.raises(ArtifactError, match="more than the 1000000 bytes"):
        verify_content(tmp_path / "bomb", max_content_bytes=1_000_000)


def test_the_table_s_word_is_enough_to_refuse(packed: Path) -> None:
    with pytest.raises(ArtifactError, match="more than the 1000 bytes"):
        verify_content(packed, max_content_bytes=1000)


def bomb(content_bytes: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    pieces = [compressor.compress(bytes(1 << 20)) for _ in range(content_bytes >> 20)]
    return b"".join([*pieces, compressor.flush()])


def test_what_unpacks_out_of_all_proportion_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "RATIO_FROM_BYTES", 8 << 20)
    path = tmp_path / "bomb"
    path.write_bytes(bomb(64 << 20))
    assert verify_content(path).bytes == 64 << 20
    with pytest.raises(Bomb, match="more than 1000 times"):
        verify_content(path, max_ratio=1000)
    path.write_bytes(bomb(8 << 20))
    assert verify_content(path, max_ratio=1000).bytes == 8 << 20


def test_members_are_at_most_as_many_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_MEMBERS_FROM", 10)
    path = tmp_path / "members"
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(zstandard.ZstdCompressor().compress(header * 10_000))
    assert verify_content(path).members == 10_000
    with pytest.raises(Bomb, match="members"):
        verify_content(path, max_ratio=1000)


def test_a_file_that_cannot_be_read_is_no_damaged_artifact(packed: Path) -> None:
    """A receiver without a descriptor to spare must not refuse an episode for it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            verify_content(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(FileNotFoundError):
        verify_content(packed.with_name("gone"))
