"""The shaped link: it carries, it stays apart from the host, and nothing of it is left, however its process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import links
from bench.links import FAR, Link, LinkMissing, parse_rate
from bench.peers.backlog import Backlog

ROOT = Path(__file__).parents[2]
HOLD = 'import time; from bench.links import Link\nwith Link("10mbit"): print("up", flush=True); time.sleep(60)'


@pytest.fixture
def link() -> Iterator[Link]:
    try:
        with Link("10mbit") as made:
            yield made
    except LinkMissing as why:
        pytest.skip(str(why))


def namespaces(pid: int) -> list[str]:
    """Those of a process's links, by their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"fastship-{pid}-")]


def test_it_has_two_ends_and_the_host_sees_neither(link: Link) -> None:
    assert len(namespaces(os.getpid())) == 2
    for end in (link.near, link.far):
        seen = subprocess.run([*end.prefix, "ip", "-brief", "addr"], capture_output=True, text=True, check=True).stdout
        assert end.address in seen
    assert FAR not in subprocess.run(["ip", "-brief", "addr"], capture_output=True, text=True, check=True).stdout


def test_it_ends_with_its_block_also_by_an_error_and_with_a_process_inside(link: Link) -> None:
    before = namespaces(os.getpid())
    inside: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with Link("10mbit") as other:
            inside.append(subprocess.Popen([*other.near.prefix, "sleep", "60"]))
            while not Path(f"/proc/{inside[0].pid}/comm").read_text().startswith("sleep"):
                time.sleep(0.01)  # `ip netns exec` has not entered yet
            assert len(namespaces(os.getpid())) == 4
            raise EOFError

    with pytest.raises(EOFError):
        fail()
    assert inside[0].wait(10) == -signal.SIGKILL
    assert namespaces(os.getpid()) == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("link")  # skips where there can be none
def test_it_ends_with_its_process(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        assert len(namespaces(holder.pid)) == 2
        holder.send_signal(how)
        assert holder.wait(10) == -how
    end = time.monotonic() + 20
    while namespaces(holder.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert namespaces(holder.pid) == []


def test_without_root_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LinkMissing, match="root"), Link("10mbit"):
        pass


def test_without_its_programs_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(LinkMissing, match="apt install iproute2"), Link("10mbit"):
        pass


def test_rates_are_written_as_for_tc() -> None:
    assert [parse_rate(text) for text in ("64kbit", "10mbit", "2.5gbit")] == [64_000, 10_000_000, 2_500_000_000]
    with pytest.raises(ValueError, match="10mbit"):
        parse_rate("10")


def test_a_piece_of_a_backlog_goes_back(tmp_path: Path) -> None:
    whole = Backlog(tmp_path / "spool", 4, 400)
    for number in range(4):
        (whole.episodes / f"ep-{number}").mkdir(parents=True)
    with links.piece_of(whole, 1) as piece:
        assert (piece.episode_count, piece.raw_bytes) == (1, 100)
        assert os.listdir(piece.episodes) == ["ep-0"]
        assert len(os.listdir(whole.episodes)) == 3
    assert len(os.listdir(whole.episodes)) == 4
    assert os.listdir(tmp_path) == ["spool"]
    with links.piece_of(whole, 9) as all_of_it:
        assert all_of_it == whole
