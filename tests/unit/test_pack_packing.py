"""`pack`: what comes out is what stock tools read, the same for any threads; and no change or fault goes unnoticed."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest

from fastship.episode import Manifest
from fastship.errors import EpisodeChanged, EpisodeUnreadable, OutboxFull, PackError
from fastship.frames import ArtifactReader, FramePool, verify_content
from fastship.pack import EpisodeSize, PackOptions, fingerprint, measure, pack

Look = Callable[[Path], dict[bytes, tuple[object, ...]]]
SMALL = PackOptions(frame_bytes=65536)


@pytest.fixture
def episode(tmp_path: Path, make_odd_episode: Callable[[Path], None]) -> Path:
    make_odd_episode(tmp_path / "ep-1")
    return tmp_path / "ep-1"


def packed(
    episode: Path,
    options: PackOptions = SMALL,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> tuple[Manifest, bytes]:
    sink = io.BytesIO()
    with FramePool(threads) as pool:
        manifest = pack(episode, sink, options, pool, progress)
    return manifest, sink.getvalue()


def content_of(artifact: bytes) -> bytes:
    return subprocess.run(["zstd", "-dc"], input=artifact, capture_output=True, check=True).stdout


def test_the_manifest_says_what_the_artifact_is(episode: Path) -> None:
    (episode / "meta.json").write_text('{"code_version": {"commit": "' + "AB" * 20 + '"}}')
    manifest, artifact = packed(episode)
    content = content_of(artifact)
    assert manifest.episode == "ep-1"
    assert manifest.artifact_sha256 == hashlib.sha256(artifact).hexdigest()
    assert manifest.artifact_bytes == len(artifact)
    assert manifest.content_blake3 == blake3.blake3(content).hexdigest()
    assert manifest.content_bytes == len(content)
    assert manifest.frames == -(-len(content) // 65536)
    assert (manifest.frame_bytes, manifest.levels) == (65536, {3: manifest.frames})
    assert manifest.code_commit == "ab" * 20
    assert manifest.boot_id
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert manifest.members == len(tar.getmembers())


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_gnu_tar_restores_it(episode: Path, tmp_path: Path, snapshot: Look, locale: str) -> None:
    _, artifact = packed(episode)
    (tmp_path / "a.tar.zst").write_bytes(artifact)
    (tmp_path / "out").mkdir()
    command = (
        "zstd -dc a.tar.zst | tar -x -p --same-owner -C out"
        if os.geteuid() == 0
        else "zstd -dc a.tar.zst | tar -xp -C out"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": locale},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if "hdrcharset" not in line]
    assert noise == []
    assert snapshot(tmp_path / "out" / "ep-1") == snapshot(episode)


def test_tarfile_restores_it(episode: Path, tmp_path: Path, snapshot: Look) -> None:
    _, artifact = packed(episode)
    with tarfile.open(fileobj=io.BytesIO(content_of(artifact)), errorlevel=2) as tar:
        names = [info.name for info in tar.getmembers()]
        assert all(name == "ep-1" or name.startswith("ep-1/") for name in names)
        assert {(info.uname, info.gname) for info in tar.getmembers()} == {("", "")}
        tar.extractall(tmp_path / "out", numeric_owner=True, filter="fully_trusted")
    restored, expected = snapshot(tmp_path / "out" / "ep-1"), snapshot(episode)
    for look in (restored, expected):  # tarfile leaves the mtime of symlinks
        look.update({name: (*of[:3], *of[4:]) for name, of in look.items() if stat.S_ISLNK(int(str(of[0])))})
    assert restored == expected


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bytes_come_whatever_the_threads(episode: Path, threads: int) -> None:
    manifest, artifact = packed(episode)
    other, same = packed(episode, threads=threads)
    assert same == artifact
    assert other.artifact_sha256 == manifest.artifact_sha256


def test_the_same_bytes_come_while_the_threads_change(episode: Path) -> None:
    _, artifact = packed(episode)
    sink = io.BytesIO()
    with FramePool(1) as pool:
        pack(episode, sink, SMALL, pool, lambda done: pool.set_threads(done // 65536 % 4))
    assert sink.getvalue() == artifact


@pytest.mark.parametrize(
    "options", [PackOptions(level=1, frame_bytes=4096), PackOptions(level=19, frame_bytes=1 << 20)]
)
def test_the_content_digest_is_that_of_the_content_alone(episode: Path, options: PackOptions, tmp_path: Path) -> None:
    manifest, _ = packed(episode)
    other, artifact = packed(episode, options)
    assert other.content_blake3 == manifest.content_blake3
    assert other.artifact_sha256 != manifest.artifact_sha256
    (tmp_path / "a").write_bytes(artifact)
    assert verify_content(tmp_path / "a").blake3 == manifest.content_blake3


def test_the_index_lists_the_members_as_they_are(episode: Path) -> None:
    _, artifact = packed(episode)
    with tarfile.open(fileobj=io.BytesIO(content_of(artifact))) as tar:
        expected = [
            (info.name.encode("utf-8", "surrogateescape"), info.size, info.mode, info.mtime, info.type[0], info.uid)
            for info in tar
        ]
    with ArtifactReader(lambda offset, length: artifact[offset : offset + length], len(artifact)) as reader:
        members = list(reader.members())
    found = [(m.name.rstrip(b"/"), m.size, m.mode, m.mtime, int(m.kind), m.uid) for m in members]
    assert found == expected
    offsets = [member.tar_offset for member in members]
    assert offsets == sorted(set(offsets))
    assert [member.name for member in members] == sorted(member.name for member in members)


def test_owner_zero_is_the_same_whoever_owns_it(episode: Path) -> None:
    zeroed, artifact = packed(episode, PackOptions(frame_bytes=65536, owner="zero"))
    with tarfile.open(fileobj=io.BytesIO(content_of(artifact))) as tar:
        assert {(info.uid, info.gid) for info in tar} == {(0, 0)}
    if os.geteuid() == 0:
        for root, directories, files in os.walk(os.fsencode(episode)):
            for name in [*directories, *files]:
                mode = os.lstat(os.path.join(root, name)).st_mode
                os.chown(os.path.join(root, name), 1234, 1234, follow_symlinks=False)
                if mode & 0o7000:
                    os.chmod(os.path.join(root, name), mode & 0o7777)
        os.chown(episode, 1234, 1234)
        again, _ = packed(episode, PackOptions(frame_bytes=65536, owner="zero"))
        assert again.content_blake3 == zeroed.content_blake3
        kept, _ = packed(episode)
        assert kept.content_blake3 != zeroed.content_blake3


def test_sockets_are_skipped_and_reported_and_fifos_not_opened(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    os.mkfifo(tmp_path / "ep" / "meta.json")  # even this one: nobody writes to it, an open would wait for ever
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "ep" / "socket"))
        manifest, artifact = packed(tmp_path / "ep")
    assert manifest.skipped == ("ep/socket",)
    assert manifest.code_commit is None
    with tarfile.open(fileobj=io.BytesIO(content_of(artifact))) as tar:
        assert [(info.name, info.type) for info in tar] == [("ep", tarfile.DIRTYPE), ("ep/meta.json", tarfile.FIFOTYPE)]


def test_devices_are_headers(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    try:
        os.mknod(tmp_path / "ep" / "null", 0o020666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    _, artifact = packed(tmp_path / "ep")
    with tarfile.open(fileobj=io.BytesIO(content_of(artifact))) as tar:
        info = tar.getmember("ep/null")
    assert (info.type, info.devmajor, info.devminor) == (tarfile.CHRTYPE, 1, 3)


def test_the_fingerprint_is_known_without_reading(episode: Path) -> None:
    manifest, _ = packed(episode)
    assert fingerprint(episode, "keep") == manifest.fingerprint
    assert fingerprint(episode, "zero") == packed(episode, PackOptions(owner="zero"))[0].fingerprint


def test_the_fingerprint_sees_every_change(episode: Path) -> None:
    seen = {fingerprint(episode, "keep")}
    plain = episode / "plain.jsonl"
    changes: list[Callable[[], object]] = [
        lambda: plain.chmod(0o600),
        lambda: os.utime(plain, ns=(1, 1_700_000_000_000_000_001)),
        lambda: os.utime(plain, ns=(1, 1_700_000_000_000_000_002)),
        lambda: (episode / "new").touch(),
        lambda: (episode / "new").rename(episode / "newer"),
        lambda: (episode / "newer").unlink(),
        lambda: os.truncate(episode / "block", 511),
        lambda: replace_by(episode / "symlink", lambda path: path.symlink_to("else")),
    ]
    for number, change in enumerate(changes, 2):
        change()
        seen.add(fingerprint(episode, "keep"))
        assert len(seen) == number


def test_measure_counts_about_the_stream_and_stops_at_the_limit(episode: Path) -> None:
    manifest, _ = packed(episode)
    size = measure(episode, 1 << 40)
    assert size.complete
    assert size.files == sum(1 for path in episode.rglob("*") if path.is_file() and not path.is_symlink())
    assert 0.9 * manifest.content_bytes < size.bytes < 1.1 * manifest.content_bytes
    assert measure(episode, 10_000) == EpisodeSize(
        measure(episode, 10_000).bytes, measure(episode, 10_000).files, complete=False
    )
    assert measure(episode, 10_000).files < size.files


def test_progress_never_goes_back_and_ends_at_the_content(episode: Path) -> None:
    done: list[int] = []
    manifest, _ = packed(episode, progress=done.append)
    assert done == sorted(done)
    assert done[-1] == manifest.content_bytes
    assert len(done) == manifest.frames


# What changes while it is read. ``progress`` is called after each frame of 4096 bytes: in the middle of the file "m".


def changing(tmp_path: Path, change: Callable[[Path], object]) -> None:
    episode = tmp_path / "ep"
    (episode / "z-later").mkdir(parents=True)
    (episode / "m").write_bytes(os.urandom(40_000))
    (episode / "z").write_bytes(b"z" * 100)
    calls: list[int] = []

    def progress(done: int) -> None:
        if not calls:
            change(episode)
        calls.append(done)

    packed(episode, PackOptions(frame_bytes=4096), progress=progress)
    raise AssertionError("nothing was noticed")


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def set_back(path: Path) -> None:
    rewrite(path)
    os.utime(path, ns=(1, 1))


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"x")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda ep: append(ep / "m"),
    "shrinks": lambda ep: os.truncate(ep / "m", 20_000),
    "is emptied": lambda ep: os.truncate(ep / "m", 0),
    "is rewritten in place": lambda ep: rewrite(ep / "m"),
    "is rewritten and its mtime set back": lambda ep: set_back(ep / "m"),
    "is replaced": lambda ep: (ep / "z").replace(ep / "m"),
    "is unlinked": lambda ep: (ep / "m").unlink(),
    "changes mode": lambda ep: (ep / "m").chmod(0o600),
    "a later file vanishes": lambda ep: (ep / "z").unlink(),
    "a later file becomes a link": lambda ep: replace_by(ep / "z", lambda path: path.symlink_to("/etc/passwd")),
    "a later file becomes a fifo": lambda ep: replace_by(ep / "z", os.mkfifo),
    "a later directory vanishes": lambda ep: (ep / "z-later").rmdir(),
    "a file comes": lambda ep: (ep / "a").touch(),
    "the episode moves away": lambda ep: ep.rename(ep.with_name("moved")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_while_reading_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    with pytest.raises(EpisodeChanged, match="ep/"):
        changing(tmp_path, change)


def test_a_file_that_hides_its_size_is_not_packed_as_empty() -> None:
    with pytest.raises(EpisodeChanged, match="random/"):
        packed(Path("/proc/sys/kernel/random"))


def test_the_pool_is_well_after_a_change(tmp_path: Path) -> None:
    episode = tmp_path / "ep"
    episode.mkdir()
    (episode / "m").write_bytes(os.urandom(400_000))
    with FramePool(3) as pool:
        expected = pack(episode, io.BytesIO(), SMALL, pool)
        for _ in range(3):
            with pytest.raises(EpisodeChanged):
                pack(episode, io.BytesIO(), SMALL, pool, lambda done: append(episode / "m"))
            os.truncate(episode / "m", 400_000)
            os.utime(episode / "m", ns=(1, 1))
        again = pack(episode, io.BytesIO(), SMALL, pool)
    assert again.content_bytes == expected.content_bytes


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    episode = tmp_path / "ep"
    episode.mkdir()
    (episode / "secret").write_text("x")
    (episode / "secret").chmod(0)
    script = """
