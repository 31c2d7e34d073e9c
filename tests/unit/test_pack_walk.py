"""The walk: canonical order, any depth with few descriptors, and no change of a directory unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastship.errors import EpisodeChanged, EpisodeUnreadable, PackError
from fastship.pack import walk as walk_module
from fastship.pack.walk import walk

component = st.sampled_from([b"a", b"a-", b"a.b", b"a0", b"b", b"B", b"\xff", "é".encode(), b"~"])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.sets(st.lists(component, min_size=1, max_size=4).map(tuple), max_size=25))
@settings(max_examples=60, deadline=None)
def test_the_order_is_that_of_full_paths(
    tmp_path_factory: pytest.TempPathFactory, paths: set[tuple[bytes, ...]]
) -> None:
    episode = tmp_path_factory.mktemp("walk") / "ep"
    episode.mkdir()
    for parts in sorted(paths, key=len, reverse=True):
        path = os.path.join(os.fsencode(episode), *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            open(path, "xb").close()
    names = [member for _, _, member, _ in walk(episode)]
    assert names == sorted(names)
    expected = {b"ep/"}
    for root, directories, files in os.walk(os.fsencode(episode)):
        below = b"ep/" + os.path.relpath(root, os.fsencode(episode)) + b"/"
        expected |= {(below + name).replace(b"/./", b"/") + b"/" for name in directories}
        expected |= {(below + name).replace(b"/./", b"/") for name in files}
    assert set(names) == expected


def make_deep(top: Path, depth: int, name: str = "d" * 20) -> None:
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_deep_nesting_needs_few_descriptors_and_no_long_path(tmp_path: Path) -> None:
    make_deep(tmp_path / "ep", 600)  # 12,600 bytes of path, three times PATH_MAX
    try:
        before = open_descriptors()
        most = members = 0
        for dir_fd, name, _, status in walk(tmp_path / "ep"):
            assert status is not None or os.stat(name, dir_fd=dir_fd).st_size == 0
            members += 1
            most = max(most, open_descriptors())
        assert members == 1201
        assert most <= before + walk_module.OPEN_DIRECTORIES + 1
        assert open_descriptors() == before
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "ep"], check=True)


def test_what_could_not_be_restored_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "MOST_NAME_BYTES", 100)
    make_deep(tmp_path / "ep", 10)
    with pytest.raises(EpisodeUnreadable, match="nested too deep") as refused:
        list(walk(tmp_path / "ep"))
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain-1.x", "plain-1.x"),
        ("größe 日本".encode(), "größe 日本"),
        (b"\xff\xe9", "\\xff\\xe9"),
        (b"a\x1b[31m\nb\x7f", "a\\x1b[31m\\x0ab\\x7f"),
        ("\u202etxt\u2028".encode(), "\\xe2\\x80\\xaetxt\\xe2\\x80\\xa8"),
        (b"a" * 5000, "a" * 500 + "..." + "a" * 500),
    ],
)
def test_names_are_shown_harmlessly(name: bytes, shown: str) -> None:
    assert walk_module.printable(name) == shown


def test_a_walk_left_early_closes_what_it_opened(tmp_path: Path) -> None:
    make_deep(tmp_path / "ep", 10)
    before = open_descriptors()
    entries = walk(tmp_path / "ep")
    for _ in range(8):
        next(entries)
    assert open_descriptors() > before
    entries.close()  # type: ignore[attr-defined]
    assert open_descriptors() == before


def walk_and(episode: Path, at: bytes, change: Callable[[], object]) -> None:
    """Walk it all, and ``change`` it at the member ``at``."""
    for _, _, member, _ in walk(episode):
        if member == at:
            change()


@pytest.mark.parametrize("kind", ["add", "remove", "replace", "rename"])
def test_a_directory_that_changes_is_noticed(tmp_path: Path, kind: str) -> None:
    episode = tmp_path / "ep"
    sub = episode / "sub"
    sub.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (sub / name).touch()
    (tmp_path / "new").touch()
    changes: dict[str, Callable[[], object]] = {
        "add": (sub / "z").touch,
        "remove": (sub / "a").unlink,
        "rename": lambda: (sub / "a").rename(sub / "aa"),
        "replace": lambda: (tmp_path / "new").replace(sub / "c"),
    }
    with pytest.raises(EpisodeChanged, match="ep/sub/"):
        walk_and(episode, b"ep/sub/b", changes[kind])


def test_a_directory_moved_while_far_below_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "OPEN_DIRECTORIES", 2)
    third = tmp_path / "ep" / "1" / "2" / "3"
    (third / "4").mkdir(parents=True)
    (third / "4" / "file").touch()
    (tmp_path / "other").mkdir()
    with pytest.raises(EpisodeChanged):
        walk_and(tmp_path / "ep", b"ep/1/2/3/4/file", lambda: third.rename(tmp_path / "other" / "3"))


def test_a_vanished_directory_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "ep" / "a").mkdir(parents=True)
    (tmp_path / "ep" / "b").mkdir()
    with pytest.raises(EpisodeChanged, match="ep/b/"):
        walk_and(tmp_path / "ep", b"ep/a/", (tmp_path / "ep" / "b").rmdir)


def test_no_such_episode_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(EpisodeChanged, match="gone"):
        list(walk(tmp_path / "gone"))
    (tmp_path / "file").touch()
    with pytest.raises(EpisodeChanged, match="file"):
        list(walk(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(EpisodeChanged):
        list(walk(tmp_path / "link"))
    with pytest.raises(PackError):
        list(walk(Path("/")))


def test_an_unreadable_directory_is_named_with_a_remedy(tmp_path: Path) -> None:
    locked = tmp_path / "ep" / "locked"
    locked.mkdir(parents=True)
    locked.chmod(0)
    script = """
import os, sys
from pathlib import Path
from fastship.errors import EpisodeUnreadable
from fastship.pack.walk import walk
fd = os.open(sys.argv[1], os.O_RDONLY)
os.setgid(65534); os.setuid(65534)
os.fchdir(fd)
try:
    list(walk(Path("ep")))
except EpisodeUnreadable as error:
    print(error, "|", error.remedy)
"""
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", script, str(tmp_path)]
    if os.geteuid() != 0:
        with pytest.raises(EpisodeUnreadable, match="ep/locked/"):
            list(walk(tmp_path / "ep"))
        return
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ep/locked/ cannot be read" in done.stdout
    assert "chmod" in done.stdout
