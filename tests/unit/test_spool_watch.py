"""New markers by real inotify."""

from __future__ import annotations

import errno
import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inotify_simple import Event, flags
from sample import make_episode

from fastship.episode import MARKER
from fastship.spool.watch import MarkerWatch


class Post:
    """A watch over two directories, and what it has told so far."""

    def __init__(self, root: Path) -> None:
        self.episodes = root / "episodes"
        self.requests = root / "requests"
        self.episodes.mkdir()
        self.requests.mkdir()
        self.watch = MarkerWatch(self.episodes, self.requests)
        self.marked: list[str] = []
        self.asked = self.look = False

    def read(self, *, wait_s: float = 0.0) -> None:
        select.select([self.watch], [], [], wait_s)
        marked, asked, look = self.watch.read()
        self.marked += marked
        self.asked |= asked
        self.look |= look

    def settle(self) -> list[str]:
        """All that the kernel has queued: it queues before the call that caused it returns."""
        self.read()
        self.read()
        marked, self.marked = self.marked, []
        return marked

    def silent(self) -> bool:
        return not select.select([self.watch], [], [], 0)[0]


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    made = Post(tmp_path)
    yield made
    made.watch.close()


def mark(path: Path) -> None:
    (path / MARKER).touch()


def test_a_marker_made_in_a_new_directory(post: Post) -> None:
    path = make_episode(post.episodes, "ep", marker=False)
    assert post.settle() == []
    mark(path)
    assert not post.silent()
    assert post.settle() == ["ep"]
    assert post.silent()


def test_a_marker_renamed_into_place(post: Post) -> None:
    path = make_episode(post.episodes, "ep", marker=False)
    assert post.settle() == []
    (path / "marker.tmp").touch()
    assert post.settle() == []
    os.rename(path / "marker.tmp", path / MARKER)
    assert post.settle() == ["ep"]


def test_a_marker_set_before_the_directory_was_read_of(post: Post) -> None:
    make_episode(post.episodes, "ep")
    assert "ep" in post.settle()


def test_a_directory_moved_in_whole(post: Post, tmp_path: Path) -> None:
    with_marker = make_episode(tmp_path, "with")
    without = make_episode(tmp_path, "without", marker=False)
    os.rename(with_marker, post.episodes / "with")
    os.rename(without, post.episodes / "without")
    assert post.settle() == ["with"]
    mark(post.episodes / "without")
    assert post.settle() == ["without"]


def test_follow_tells_what_was_marked_already(post: Post, tmp_path: Path) -> None:
    paths = [make_episode(post.episodes, name, marker=False) for name in ("a", "b", "c")]
    watch = MarkerWatch(post.episodes, post.requests)  # began after they were made
    try:
        mark(paths[0])
        assert watch.follow(["a", "b", "c", "vanished"]) == ["a"]
        assert watch.follow(["b", "c"]) == []
        mark(paths[1])
        assert watch.read() == (["b"], False, False)
    finally:
        watch.close()


def test_what_is_no_longer_followed_is_silent(post: Post) -> None:
    paths = [make_episode(post.episodes, name, marker=False) for name in ("a", "b")]
    assert post.settle() == []
    assert post.watch.follow(["b"]) == []
    post.settle()
    for path in paths:
        mark(path)
    assert post.settle() == ["b"]


@pytest.mark.parametrize("looked_between", [False, True])
def test_a_directory_renamed_before_its_marker(post: Post, looked_between: bool) -> None:
    """A recorder that works under another name: the kernel keeps one watch for one directory, whatever its name."""
    path = make_episode(post.episodes, "working", marker=False)
    assert post.settle() == []
    os.rename(path, post.episodes / "ep")
    assert post.settle() == []
    if looked_between:
        assert post.watch.follow(["ep"]) == []
        assert post.settle() == []
    mark(post.episodes / "ep")
    assert post.settle() == ["ep"]


def test_removed_directories_are_forgotten_and_their_names_watched_anew(post: Post) -> None:
    for _ in range(3):
        path = make_episode(post.episodes, "ep", marker=False)
        assert post.settle() == []
        shutil.rmtree(path)
        assert post.settle() == []
        assert post.watch.follow([]) == []
    path = make_episode(post.episodes, "ep", marker=False)
    post.settle()
    mark(path)
    assert post.settle() == ["ep"]


def test_files_links_and_other_names_tell_nothing(post: Post, tmp_path: Path) -> None:
    outside = make_episode(tmp_path, "outside", marker=False)
    (post.episodes / "link").symlink_to(outside)
    (post.episodes / "file").touch()
    (post.episodes / MARKER).touch()
    path = make_episode(post.episodes, "ep", marker=False)
    mark(outside)
    mark(path / "sub")
    (path / f"{MARKER}.tmp").touch()
    assert post.settle() == []
    assert post.watch.follow(["link", "file"]) == []


def test_odd_names_come_through(post: Post) -> None:
    name = os.fsdecode(b"odd\n\xff")
    path = make_episode(post.episodes, name, marker=False)
    post.settle()
    mark(path)
    assert post.settle() == [name]


def test_requests_are_told(post: Post) -> None:
    assert post.settle() == []
    assert not post.asked
    (post.requests / "x.tmp").touch()
    os.rename(post.requests / "x.tmp", post.requests / "x.json")
    post.settle()
    assert post.asked
    assert not post.look


def test_an_overflow_asks_for_a_look(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowed:
        def __init__(self, real: Any) -> None:
            self.real = real

        def read(self, timeout: int) -> list[Event]:
            return [Event(-1, flags.Q_OVERFLOW, 0, ""), *self.real.read(timeout=timeout)]

    path = make_episode(post.episodes, "ep", marker=False)
    post.settle()
    mark(path)
    real = post.watch._inotify
    monkeypatch.setattr(post.watch, "_inotify", Overflowed(real))
    assert post.watch.read() == (["ep"], False, True)
    monkeypatch.setattr(post.watch, "_inotify", real)


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.ENOMEM, True), (errno.ENOENT, False)])
def test_a_limit_on_watches_is_survived(post: Post, monkeypatch: pytest.MonkeyPatch, number: int, full: bool) -> None:
    """The limit is the host's, so it is not lowered here; the kernel's refusal is played instead."""

    def refuse(path: str, mask: int) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(post.watch._inotify, "add_watch", refuse)
        make_episode(post.episodes, "a")
        make_episode(post.episodes, "b", marker=False)
        assert post.settle() == []
        assert post.watch.follow(["a", "b"]) == []
        assert post.watch.full is full
    assert post.watch.follow(["a", "b"]) == ["a"]  # when there is room again