import io, os, sys
from pathlib import Path
from fastship.errors import EpisodeUnreadable
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    with FramePool(1) as pool:
        pack(Path("ep"), io.BytesIO(), PackOptions(), pool)
except EpisodeUnreadable as error:
    print(error, "|", error.remedy)
"""
    for path in (tmp_path, episode):
        path.chmod(0o755)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ep/secret cannot be read: Permission denied" in done.stdout
    assert "chmod" in done.stdout


def test_no_such_episode(tmp_path: Path) -> None:
    with pytest.raises(EpisodeChanged):
        packed(tmp_path / "none")
    assert isinstance(EpisodeChanged("x"), PackError)
    assert not isinstance(EpisodeChanged("x"), EpisodeUnreadable)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_is_said_so(tmp_path: Path, threads: int) -> None:
    episode = tmp_path / "ep"
    episode.mkdir()
    (episode / "data").write_bytes(os.urandom(1_000_000))
    with FramePool(threads) as pool:
        with open("/dev/full", "wb", buffering=0) as sink, pytest.raises(OutboxFull) as caught:
            pack(episode, sink, SMALL, pool)
        assert caught.value.remedy
        assert pack(episode, io.BytesIO(), SMALL, pool).members == 2


def test_another_fault_of_the_sink_is_a_pack_error(tmp_path: Path) -> None:
    (tmp_path / "ep").mkdir()
    read_end, write_end = os.pipe()
    os.close(read_end)
    with FramePool(1) as pool, open(write_end, "wb", buffering=0) as sink, pytest.raises(PackError):
        pack(tmp_path / "ep", sink, SMALL, pool)


def test_a_sink_that_takes_little_at_a_time_gets_all(episode: Path) -> None:
    class Miserly(io.RawIOBase):
        def __init__(self) -> None:
            self.taken = bytearray()

        def write(self, data: object, /) -> int:
            piece = bytes(memoryview(data)[:1000])  # type: ignore[arg-type]
            self.taken += piece
            return len(piece)

    sink = Miserly()
    with FramePool(1) as pool:
        manifest = pack(episode, sink, SMALL, pool)
    assert hashlib.sha256(sink.taken).hexdigest() == manifest.artifact_sha256


def test_a_file_of_9_gib_has_a_right_header(tmp_path: Path) -> None:
    """Sparse, so it costs nothing to make; reading its first frames is enough to see its header and offsets."""
    episode = tmp_path / "ep"
    episode.mkdir()
    with open(episode / "big", "wb") as file:
        file.truncate(9 << 30)
    frames: list[bytes] = []

    class Enough(Exception):
        pass

    class Sink:
        def write(self, data: memoryview, /) -> int:
            if len(frames) == 3:
                raise Enough
            frames.append(bytes(data))
            return len(data)

    with FramePool(1) as pool, pytest.raises(Enough):
        pack(episode, Sink(), PackOptions(level=1), pool)
    start = subprocess.run(["zstd", "-dc"], input=frames[0], capture_output=True, check=True).stdout
    listed = subprocess.run(["tar", "tv"], input=start, capture_output=True, check=False).stdout
    assert b"%d" % (9 << 30) in listed
    with tarfile.open(fileobj=io.BytesIO(start)) as tar:
        assert tar.next() is not None
        big = tar.next()
    assert big is not None
    assert (big.name, big.size) == ("ep/big", 9 << 30)


@pytest.fixture
def big_pack(tmp_path: Path) -> Callable[[int, int], int]:
    script = """
import sys
def peak_kib():  # not ru_maxrss: a process started by vfork begins with its parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
from pathlib import Path
from fastship.frames import FramePool
from fastship.pack import PackOptions, pack
with FramePool(int(sys.argv[2])) as pool, open("/dev/null", "wb", buffering=0) as sink:
    pack(Path(sys.argv[1]), sink, PackOptions(level=1), pool)
print(peak_kib() // 1024)
"""

    def run(size_bytes: int, threads: int) -> int:
        episode = tmp_path / "ep"
        episode.mkdir(exist_ok=True)
        with open(episode / "sparse", "wb") as file:
            file.truncate(size_bytes)
        command = [sys.executable, "-c", script, str(episode), str(threads)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return run


def test_memory_does_not_grow_with_the_episode(big_pack: Callable[[int, int], int]) -> None:
    """Bounded by the frames under way, of which a short episode need not have had all at once."""
    threads, frame_mib = 2, PackOptions().frame_bytes >> 20
    for size_bytes in (100 << 20, 1 << 30):
        assert big_pack(size_bytes, threads) < 64 + (threads + 2) * 2 * frame_mib
