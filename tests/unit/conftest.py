"""What several unit tests look at directories with."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Snapshot = dict[bytes, tuple[object, ...]]


def _snapshot(top: Path) -> Snapshot:
    """Every entry below ``top`` with all that packing keeps: kind, mode, owner, whole-second mtime, content or target,
    and the first name of its inode. Sockets are left out."""
    seen: dict[tuple[int, int], bytes] = {}
    found: Snapshot = {}
    root = os.fsencode(top)
    names = [b"."]
    for directory, directories, files in os.walk(root):
        names += [os.path.relpath(os.path.join(directory, name), root) for name in [*directories, *files]]
    for name in sorted(names):
        path = os.path.join(root, name)
        status = os.lstat(path)
        if stat.S_ISSOCK(status.st_mode):
            continue
        content: object = b""
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        first = name if stat.S_ISDIR(status.st_mode) else seen.setdefault((status.st_dev, status.st_ino), name)
        found[name] = (status.st_mode, status.st_uid, status.st_gid, int(status[8]), content, first)
    return found


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], Snapshot]:
    """A function that reads a directory into a value, to compare what went in with what came out."""
    return _snapshot


def _make_odd_episode(episode: Path) -> None:
    """All that an episode can hold and packing must keep, but for sizes."""
    episode.mkdir()
    root = os.fsencode(episode)
    contents = {
        b"plain.jsonl": b'{"t":1}\n' * 1000,
        b"empty": b"",
        b"block": b"b" * 512,
        b"n" * 101: b"long",
        b"sub/" + b"m" * 255: b"longer",
        b"/".join([b"deep" * 20] * 4) + b"/leaf": b"longest",
        "größe-日本.csv".encode(): b"utf-8",
        b"latin-\xe9": b"undecodable",
        b"long-undecodable-\xff" + b"u" * 120: b"both",
        b"new\nline and space": b"odd",
        b"-rf": b"option",
        b"back\\slash*?": b"glob",
        b"MARK\xef\xbb\xbf": b"bom",
    }
    for name, content in contents.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    os.mkdir(root + b"/empty-directory")
    os.mkdir(root + b"/private", 0o700)
    for mode in (0o000, 0o400, 0o444, 0o600, 0o644, 0o755, 0o777):
        path = root + b"/private/mode-%03o" % mode
        with open(path, "wb") as file:
            file.write(b"%o" % mode)
        os.chmod(path, mode)
    os.chmod(root + b"/empty-directory", 0o2750)
    os.link(root + b"/plain.jsonl", root + b"/hard link")
    os.link(root + b"/plain.jsonl", root + b"/sub/" + b"h" * 120)
    os.link(root + b"/latin-\xe9", root + b"/zz-hard")
    os.symlink(b"plain.jsonl", root + b"/symlink")
    os.symlink(b"no/such/\xff/thing" + b"t" * 120, root + b"/dangling")
    os.symlink(b"/etc/passwd", root + b"/absolute")
    os.symlink(b"sub", root + b"/to-directory")
    os.mkfifo(root + b"/fifo", 0o640)
    with open(root + b"/sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"island")
    for number, name in enumerate((b"plain.jsonl", b"empty", b"sub", b"empty-directory", b"symlink")):
        when = 1_600_000_000_123_456_789 + number
        os.utime(os.path.join(root, name), ns=(when, when), follow_symlinks=False)
    with open(root + b"/done.marker", "wb"):
        pass


@pytest.fixture(scope="session")
def make_odd_episode() -> Callable[[Path], None]:
    return _make_odd_episode
