"""The spool's directories, and whose they are."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastship.errors import SpoolBusy, SpoolError
from fastship.spool import Lock
from fastship.spool.layout import DIRECTORIES, Layout


def test_create_makes_what_is_missing_and_may_be_repeated(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "deep" / "spool")
    for _ in range(2):
        layout.create()
        assert all((layout.root / name).is_dir() for name in DIRECTORIES)
    (layout.episodes / "ep").mkdir()
    layout.receipts.rmdir()
    layout.create()
    assert layout.receipts.is_dir()
    assert (layout.episodes / "ep").is_dir()


@pytest.mark.parametrize("root", ["", "."])
def test_no_root_is_refused(root: str) -> None:
    with pytest.raises(SpoolError, match="no spool is set") as refused:
        Layout(Path(root)).create()
    assert "fastship init" in refused.value.remedy


def test_a_directory_that_cannot_be_looked_at_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path / "spool")
    layout.create()

    def unreadable(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "statvfs", unreadable)
    with pytest.raises(SpoolError, match="Input/output error") as refused:
        layout.create()
    assert "kernel's log" in refused.value.remedy
    monkeypatch.setattr(Path, "stat", unreadable)
    with pytest.raises(SpoolError, match="Input/output error") as refused:
        layout.require()
    assert "kernel's log" in refused.value.remedy


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_no_directory_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    layout = Layout(tmp_path / "spool")
    path = layout.root / name
    path.parent.mkdir(parents=True)
    if kind == "file":
        path.touch()
    else:
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpoolError) as refused:
        layout.create()
    assert str(path) in refused.value.message
    assert ("symbolic link" in refused.value.message) == (kind != "file")
    assert refused.value.remedy


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool").touch()
    with pytest.raises(SpoolError, match="cannot be used"):
        Layout(tmp_path / "spool").create()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_two_file_systems_are_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "spool")
    layout.shipped.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", layout.shipped], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(SpoolError, match="on different file systems") as refused:
            layout.create()
        assert str(layout.shipped) in refused.value.message
    finally:
        subprocess.run(["umount", layout.shipped], check=True)
    layout.create()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "spool")
    made.create()
    return made


def test_one_holder_at_a_time(layout: Layout) -> None:
    lock = Lock(layout.lock, wait_s=0.0)
    with pytest.raises(SpoolBusy) as refused:
        Lock(layout.lock, wait_s=0.05)
    assert refused.value.message == f"another fastship holds {layout.root} (process {os.getpid()})"
    assert "fastship status" in refused.value.remedy
    assert refused.value.exit_code == 5
    lock.release()
    lock.release()
    Lock(layout.lock, wait_s=0.0).release()


def test_a_lock_that_cannot_be_made_says_so(layout: Layout) -> None:
    with pytest.raises(SpoolError, match="cannot be made: No such file") as refused:
        Lock(layout.state / "gone" / "lock", wait_s=0.0)
    assert refused.value.remedy


def test_a_lock_whose_file_was_removed_or_replaced_is_not_ours(layout: Layout) -> None:
    lock = Lock(layout.lock, wait_s=0.0)
    assert lock.is_ours()
    layout.lock.unlink()
    assert not lock.is_ours()
    other = Lock(layout.lock, wait_s=0.0)
    assert other.is_ours()
    assert not lock.is_ours()
    lock.release()
    other.release()


def test_a_longer_holder_before_leaves_no_digits(layout: Layout) -> None:
    layout.lock.write_bytes(b"123456789012\n")
    lock = Lock(layout.lock, wait_s=0.0)
    assert layout.lock.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_child_that_inherited_the_lock_holds_it_until_it_ends(layout: Layout) -> None:
    lock = Lock(layout.lock, wait_s=0.0)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        pass_fds=[lock.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            child.stdout.readline()
            lock.release()
            with pytest.raises(SpoolBusy):
                Lock(layout.lock, wait_s=60.0)  # its holder (this process) runs: no use in waiting
            with subprocess.Popen([sys.executable, "-c", ""]) as ended:
                ended.wait()
            layout.lock.write_text(f"{ended.pid}\n")  # as if the holder had been killed and this were its worker
            with pytest.raises(SpoolBusy):
                Lock(layout.lock, wait_s=0.1)
            child.stdin.close()
            Lock(layout.lock, wait_s=60.0).release()  # it comes free when the child ends, and one waits for that
        finally:
            child.kill()


def test_a_child_that_was_not_given_the_lock_does_not_hold_it(layout: Layout) -> None:
    lock = Lock(layout.lock, wait_s=0.0)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        close_fds=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            lock.release()
            Lock(layout.lock, wait_s=0.0).release()
        finally:
            child.kill()


def test_a_full_disk_does_not_refuse_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    lock = Lock(tmp_path / "lock", wait_s=0.0)
    with pytest.raises(SpoolBusy):
        Lock(tmp_path / "lock", wait_s=0.0)
    lock.release()
