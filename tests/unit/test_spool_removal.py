"""Removal for good: deep, wide, locked, linked and mounted trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastship.spool.removal import remove_tree


def make_deep(top: Path, depth: int, name: str) -> None:
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir(name, dir_fd=fd)
        os.mkdir("0", dir_fd=fd)  # a name that what is moved up could get
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_a_tree_deeper_than_python_and_descriptors_reach(tmp_path: Path) -> None:
    make_deep(tmp_path / "deep", 1500, "d" * 50)
    script = """
import resource, sys
from pathlib import Path
from fastship.spool.removal import remove_tree
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
print(remove_tree(Path(sys.argv[1])))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "deep")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert os.listdir(tmp_path) == []


def test_a_bushy_tree_goes_and_links_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    top = tmp_path / "top"
    for number in range(30):
        below = top / "a" / str(number) / "b" / "0"
        below.mkdir(parents=True)
        (below / "file").write_bytes(b"x")
        (below / "link").symlink_to(tmp_path / "outside")
        os.mkfifo(below / "fifo")
    assert remove_tree(top)
    assert not top.exists()
    assert (tmp_path / "outside" / "kept").exists()
    assert remove_tree(top)  # it is gone


def test_what_lets_nobody_in_goes_all_the_same(tmp_path: Path) -> None:
    locked = tmp_path / "top" / "locked" / "more"
    locked.mkdir(parents=True)
    (locked / "file").touch()
    for path in (locked, locked.parent, tmp_path / "top"):
        path.chmod(0)
    script = """
import os, sys
from pathlib import Path
from fastship.spool.removal import remove_tree
where = os.open(sys.argv[1], os.O_RDONLY)
if os.geteuid() == 0:
    for path in ("top/locked/more", "top/locked", "top", "."):
        os.chown(path, 65534, 65534, dir_fd=where)
    os.setgid(65534)
    os.setuid(65534)
os.fchdir(where)
print(remove_tree(Path("top")))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_what_is_mounted_there_is_left(tmp_path: Path) -> None:
    script = """
mount -t tmpfs none "$1/top/a/mounted" || exit 77
mkdir -m 0750 "$1/top/a/mounted/data" && touch "$1/top/a/mounted/data/file"
"$2" -c 'import sys; from pathlib import Path; from fastship.spool.removal import remove_tree
print(remove_tree(Path(sys.argv[1])))' "$1/top"
stat -c %a "$1/top/a/mounted/data" && ls "$1/top/a/mounted/data"
"""
    (tmp_path / "top" / "a" / "mounted").mkdir(parents=True)
    (tmp_path / "top" / "b").touch()
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Operation not permitted" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    assert done.stdout.split() == ["False", "750", "file"]
    assert not (tmp_path / "top" / "b").exists()
