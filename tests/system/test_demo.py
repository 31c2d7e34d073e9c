"""The demo: that it proves what it says, and that its comparison sees every kind of difference."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from lab import GENEROUS_S, wait_until

from fastship.demo import recorder
from fastship.demo.compare import Tree, differences
from fastship.errors import UsageError

DEMO = [sys.executable, "-m", "fastship", "demo"]


def demo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(cwd)}
    return subprocess.run(
        [*DEMO, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=110
    )


def test_the_demo_records_this_host_and_gets_all_of_it_back(tmp_path: Path) -> None:
    (tmp_path / "fastship.toml").write_text("[spool]\nroot = 7\n")  # the reader's own settings are left alone
    ran = demo("--dir", "kept", "--seconds", "1", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["EPISODE", "FILES", "RAW", "ARTIFACT", "RATIO", "SPEED", "VERDICT"]
    assert [line.split()[0] for line in lines[1:6]] == [f"host-{number}" for number in range(1, 6)]
    assert all(line.endswith("  equal") for line in lines[1:6])
    assert lines[6] == "5 of 5 episodes came back from the receiver equal, byte for byte"

    kept = tmp_path / "kept"
    for number in range(1, 6):
        shipped = kept / "spool" / "shipped" / f"host-{number}"
        assert list(differences(shipped, kept / "restored" / f"host-{number}")) == []
        assert (kept / "receiver" / "episodes" / f"host-{number}.tar.zst").is_file()
        _check_recording(shipped)


def _check_recording(episode: Path) -> None:
    """Real telemetry: of this very process's kind, in three formats, the marker last."""
    processes = [json.loads(line) for line in (episode / "processes.jsonl").read_text().splitlines()]
    assert any("python" in one["name"] for one in processes)
    assert (episode / "memory.csv").read_text().count("\n") > 2
    meta = json.loads((episode / "meta.json").read_text())
    columns = len(meta["cpu_times"]["columns"])
    size = (episode / "cpu_times.f64").stat().st_size
    assert size > 0
    assert size % (8 * columns) == 0
    assert len(meta["code_version"]["commit"]) == 40
    newest = max(path.stat().st_mtime_ns for path in episode.rglob("*") if path.is_file())
    assert (episode / "done.marker").stat().st_mtime_ns == newest


def test_the_demo_ships_copies_of_the_readers_own_directories(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    (source / "first run").mkdir(parents=True)
    (source / "second" / "deep").mkdir(parents=True)
    (source / "first run" / "data").write_bytes(os.urandom(300_000))
    (source / "second" / "deep" / "tool").write_bytes(b"#!/bin/sh\n")
    (source / "second" / "deep" / "tool").chmod(0o4751)
    (source / "second" / "link").symlink_to("nowhere")
    os.mkfifo(source / "second" / "fifo")
    os.mkdir(os.fsencode(source) + b"/second/\xff\n")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(source / "second")  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "file").write_bytes(b"x" * 10)
    looked = sorted((str(path), path.lstat().st_mtime_ns) for path in source.rglob("*"))
    ran = demo("--json", "--from", source, "--from", alone, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    rows = {one["episode"]: one for one in json.loads(ran.stdout)}
    assert {name: one["equal"] for name, one in rows.items()} == {"first-run": True, "second": True, "alone": True}
    assert rows["second"]["verdict"] == "equal (sockets left out: 1)"
    assert rows["alone"]["raw_bytes"] == 6 * 512  # three headers, one block of content, the end
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in source.rglob("*")) == looked
    assert not list(tmp_path.glob("fastship-demo-*"))


def test_a_terminated_demo_leaves_neither_receiver_nor_files(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--seconds", "600"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: list(tmp_path.glob("fastship-demo-*/spool/state/status.json")), "the shipping")
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("receive" in child.cmdline() for child in children)
        process.send_signal(signal.SIGTERM)
        assert process.wait(GENEROUS_S) == 130
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, GENEROUS_S)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_a_receiver_that_dies_is_told(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--seconds", "600", "--dir", "kept"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: (tmp_path / "kept/spool/state/status.json").exists(), "the shipping")
        for child in psutil.Process(process.pid).children():
            if "receive" in child.cmdline():
                child.kill()
        _, told = process.communicate(timeout=GENEROUS_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 3
    assert "the demo's receiver ended in the middle: exit status -9" in told
    assert "Traceback" not in told


# -- the comparison ------------------------------------------------------------------------------------------


def _remove(tree: Path) -> None:
    (tree / "a").unlink()


def _add(tree: Path) -> None:
    (tree / "new").touch()


def _flip_a_byte(tree: Path) -> None:
    facts = (tree / "a").stat()
    (tree / "a").write_bytes(b"0" * 999 + b"1")
    os.utime(tree / "a", ns=(facts.st_mtime_ns, facts.st_mtime_ns))


def _grow(tree: Path) -> None:
    facts = (tree / "a").stat()
    (tree / "a").write_bytes(b"0" * 1001)
    os.utime(tree / "a", ns=(facts.st_mtime_ns, facts.st_mtime_ns))


def _change_kind(tree: Path) -> None:
    (tree / "sub").rmdir()
    (tree / "sub").touch()


def _change_mode(tree: Path) -> None:
    (tree / "a").chmod(0o600)


def _change_time(tree: Path) -> None:
    os.utime(tree / "a", (1, 1))


def _change_link(tree: Path) -> None:
    (tree / "link").unlink()
    (tree / "link").symlink_to("b")


CHANGES = [_remove, _add, _flip_a_byte, _grow, _change_kind, _change_mode, _change_time, _change_link]


def make_tree(directory: Path) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "a").write_bytes(b"0" * 1000)
    (directory / "a").chmod(0o644)
    (directory / "link").symlink_to("a")
    for path in (directory / "a", directory / "sub", directory):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return directory


def test_equal_trees_are_equal(tmp_path: Path) -> None:
    seen = Tree()
    assert list(differences(make_tree(tmp_path / "1"), make_tree(tmp_path / "2"), seen)) == []
    assert (seen.files, seen.bytes, seen.sockets) == (1, 1000, 0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [0, 1])
def test_every_difference_is_seen(tmp_path: Path, change: Callable[[Path], None], side: int) -> None:
    trees = make_tree(tmp_path / "1"), make_tree(tmp_path / "2")
    change(trees[side])
    os.utime(trees[side], (1_700_000_000, 1_700_000_000))
    assert len(list(differences(*trees))) == 1


def test_set_id_bits_are_asked_of_the_archive(tmp_path: Path) -> None:
    recorded, restored = make_tree(tmp_path / "1"), make_tree(tmp_path / "2")
    (recorded / "a").chmod(0o4644)
    assert stat.S_IMODE((recorded / "a").stat().st_mode) == 0o4644
    assert len(list(differences(recorded, restored))) == 1
    assert list(differences(recorded, restored, archived_modes={b"a": 0o4644})) == []
    assert len(list(differences(recorded, restored, archived_modes={b"a": 0o644}))) == 1


# -- names and room ------------------------------------------------------------------------------------------


def test_ids_are_made_valid_and_distinct(tmp_path: Path) -> None:
    for name in ("a b", "a-b", ".hidden", "ü", "x" * 250, "a\nb"):
        (tmp_path / name).mkdir()
    ids = [name for _, name in recorder.plan_copies([tmp_path])]
    assert len(set(ids)) == 6
    assert {"a-b", "a-b-2", "a-b-3", "hidden"} <= set(ids)


def test_no_room_is_told_before_anything_is_copied(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MB free") as caught:
        recorder.check_room(tmp_path, 1 << 62)
    assert "--dir" in caught.value.remedy
