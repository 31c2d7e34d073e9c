"""``extract`` of archives that mean ill: whatever they are, nothing happens outside the target.

The whole run is 20,000 archives, drawn from the seed: members of every kind, names and links that lead out by every way
there is, collisions, extended headers of every kind, sizes that lie, and all of that with bytes changed. What is looked
at after each: all around the target is what it was, down to modes, times and link counts; in the target is nothing that
an archive may not make; and what was raised is ours, soon, and took little memory.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import stat
import struct
import time
from collections import Counter
from pathlib import Path

import faults
import pytest
import zstandard
from hostility import mutate

from fastship.errors import ArtifactError, ExtractError, ExtractRefused
from fastship.frames import ArtifactReader
from fastship.pack import extract, list_members

HERE = "tests/crash/test_hostile_archives.py"
ARCHIVES = 20_000
MEMORY_KIB = 200 << 10
"""An extended header is read whole, 16 MiB at most, and held some times over; a frame's window; what pytest keeps."""

FILE, HARD, SYMBOLIC, CHARACTER, BLOCK, DIRECTORY, FIFO, CONTIGUOUS = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"
KINDS = (FILE, HARD, SYMBOLIC, CHARACTER, BLOCK, DIRECTORY, FIFO, CONTIGUOUS, b"\0", b"S", b"D", b"V", b"M", b"Z")
NUMBERS = (
    b"00000000000",
    b"77777777777",
    b"-0000000001",
    b"9",
    b"\x80" + b"\xff" * 10,
    b"\xff" * 11,
    b"",
    b" 1 ",
    b"0x10",
    b"1\x002",
)
DECIMALS = (
    b"0",
    b"-1",
    b"1",
    b"99999999999999999999",
    b"1e9",
    b"0x1",
    b"",
    b"\xd9\xa5",
    b"1.5",
    b"-1.5",
    b"1_0",
    b"9" * 5000,
)


TAME_NAMES = (
    b"a",
    b"b",
    b"c",
    b"d",
    b"d/a",
    b"d/b",
    b"s",
    b"s/a",
    b"e/f/g",
    b"e",
    b"A",
    b"./h",
    b"i/",
    b"a/done.marker",
)
"""So that much of an archive comes to be before something of it is refused."""


