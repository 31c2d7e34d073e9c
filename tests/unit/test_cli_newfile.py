"""A file gets its name when it is whole, and not otherwise."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from fastship.cli.newfile import new_file, require_absent


def test_it_appears_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path, replace=False) as file:
        file.write(b"content")
        assert os.listdir(tmp_path) == ["file.partial"]
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("failing", ["body", "fsync", "link or replace"])
def test_what_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "file"
    if replace:
        path.write_bytes(b"old")
    for call in {"fsync": ["fsync"], "link or replace": ["link", "replace"]}.get(failing, []):
        monkeypatch.setattr(os, call, fail)

    def make() -> None:
        with new_file(path, replace=replace) as file:
            file.write(b"new")
            if failing == "body":
                fail()

    with pytest.raises(OSError, match="Input/output"):
        make()
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == ({"file": b"old"} if replace else {})


def test_what_was_killed_is_taken_away_by_the_next(tmp_path: Path) -> None:
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    partial.write_bytes(b"the longer beginning of one that was killed")
    with new_file(path, replace=False) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content"
    os.link(path, partial)  # killed between its last two steps
    with pytest.raises(FileExistsError), new_file(path, replace=False):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_else_is_taken_away(tmp_path: Path) -> None:
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    path.symlink_to("nowhere")
    partial.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        require_absent(path)
    assert partial.read_bytes() == b"somebody's"
    require_absent(tmp_path / "other")


def test_no_link_is_followed_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "file.partial").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic"), new_file(tmp_path / "file", replace=False):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_appeared_meanwhile_is_not_replaced_and_permissions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def make() -> None:
        with new_file(path, replace=False) as file:
            file.write(b"ours")
            path.write_bytes(b"another's")

    with pytest.raises(FileExistsError):
        make()
    assert path.read_bytes() == b"another's"
    path.chmod(0o600)
    with new_file(path, replace=True) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"ours"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
