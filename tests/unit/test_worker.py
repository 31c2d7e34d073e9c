"""What a worker asks of an episode before anything of it is sent; the rest is shown in tests/system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sample import make_episode, manifest_of, shipped

from fastship import ipc
from fastship.lifecycle.events import Answered
from fastship.pack import fingerprint
from fastship.settings import Settings
from fastship.worker import GLANCE_MEMBERS, Worker, _Progress

SCRIPT = """
import os, sys
from pathlib import Path
from fastship.errors import EpisodeUnmovable
from fastship.worker import _require_movable
os.chdir(sys.argv[1])
os.setgid(65534)
os.setuid(65534)
episode, target = Path("episodes/ep"), Path("shipped")
try:
    _require_movable(episode, target)
    print("may")
except EpisodeUnmovable as error:
    print("may not", "|", error, "|", error.remedy)
try:
    os.chmod(episode, 0o755)  # as `durable.rename_directory` does for what is read-only
except PermissionError:
    pass
try:
    os.rename(episode, target / "ep")
    print("did")
except OSError as error:
    print("did not", error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
@pytest.mark.parametrize(
    ("owner", "mode", "parent_mode", "moved"),
    [
        (65534, 0o755, 0o755, True),
        (65534, 0o555, 0o755, True),
        (0, 0o777, 0o777, True),
        (0, 0o755, 0o777, False),
        (0, 0o777, 0o1777, False),
        (65534, 0o755, 0o1777, True),
    ],
)
def test_what_could_not_be_retired_is_known_before(
    tmp_path: Path, owner: int, mode: int, parent_mode: int, moved: bool
) -> None:
    tmp_path.chmod(0o755)
    for name in ("episodes", "episodes/ep", "shipped"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "shipped", 65534, 65534)
    if parent_mode == 0o755:
        os.chown(tmp_path / "episodes", 65534, 65534)
    os.chown(tmp_path / "episodes" / "ep", owner, owner)
    (tmp_path / "episodes" / "ep").chmod(mode)
    (tmp_path / "episodes").chmod(parent_mode)
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    told, happened = done.stdout.splitlines()
    assert told.split(" | ")[0] == ("may" if moved else "may not")
    assert (happened == "did") == moved
    assert moved or "owner" in told.split(" | ")[2]


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[tuple[Worker, ipc.SupervisorEnd]]:
    """A worker within this process, whose supervisor is the test."""
    settings = Settings.load(values={"spool": {"root": str(tmp_path)}, "destination": {"url": "http://127.0.0.1:9"}})
    ours, theirs = ipc.pair()
    worker = Worker(ipc.WorkerEnd(theirs), ipc.Welcome(1, settings, 1))
    yield worker, ours
    worker._drain()
    worker._session.close()
    ours.close()
    theirs.close()


def test_where_no_thread_can_be_started_a_verdict_is_told_all_the_same(
    beside: tuple[Worker, ipc.SupervisorEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, supervisor = beside
    manifest = msgspec.structs.replace(manifest_of("ep"), members=GLANCE_MEMBERS + 1)
    worker._manifests["ep"], worker._under_way["ep"] = manifest, _Progress()

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    worker._judged("ep", shipped(manifest))
    assert supervisor.receive() == Answered("ep", shipped(manifest), manifest, unchanged=False)


def test_an_episode_that_cannot_be_looked_at_once_more_has_not_changed(
    beside: tuple[Worker, ipc.SupervisorEnd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, supervisor = beside
    make_episode(tmp_path / "episodes", "ep")
    manifest = manifest_of("ep", fingerprint=fingerprint(tmp_path / "episodes" / "ep", owner=worker._options.owner))

    def answered() -> Answered:
        worker._manifests["ep"], worker._under_way["ep"] = manifest, _Progress()
        worker._judged("ep", shipped(manifest))
        told = supervisor.receive()
        assert isinstance(told, Answered)
        return told

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert answered() == Answered("ep", shipped(manifest), manifest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        told = answered()
    assert not told.unchanged
    assert "ep/ cannot be read: Input/output error" in told.unseen
    assert "changed" not in told.error
    (tmp_path / "episodes" / "ep" / "late").touch()
    assert answered() == Answered("ep", shipped(manifest), manifest, unchanged=False)
