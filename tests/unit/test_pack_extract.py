"""Extraction: extract(pack(x)) = x; parts through the index; stock archives; and nothing hostile gets out."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastship.errors import ArtifactError, ExtractError, ExtractRefused
from fastship.frames import ArtifactReader, FramePool
from fastship.pack import ExtractResult, PackOptions, extract, list_members, pack
from fastship.pack.headers import END_OF_ARCHIVE, header

Look = Callable[[Path], dict[bytes, tuple[object, ...]]]


@pytest.fixture
def episode(tmp_path: Path, make_odd_episode: Callable[[Path], None]) -> Path:
    make_odd_episode(tmp_path / "ep-1")
    return tmp_path / "ep-1"


def over(data: bytes) -> ArtifactReader:
    return ArtifactReader(lambda offset, length: data[offset : offset + length], len(data))


def packed(episode: Path, frame_bytes: int = 65536) -> bytes:
    sink = io.BytesIO()
    with FramePool(1) as pool:
        pack(episode, sink, PackOptions(frame_bytes=frame_bytes), pool)
    return sink.getvalue()


def stock(tar: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(tar)


@pytest.mark.parametrize("threads", [1, 3])
def test_everything_comes_back(episode: Path, tmp_path: Path, snapshot: Look, threads: int) -> None:
    done: list[int] = []
    artifact = packed(episode)
    result = extract(over(artifact), tmp_path / "out", progress=done.append, threads=threads)
    assert snapshot(tmp_path / "out" / "ep-1") == snapshot(episode)
    assert result.members == sum(1 for _ in list_members(over(artifact)))
    assert result.skipped == ()
    assert done == sorted(done)
    assert done[-1] == result.bytes


component = st.one_of(
    st.sampled_from([b"a", b"b", b"a-", b"a.b"]),
    st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name and b"\0" not in name and name.strip(b".")),
)
leaf = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=3000)),
    st.tuples(st.just("file"), st.integers(0, 40_000).map(bytes)),
    st.tuples(st.just("link"), st.binary(min_size=1, max_size=150).filter(lambda target: b"\0" not in target)),
    st.tuples(st.just("hard"), st.just(b"")),
    st.tuples(st.just("fifo"), st.just(b"")),
    st.tuples(st.just("directory"), st.just(b"")),
)
tree = st.dictionaries(
    st.lists(component, min_size=1, max_size=4).map(tuple),
    st.tuples(leaf, st.integers(0, 0o777), st.integers(0, 1 << 33)),
    max_size=15,
)


def make_tree(top: Path, entries: dict[tuple[bytes, ...], tuple[tuple[str, bytes], int, int]]) -> None:
    top.mkdir()
    root = os.fsencode(top)
    files: list[bytes] = []
    made: list[tuple[bytes, int, int]] = []
    for parts, ((kind, content), mode, mtime) in entries.items():
        path = os.path.join(root, *parts)
        if any(os.path.islink(os.path.join(root, *parts[:depth])) for depth in range(1, len(parts))):
            continue
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if kind == "file":
                with open(path, "xb") as file:
                    file.write(content)
                files.append(path)
            elif kind == "link":
                os.symlink(content, path)
            elif kind == "hard" and files:
                os.link(files[0], path)
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                os.mkdir(path)
        except (FileExistsError, NotADirectoryError):
            continue
        if kind != "link":
            made.append((path, mode | 0o600 | (0o100 if kind == "directory" else 0), mtime))
    for path, mode, mtime in reversed(made):
        os.chmod(path, mode)
        os.utime(path, ns=(mtime * 10**9, mtime * 10**9 + 7))


@given(tree, st.sampled_from([4096, 65536]), st.integers(1, 2))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_any_tree_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    snapshot: Look,
    entries: dict[tuple[bytes, ...], tuple[tuple[str, bytes], int, int]],
    frame_bytes: int,
    threads: int,
) -> None:
    base = tmp_path_factory.mktemp("tree")
    make_tree(base / "ep", entries)
    extract(over(packed(base / "ep", frame_bytes)), base / "out", threads=threads)
    assert snapshot(base / "out" / "ep") == snapshot(base / "ep")


def test_one_member_is_restored_from_its_frames_alone(episode: Path, tmp_path: Path) -> None:
    artifact = packed(episode, 4096)
    read = 0

    def read_at(offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return artifact[offset : offset + length]

    reader = ArtifactReader(read_at, len(artifact))
    before = read
    result = extract(reader, tmp_path / "out", ["ep-1/block"])
    assert (tmp_path / "out" / "ep-1" / "block").read_bytes() == b"b" * 512
    assert result == ExtractResult(1, 512)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["ep-1", "block"]
    index_bytes = reader.total_bytes // 3
    assert read - before < index_bytes  # the index and a frame, of an artifact that is mostly frames


def test_a_directory_means_all_below_it(episode: Path, tmp_path: Path, snapshot: Look) -> None:
    for data in (packed(episode), without_index(packed(episode))):
        target = tmp_path / f"out{len(data)}"
        extract(over(data), target, ["ep-1/private", "ep-1/sub/"])
        private = snapshot(target / "ep-1" / "private")
        assert private == snapshot(episode / "private")
        assert (target / "ep-1" / "sub" / ("m" * 255)).read_bytes() == b"longer"
        assert (target / "ep-1" / "sub" / ("h" * 120)).read_bytes() == (episode / "plain.jsonl").read_bytes()
        assert sorted(os.listdir(target / "ep-1")) == ["private", "sub"]


def without_index(artifact: bytes) -> bytes:
    return stock(b"".join(over(artifact).stream()))


def test_hard_links_without_their_first_name_get_the_content(episode: Path, tmp_path: Path) -> None:
    (episode / "zz-link").symlink_to("target")
    os.link(episode / "zz-link", episode / "zz-other", follow_symlinks=False)
    names = ["ep-1/plain.jsonl", "ep-1/sub/" + "h" * 120, "ep-1/zz-other"]
    for data in (packed(episode), without_index(packed(episode))):
        target = tmp_path / f"out{len(data)}"
        result = extract(over(data), target, names)
        assert result.members == 3
        first, second = (os.stat(target / name) for name in names[:2])
        assert first.st_ino == second.st_ino
        assert (target / names[0]).read_bytes() == (episode / "plain.jsonl").read_bytes()
        assert os.readlink(target / names[2]) == "target"


def test_a_hard_link_is_not_made_to_a_file_that_was_there(episode: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "ep-1" / "hard link"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine, of the name of the link's first")
    with pytest.raises(ExtractRefused):
        extract(over(packed(episode)), tmp_path / "out", ["ep-1/hard link"])
    extract(over(packed(episode)), tmp_path / "out", ["ep-1/plain.jsonl"])
    assert (tmp_path / "out" / "ep-1" / "plain.jsonl").read_bytes() == (episode / "plain.jsonl").read_bytes()
    assert mine.stat().st_nlink == 1


def test_a_stock_hard_link_finds_its_first_name_however_it_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "a").write_text("content")
    (tmp_path / "ep" / "b").hardlink_to(tmp_path / "ep" / "a")
    tar = subprocess.run(["tar", "c", "-C", tmp_path, "./ep/a", "./ep/b"], capture_output=True, check=True).stdout
    extract(over(stock(tar)), tmp_path / "out", ["./ep/b"])
    assert (tmp_path / "out" / "ep" / "b").read_text() == "content"


def test_an_undecodable_name_is_asked_for_as_python_spells_it(episode: Path, tmp_path: Path) -> None:
    extract(over(packed(episode)), tmp_path / "out", [os.fsdecode(b"ep-1/latin-\xe9")])
    assert os.listdir(os.fsencode(tmp_path / "out" / "ep-1")) == [b"latin-\xe9"]


def test_a_member_that_is_not_there_is_said_so(episode: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="ep-1/nope") as caught:
        extract(over(packed(episode)), tmp_path / "out", ["ep-1/plain.jsonl", "ep-1/nope"])
    assert "fastship ls" in caught.value.remedy


@pytest.mark.parametrize("layout", ["gnu", "pax", "ustar"])
def test_stock_archives_are_extracted(tmp_path: Path, snapshot: Look, layout: str) -> None:
    episode = tmp_path / "ep"
    (episode / "sub").mkdir(parents=True)
    (episode / "sub" / ("m" * 90)).write_bytes(b"1" * 5000)
    if layout != "ustar":
        (episode / "sub" / ("m" * 200)).write_bytes(b"2" * 5000)
        (episode / ("s" * 150)).symlink_to("t" * 150)
    (episode / "x").hardlink_to(episode / "sub" / ("m" * 90))
    tar = subprocess.run(
        ["tar", "c", f"--format={layout}", "--sort=name", "-C", tmp_path, "./ep"], capture_output=True, check=True
    ).stdout
    extract(over(stock(tar)), tmp_path / "out", threads=2)
    assert snapshot(tmp_path / "out" / "ep") == snapshot(episode)
    extract(over(stock(tar)), tmp_path / "part", ["ep/sub"])
    assert snapshot(tmp_path / "part" / "ep" / "sub") == snapshot(episode / "sub")


def test_nothing_there_is_overwritten(episode: Path, tmp_path: Path) -> None:
    artifact = packed(episode)
    (tmp_path / "out" / "ep-1").mkdir(parents=True, mode=0o711)
    (tmp_path / "out" / "ep-1" / "plain.jsonl").write_text("mine")
    with pytest.raises(ExtractRefused, match=r"ep-1/plain.jsonl is there already") as caught:
        extract(over(artifact), tmp_path / "out")
    assert "-C" in caught.value.remedy
    assert (tmp_path / "out" / "ep-1" / "plain.jsonl").read_text() == "mine"
    extract(over(artifact), tmp_path / "out", ["ep-1/sub"])  # beside it there is room
    assert (tmp_path / "out" / "ep-1").stat().st_mode & 0o777 == 0o711


def hostile(*members: tuple[str, bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o755
            info.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil"))
    return stock(out.getvalue())


FILE, LINK, HARD, DIRECTORY = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
HOSTILE = {
    "absolute": [("/tmp/fastship-evil", FILE, "")],
    "dots": [("../evil", FILE, "")],
    "dots inside": [("a/../../evil", FILE, "")],
    "dots at the end": [("a/..", DIRECTORY, "")],
    "through its own symlink": [("ep", LINK, ".."), ("ep/evil", FILE, "")],
    "through an absolute symlink": [("ep", LINK, "/tmp"), ("ep/fastship-evil", FILE, "")],
    "directory over a symlink": [("ep", LINK, ".."), ("ep", DIRECTORY, "")],
    "file over a symlink": [("ep", LINK, "../evil"), ("ep", FILE, "")],
    "symlink in a directory": [("d/ep", LINK, "../.."), ("d/ep/evil", FILE, "")],
    "hard link out": [("ep", HARD, "../secret")],
    "hard link absolute": [("ep", HARD, "/etc/passwd")],
    "hard link through a symlink": [("s", LINK, ".."), ("ep", HARD, "s/secret")],
    "hard link to a directory": [("d", DIRECTORY, ""), ("ep", HARD, "d")],
    "hard link to the target": [("ep", HARD, ".")],
    "file as the target": [(".", FILE, "")],
    "twice": [("ep", FILE, ""), ("ep", FILE, "")],
    "below a file": [("ep", FILE, ""), ("ep/evil", FILE, "")],
    "below a fifo": [("ep", tarfile.FIFOTYPE, ""), ("ep/evil", FILE, "")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_write_nothing_outside(tmp_path: Path, members: list[tuple[str, bytes, str]]) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ExtractRefused):
        extract(over(hostile(*members)), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "secret"]
    assert (tmp_path / "secret").read_text() == "secret"
    assert (tmp_path / "secret").stat().st_nlink == 1
    assert not Path("/tmp/fastship-evil").exists()


def test_a_symlink_that_was_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ep").symlink_to(tmp_path / "outside")
    with pytest.raises(ExtractRefused):
        extract(over(hostile(("ep/evil", FILE, ""))), tmp_path / "out")
    assert os.listdir(tmp_path / "outside") == []


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    blocks = header(b"n" * 120 + b"\0" + b"m", 0o644, 0, 0, 0, 0)
    with pytest.raises(ExtractRefused):
        extract(over(stock(blocks + END_OF_ARCHIVE)), tmp_path / "out")


def test_a_symlink_to_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    blocks = header(b"ep", 0o777, 0, 0, 0, 0, ord("2"), b"t" * 120 + b"\0" + b"m")
    with pytest.raises(ExtractRefused):
        extract(over(stock(blocks + END_OF_ARCHIVE)), tmp_path / "out")


def test_a_name_of_a_million_directories_is_refused(tmp_path: Path) -> None:
    blocks = header(b"d/" * 1_000_000, 0o755, 0, 0, 0, 0, ord("5"))
    with pytest.raises(ExtractRefused):
        extract(over(stock(blocks + END_OF_ARCHIVE)), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_long_names_are_chosen_from_as_others_are(tmp_path: Path) -> None:
    deep = b"d/" * 3000
    blocks = header(deep + b"a", 0o644, 0, 0, 0, 0) + header(b"x/" * 1_000_000, 0o755, 0, 0, 0, 0, ord("5"))
    artifact = stock(blocks + END_OF_ARCHIVE)
    assert extract(over(artifact), tmp_path / "out", ["d"]).members == 1
    with pytest.raises(ArtifactError, match="not in the artifact"):
        extract(over(artifact), tmp_path / "other", ["e"])
    subprocess.run(["rm", "-rf", tmp_path / "out"], check=True)


def test_a_name_of_thousands_of_directories_is_refused(tmp_path: Path) -> None:
    blocks = header(b"d/" * 30_000, 0o755, 0, 0, 0, 0, ord("5"))
    with pytest.raises(ExtractRefused, match="deep"):
        extract(over(stock(blocks + END_OF_ARCHIVE)), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"", b"at noon"])
def test_an_extraction_cut_short_leaves_no_marker(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "done.marker").write_bytes(content)
    (tmp_path / "ep" / "later").write_bytes(bytes(1000))
    (tmp_path / "ep" / "link").hardlink_to(tmp_path / "ep" / "later")
    artifact = packed(tmp_path / "ep")

    def interrupt(done: int) -> None:
        if done >= 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(over(artifact), tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path / "out" / "ep") == []
    extract(over(artifact), tmp_path / "again")
    assert (tmp_path / "again" / "ep" / "done.marker").read_bytes() == content


def test_a_marker_with_links_comes_back_with_them(tmp_path: Path, snapshot: Look) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "done.marker").touch()
    (tmp_path / "ep" / "z").hardlink_to(tmp_path / "ep" / "done.marker")
    (tmp_path / "ep" / "a").hardlink_to(tmp_path / "ep" / "done.marker")
    artifact = packed(tmp_path / "ep")
    extract(over(artifact), tmp_path / "out")
    assert snapshot(tmp_path / "out" / "ep") == snapshot(tmp_path / "ep")
    extract(over(artifact), tmp_path / "part", ["ep/done.marker", "ep/z"])
    assert os.stat(tmp_path / "part" / "ep" / "done.marker").st_nlink == 2


def test_a_marker_that_is_there_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "done.marker").touch()
    (tmp_path / "ep" / "later").touch()
    (tmp_path / "out" / "ep").mkdir(parents=True)
    (tmp_path / "out" / "ep" / "done.marker").touch()
    with pytest.raises(ExtractRefused, match="is there already"):
        extract(over(packed(tmp_path / "ep")), tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "ep") == ["done.marker"]


def test_a_directory_named_after_what_is_in_it_gets_its_mode_and_time(tmp_path: Path) -> None:
    blocks = header(b"d/e/file", 0o644, 0, 0, 0, 0) + header(b"d/e/", 0o750, 0, 0, 0, 1_600_000_000, ord("5"))
    extract(over(stock(blocks + END_OF_ARCHIVE)), tmp_path / "out")
    status = (tmp_path / "out" / "d" / "e").stat()
    assert (status.st_mode & 0o777, status.st_mtime) == (0o750, 1_600_000_000)


def test_a_hard_link_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        extract(over(hostile(("ep", HARD, "nowhere"))), tmp_path / "out")


def test_devices_are_skipped_and_reported(tmp_path: Path) -> None:
    data = hostile(("ep/null", tarfile.CHRTYPE, ""), ("ep/disk", tarfile.BLKTYPE, ""), ("ep/fine", FILE, ""))
    result = extract(over(data), tmp_path / "out")
    assert result.skipped == ("ep/null", "ep/disk")
    assert os.listdir(tmp_path / "out" / "ep") == ["fine"]


def test_set_id_bits_do_not_come_back(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep").chmod(0o3775)
    (tmp_path / "ep" / "tool").write_text("x")
    (tmp_path / "ep" / "tool").chmod(0o6755)
    extract(over(packed(tmp_path / "ep")), tmp_path / "out")
    assert (tmp_path / "out" / "ep" / "tool").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out" / "ep").stat().st_mode & 0o7777 == 0o3775


def test_sparse_members_of_gnu_tar_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x" * 5000)
    tar = subprocess.run(["tar", "cS", "-C", tmp_path, "sparse"], capture_output=True, check=True).stdout
    with pytest.raises(ExtractRefused) as caught:
        extract(over(stock(tar)), tmp_path / "out")
    assert "tar x" in caught.value.remedy


def test_damage_leaves_no_half_file(tmp_path: Path) -> None:
    episode = tmp_path / "ep"
    episode.mkdir()
    (episode / "data").write_bytes(os.urandom(100_000))
    artifact = bytearray(packed(episode, 4096))
    artifact[50_000] ^= 1
    with pytest.raises(ArtifactError):
        extract(over(bytes(artifact)), tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "ep") == []


def test_a_target_that_takes_nothing_is_said_so(tmp_path: Path) -> None:
    artifact = over(hostile(("n" * 300, FILE, "")))
    with pytest.raises(ExtractError, match="nnn"):
        extract(artifact, tmp_path / "out")


def test_a_target_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExtractError, match="file"):
            extract(over(hostile(("ep", FILE, ""))), target)


def test_deep_nesting_comes_back_with_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    fd = os.open(tmp_path / "ep", os.O_RDONLY)
    for _ in range(400):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("d" * 20, dir_fd=fd)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    script = """
import resource, sys
from pathlib import Path
from fastship.frames import ArtifactReader
from fastship.pack import extract
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with ArtifactReader.open(sys.argv[1]) as reader:
    print(extract(reader, Path(sys.argv[2])).members)
"""
    try:
        (tmp_path / "a").write_bytes(packed(tmp_path / "ep"))
        command = [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) == 801
        assert subprocess.run(["diff", "-r", tmp_path / "ep", tmp_path / "out" / "ep"], check=False).returncode in (
            0,
            2,
        )
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "ep", tmp_path / "out"], check=True)
