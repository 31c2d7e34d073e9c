"""Durable writing on a real file system; stopped at each call: tests/crash/test_spool_moves.py."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sample import files_below

from fastship import durable


def test_write_file_replaces_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for data in (b"first", b"", b"x" * 1_000_000):
        for sync in (True, False):
            durable.write_file(path, data, sync=sync)
            assert files_below(tmp_path) == {"file.json": data}
    durable.write_file(tmp_path / "secret", b"s", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_write_file_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def no_room(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="no room"):
        durable.write_file(path, b"new")
    assert files_below(tmp_path) == {"file": b"old"}


def test_write_all_goes_on_where_the_kernel_took_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with open(tmp_path / "file", "wb") as file:
        durable.write_all(file.fileno(), b"0123456789")
        durable.write_all(file.fileno(), memoryview(b"abcd"))
        durable.write_all(file.fileno(), b"")
    assert (tmp_path / "file").read_bytes() == b"0123456789abcd"


def test_directories_are_made_with_what_is_above_them_and_every_name_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = durable.sync_directory

    def sync(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(durable, "sync_directory", sync)
    wanted = [tmp_path / "a" / "b" / "c", tmp_path / "a" / "b" / "d"]
    for _ in range(2):
        durable.make_directories(wanted)
        assert all(path.is_dir() for path in wanted)
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b"]

    def refused(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(durable, "sync_directory", refused)
    durable.make_directories(wanted)  # somebody else's, above ours
    with pytest.raises(PermissionError):
        durable.make_directories([tmp_path / "e"])


def test_where_not_even_the_root_can_be_looked_at_making_directories_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0

    def cannot(_path: Path) -> bool:
        nonlocal looked
        looked += 1
        assert looked < 100
        return False

    monkeypatch.setattr(os.path, "lexists", cannot)
    durable.make_directories([tmp_path / "a"])
    assert (tmp_path / "a").is_dir()


def test_append_lines_closes_a_torn_line_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    durable.append_lines(path, [b"one", b"two"])
    with open(path, "ab") as file:
        file.write(b"torn")
    durable.append_lines(path, iter([b"three"]))
    durable.append_lines(path, [b"four"])
    assert path.read_bytes() == b"one\ntwo\ntorn\nthree\nfour\n"


def test_a_line_that_the_disk_does_not_take_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    durable.append_lines(path, [b"one"])
    write = os.write

    def half(fd: int, data: bytes | memoryview) -> int:
        if len(data) <= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            durable.append_lines(path, [b"a line of some length"])
    assert path.read_bytes() == b"one\n"
    monkeypatch.undo()
    durable.append_lines(path, [b"two"])
    assert path.read_bytes() == b"one\ntwo\n"


def test_move_refuses_any_target_and_says_which(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"x")
    (tmp_path / "in" / "dangling").symlink_to("nothing")
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "file").touch()
    for name in ("dangling", "empty", "file"):
        with pytest.raises(FileExistsError) as refused:
            durable.move(tmp_path / "source", tmp_path / "in" / name)
        assert refused.value.errno == errno.EEXIST
        assert refused.value.filename == str(tmp_path / "in" / name)
        assert refused.value.strerror
    durable.move(tmp_path / "source", tmp_path / "in" / "target")
    assert files_below(tmp_path / "in" / "target") == {"file": b"x"}
    durable.move(tmp_path / "in" / "target", tmp_path / "in" / "again")
    assert not (tmp_path / "source").exists()
    with pytest.raises(FileNotFoundError):
        durable.move(tmp_path / "source", tmp_path / "elsewhere")


def test_publish_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        durable.publish(tmp_path / "source", tmp_path / "taken")
    assert files_below(tmp_path) == {"source": b"new", "taken": b"old"}
    durable.publish(tmp_path / "source", tmp_path / "target")
    assert files_below(tmp_path) == {"target": b"new", "taken": b"old"}


def test_unlink_if_present(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert durable.unlink_if_present(tmp_path / "file") is True
    assert durable.unlink_if_present(tmp_path / "file") is False
    with pytest.raises(OSError, match="directory"):
        durable.unlink_if_present(tmp_path)


def test_only_files_of_ours_are_temporaries(tmp_path: Path) -> None:
    (tmp_path / f"{durable.TEMP_PREFIX}file.123").touch()
    (tmp_path / f"{durable.TEMP_PREFIX}directory").mkdir()
    (tmp_path / "kept").touch()
    durable.remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f"{durable.TEMP_PREFIX}directory", "kept"]


def test_sync_directory_refuses_a_file(tmp_path: Path) -> None:
    durable.sync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        durable.sync_directory(tmp_path / "file")


def test_the_boot_id_stays_the_same() -> None:
    assert durable.boot_id() == durable.boot_id()
    assert len(durable.boot_id()) == 36


def test_a_read_only_directory_is_renamed_by_its_owner() -> None:
    program = """
import os, pathlib, sys, tempfile
from fastship import durable
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
with tempfile.TemporaryDirectory() as root:
    source, target = pathlib.Path(root, "from", "ep"), pathlib.Path(root, "to", "ep")
    source.mkdir(parents=True)
    target.parent.mkdir()
    (source / "file").write_bytes(b"data")
    source.chmod(0o555)
    try:
        os.rename(source, target)
        sys.exit("the kernel lets it through: this test shows nothing")
    except PermissionError:
        pass
    durable.rename_directory(source, target)
    assert (target / "file").read_bytes() == b"data"
    assert target.stat().st_mode & 0o777 == 0o555, oct(target.stat().st_mode)
    target.chmod(0o755)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_of_temporaries_only_the_old_are_removed_where_others_may_be_writing(tmp_path: Path) -> None:
    old, young = (tmp_path / f"{durable.TEMP_PREFIX}{name}" for name in ("old", "young"))
    for path in (old, young, tmp_path / "file"):
        path.touch()
    for path in (old, tmp_path / "file"):
        os.utime(path, (1, 1))
    durable.remove_temporaries(tmp_path, is_old=lambda mtime: mtime < 1000.0)
    assert sorted(os.listdir(tmp_path)) == [young.name, "file"]


def test_threads_that_write_one_file_at_once_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    contents = [bytes([65 + number]) * (200_000 - 40_000 * number) for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(10):
            durable.write_file(path, content, sync=False)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as pool:
        for done in [pool.submit(write, content) for content in contents]:
            done.result()
    assert os.listdir(tmp_path) == ["receipt.json"]