class Archives:
    """Tar streams. ``around`` is a directory that they would like to write to, by its absolute name."""

    def __init__(self, draw: random.Random, around: Path) -> None:
        self.draw = draw
        outside = os.fsencode(around / "outside")
        self._tame = False
        self._names = [
            b"a", b"b", b"d", b"d/a", b"d/d/a", b"s", b"s/a", b"s/s/a", b"d/s/a", b"A", b"a/", b"d/", b"./a", b"./",
            b".", b"", b"/", b"//a", b"a/.", b"d//a", b"..", b"../", b"../secret", b"../outside/new",
            b"d/../../secret", b"d/..", b"s/../a", b"../out/a", b"\xff\xfe", b"e\xcc\x81", b"\xc3\xa9", b"a\0b",
            b"a\nb", b"\x1b[2J", b"n" * 100, b"n" * 255, b"n" * 256, b"d/" * 60 + b"a", b"done.marker",
            b"a/done.marker", b"d/done.marker", b"s/done.marker", b"a\\..\\b", b"C:\\a", b"-rf", outside,
            outside + b"/new", b"/proc/self/cwd/new", b"/tmp/../" + outside[1:] + b"/new", b"....//a", b".. /a",
        ]  # fmt: skip
        self._links = [
            *self._names, b"../outside", outside + b"/file", b"../secret", b"s", b"d", b"/etc/passwd",
            b"/proc/self/root", b"..", b"../..", b"/", b".", b"t" * 5000,
        ]  # fmt: skip

    def one(self) -> bytes:
        draw = self.draw
        self._tame = draw.random() < 0.6
        tar = b"".join(self._member() for _ in range(draw.choice([1, 2, 3, 5, 10])))
        tar += bytes(draw.choice([0, 512, 1024, 10240]))
        if draw.random() < 0.2:
            tar = bytes(mutate(draw, tar))
        return tar

    def artifact(self) -> bytes:
        draw = self.draw
        data = zstandard.ZstdCompressor(level=1, write_checksum=draw.random() < 0.5).compress(self.one())
        return bytes(mutate(draw, data)) if draw.random() < 0.05 else data

    def _member(self) -> bytes:
        draw = self.draw
        extended = b"".join(self._extended() for _ in range(0 if self._tame else draw.choice([0, 0, 1, 2])))
        kind = draw.choice(KINDS) if draw.random() < 0.5 else draw.choice([FILE, SYMBOLIC, HARD, DIRECTORY])
        content = draw.randbytes(draw.choice([0, 4, 511, 512, 2000]))
        if kind not in (FILE, CONTIGUOUS, b"\0"):
            content = b""
        size = b"%011o" % len(content) if self._tame or draw.random() < 0.9 else draw.choice(NUMBERS)
        name = draw.choice(TAME_NAMES if self._tame else self._names)
        link = draw.choice(TAME_NAMES if self._tame and kind == HARD else self._links)
        return extended + self._header(kind, name, link, size) + padded(content)

    def _extended(self) -> bytes:
        draw = self.draw
        flag = draw.choice([b"x", b"x", b"x", b"g", b"L", b"K"])
        if flag in b"LK":
            body = draw.choice(self._links) + draw.choice([b"", b"\0", b"\0junk"])
        else:
            body = b"".join(self._record() for _ in range(draw.choice([0, 1, 2, 20])))
        if draw.random() < 0.01:
            body = body * (draw.choice([1 << 16, 1 << 20, 17 << 20]) // (len(body) or 1))
        size = b"%011o" % len(body) if draw.random() < 0.95 else draw.choice(NUMBERS)
        return self._header(flag, b"x", b"", size) + padded(body)

    def _record(self) -> bytes:
        draw = self.draw
        key = draw.choice(
            [
                b"path",
                b"linkpath",
                b"size",
                b"mtime",
                b"uid",
                b"gid",
                b"atime",
                b"GNU.sparse.major",
                b"GNU.sparse.name",
                b"hdrcharset",
            ]
        )
        value = draw.choice(self._links) if key.endswith(b"path") or draw.random() < 0.1 else draw.choice(DECIMALS)
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + len(str(len(body) + 3))
        if draw.random() < 0.05:
            length = draw.choice([0, 1, 5, 10**6])
        return str(length).encode() + body

    def _header(self, kind: bytes, name: bytes, link: bytes, size: bytes) -> bytes:
        draw = self.draw
        tame = self._tame
        modes = [b"0000644", b"0000755", b"0006777", b"0001777", b"0000000", b"7777777"]
        owner = [b"0000000", b"0001750", b"7777777", b"\x80\xff\xff\xff\xff\xff\xff", b"\xff" * 7]
        times = [b"00000000000", b"14000000000", *NUMBERS]
        if tame:
            owner, times = owner[:2], times[:2]
        magic = draw.choice([b"ustar\x0000", b"ustar\x0000", b"ustar  \0", bytes(8)])
        prefix = draw.choice(self._names) if not tame and draw.random() < 0.1 else b""
        block = struct.pack(
            "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x",
            name, draw.choice(modes), draw.choice(owner), draw.choice(owner), size, draw.choice(times),
            b" " * 8, kind, link, magic, b"u", b"g", b"0000001", b"0000003", prefix,
        )  # fmt: skip
        return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def look(around: Path) -> dict[str, tuple[object, ...]]:
    """All there is but for the target."""
    found: dict[str, tuple[object, ...]] = {}
    for top, directories, files in os.walk(around):
        if Path(top) == around:
            directories.remove("out")
        for name in [*directories, *files]:
            path = Path(top, name)
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[str(path)] = (
                status.st_mode,
                status.st_uid,
                status.st_mtime_ns,
                status.st_nlink,
                status.st_ino,
                content,
            )
    return found


def what_is_wrong_in(target: Path) -> list[str]:
    wrong = []
    for top, directories, files in os.walk(os.fsencode(target)):  # follows no symlinks
        for name in [*directories, *files]:
            status = os.lstat(os.path.join(top, name))
            kind = stat.S_IFMT(status.st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO):
                wrong.append(f"{name!r} is of kind {kind:o}")
            if kind == stat.S_IFREG and status.st_mode & 0o7000:
                wrong.append(f"{name!r} has mode {status.st_mode:o}")
    return wrong


@pytest.mark.timeout(1200)
def test_hostile_archives(tmp_path: Path) -> None:
    around = tmp_path / "around"
    (around / "outside").mkdir(parents=True)
    (around / "outside" / "file").write_text("not yours")
    (around / "secret").write_text("not yours either")
    target = around / "out"
    target.mkdir()
    archives = Archives(faults.chance("archives"), around)
    before = look(around)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    told = 0
    tries = faults.times(ARCHIVES, least=300)
    for _ in range(tries):
        data = archives.artifact()
        reader = ArtifactReader(lambda offset, length, data=data: data[offset : offset + length], len(data))  # type: ignore[misc]
        began = time.process_time()
        try:
            result = extract(reader, target, archives.draw.choice([(), (), (), ("d",), ("a", "s/a")]))
            assert result.members <= 200
            ends["restored"] += 1
        except (ExtractRefused, ExtractError, ArtifactError) as error:
            ends[type(error).__name__] += 1
            told = max(told, len(str(error)))
        try:
            for member in list_members(reader):
                assert isinstance(member.name, bytes)
        except ArtifactError:
            pass
        assert time.process_time() - began < 20, "this is work without end"
        assert look(around) == before
        assert what_is_wrong_in(target) == []
        shutil.rmtree(target)
        target.mkdir()
        before = look(around)
    assert told < 2000
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown_kib < MEMORY_KIB, f"{grown_kib >> 10} MiB"
    assert min(ends["restored"], ends["ExtractRefused"], ends["NotTar"] + ends["ArtifactError"]) > tries // 100
    faults.count(
        "hostile: archives to extract",
        f"every kind of member, name, link and extended header: {ends['restored']} restored, all else refused,"
        " and nothing outside the target",
        of=ARCHIVES,
        tried=tries,
        test=HERE,
    )
