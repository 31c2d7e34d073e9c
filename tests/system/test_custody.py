"""Is it still there? ``fastship verify`` on the host, a receiver or plain server whose disk rots, and the way back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import Command, Daemon, Destination, Lab, Receiver, Reply, fastship, noise, read_back, tree, wait_until
from relay import Relay
from scripted_server import Head, Peer, Server

from bench.servers import Nginx

MakeLab = Callable[..., Lab]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def run(lab: Lab, *arguments: str) -> Ran:
    command = fastship(arguments[0], "-c", lab.settings_file(), *arguments[1:])
    ran = subprocess.run(command, capture_output=True, cwd=lab.root.parent, text=True, check=False)
    assert "Traceback" not in ran.stderr
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def spoil(path: Path, at: int = 20_000) -> None:
    """Flip a bit, and leave the times as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 8]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def ship(lab: Lab, *names: str) -> dict[str, dict[str, Any]]:
    before = {name: tree(lab.episode(name, files={"data": noise(100_000, name)})) for name in names}
    assert lab.once().shipped == len(names)
    return before


def test_what_is_there_is_equal(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab, "ep1", "ep2", "ep3")
    ran = run(lab, "verify", "--all", "--local")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("3 equal, 0 not; ")
    found = run(lab, "verify", "ep2", "--json").document
    (one,) = found["episodes"]
    assert (found["equal"], found["spoilt_receipts"]) == (1, [])
    assert one["checked"]["state"] == "equal"
    assert one["checked"]["found"]["artifact_sha256"] == one["checked"]["receipt"]["artifact"]["sha256"]
    assert one["checked"]["found"]["content_blake3"] == one["checked"]["receipt"]["content"]["blake3"]


def test_what_rotted_at_the_receiver_is_shipped_again(
    make_lab: MakeLab, own_receiver: Receiver, tmp_path: Path
) -> None:
    lab = make_lab(own_receiver.url)
    before = ship(lab, "ep1", "ep2", "ep3")
    spoil(own_receiver.artifact("ep2"))
    own_receiver.artifact("ep3").unlink()
    ran = run(lab, "verify", "--all")
    lines = sorted(ran.out.splitlines()[:-1])
    assert ran.code == 1
    assert lines[0].startswith("ep2: it rotted at the receiver: ")
    assert lines[0].endswith("it is set aside there as rotted/ep2.tar.zst")
    assert lines[1].startswith("ep3: the receiver does not have it")
    assert ran.out.splitlines()[2].startswith("1 equal, 2 not")
    again = run(lab, "verify", "--all", "--reship")
    assert again.code == 1
    assert "ep2 is back in episodes/ and will be shipped again" in again.out
    assert (lab.names("episodes"), lab.names("shipped")) == (["ep2", "ep3"], ["ep1"])
    waiting = run(lab, "verify", "ep2", "--reship")
    assert "it is in episodes/, to be shipped when its turn comes" in waiting.out
    assert lab.once().shipped == 2
    assert run(lab, "verify", "--all", "--local").code == 0
    for name, facts in before.items():
        assert tree(lab.shipped / name) == facts
        assert read_back(own_receiver, name, tmp_path / f"back-{name}", stock=False) == facts


def test_a_running_daemon_ships_it_again_by_itself(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab, "ep1")
    spoil(own_receiver.artifact("ep1"))
    with Daemon(lab.settings()) as daemon:
        wait_until(lambda: daemon.beats, "the daemon runs")
        ran = run(lab, "verify", "ep1", "--reship")
        assert "is back in episodes/" in ran.out, ran
        wait_until(lambda: "ep1" in own_receiver.stored() and lab.names("shipped") == ["ep1"], "it is shipped again")
        assert run(lab, "verify", "ep1", "--local").code == 0


def test_a_copy_here_that_is_not_what_was_shipped_is_told_and_not_shipped(
    make_lab: MakeLab, own_receiver: Receiver
) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab, "ep1")
    spoil(lab.shipped / "ep1" / "data")
    assert run(lab, "verify", "ep1").code == 0  # nobody asked for the copy
    ran = run(lab, "verify", "ep1", "--local")
    assert ran.code == 1
    assert ran.out.startswith("ep1: it is right at the receiver, but the copy in shipped/ep1 is not what was shipped")
    spoil(own_receiver.artifact("ep1"))
    refused = run(lab, "verify", "ep1", "--reship")
    assert refused.code == 1
    assert "it cannot be shipped again: the copy in shipped/ep1 is not what was shipped" in refused.out
    assert (lab.names("episodes"), lab.names("shipped")) == ([], ["ep1"])


def test_a_file_that_flips_behind_its_times_is_at_the_receiver_as_it_was_read(
    make_lab: MakeLab, destination: Destination, own_receiver: Receiver, tmp_path: Path
) -> None:
    """Nothing tells of it but its bytes: what was packed is what was read, and a later look finds the difference."""
    lab = make_lab(destination.url)
    before = tree(lab.episode("ep1", {"data": noise(100_000)}))
    destination.say("ep1", Reply(503))
    lab.once()
    assert lab.artifact().exists()
    spoil(lab.episodes / "ep1" / "data")
    lab.url = own_receiver.url
    assert lab.once().shipped == 1
    assert read_back(own_receiver, "ep1", tmp_path / "back", stock=False) == before
    assert run(lab, "verify", "ep1").code == 0
    ran = run(lab, "verify", "ep1", "--local")
    assert (ran.code, ran.out.count("the copy in shipped/ep1 is not what was shipped")) == (1, 1)


def test_the_copy_that_is_right_of_several_is_shipped_again(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    before = ship(lab, "ep1")
    (lab.shipped / "ep1~1").mkdir()
    (lab.shipped / "ep1~1" / "other").write_bytes(b"another one")
    own_receiver.artifact("ep1").unlink()
    assert "ep1 is back" in run(lab, "verify", "ep1", "--reship").out
    assert tree(lab.episodes / "ep1") == before["ep1"]
    os.rename(lab.episodes / "ep1", lab.shipped / "ep1~2")
    assert "ep1 is back" in run(lab, "verify", "ep1", "--reship").out
    assert tree(lab.episodes / "ep1") == before["ep1"]
    assert lab.once().shipped == 1


def test_a_spoilt_receipt_here_is_named_and_hides_nothing(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab, "ep1")
    ship(lab, "ep2")
    (journal,) = (lab.root / "receipts").iterdir()
    data = journal.read_bytes()
    at = data.index(b'"sha256":"') + 12
    journal.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    ran = run(lab, "verify", "--all")
    assert ran.code == 1
    assert f"receipts/{journal.name}, line 1, cannot be read" in ran.err
    assert ran.out.startswith("1 equal, 0 not")
    assert run(lab, "verify", "ep1", "--local").out.startswith("1 equal")  # by the receiver's own receipt


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("verify",), 2, "name some episodes, or --all"),
        (("verify", "ep1", "--all"), 2, "name some episodes, or --all"),
        (("verify", "nobody"), 2, "there is no receipt of nobody"),
        (("verify", "../ep1"), 2, "there is no receipt of ../ep1"),
        (("scrub", "--root", "gone"), 3, "is not a receiver's root: it has no episodes"),
        (("scrub",), 2, "no store is given"),
        (("scrub", "--root", "gone", "--rate", "fast"), 2, "--rate fast is not an amount of bytes"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(
    make_lab: MakeLab, destination: Destination, arguments: tuple[str, ...], code: int, said: str
) -> None:
    lab = make_lab(destination.url)
    ship(lab, "ep1")
    ran = run(lab, *arguments)
    assert ran.code == code
    assert said in ran.err
    assert "  try: " in ran.err
    assert not (lab.root.parent / "gone").exists()


def test_a_destination_that_cannot_say_is_told_of(make_lab: MakeLab, destination: Destination) -> None:
    lab = make_lab(destination.url, upload={"retries": 1})
    ship(lab, "ep1")
    for status, said in ((501, "cannot read again what it stored"), (503, "cannot be asked about ep1")):
        destination.say("ep1", Reply(status))
        ran = run(lab, "verify", "--all")
        assert (ran.code, ran.out) == (4, "")
        assert said in ran.err
        assert "  try: " in ran.err
    destination.close()
    assert run(lab, "verify", "--all").code == 4


def test_without_a_spool_nothing_is_made(make_lab: MakeLab, destination: Destination) -> None:
    lab = make_lab(destination.url)
    ran = run(lab, "verify", "--all")
    assert (ran.code, ran.out) == (3, "")
    assert "is not a spool yet" in ran.err
    assert os.listdir(lab.root) == ["episodes"]


# --- plain servers -------------------------------------------------------------------------------------------------


def stored_at(nginx: Nginx, episode: str) -> Path:
    return nginx.store / "v1" / "episodes" / episode


@pytest.fixture
def plain(make_lab: MakeLab, nginx: Nginx) -> Lab:
    """A spool that ships to nginx."""
    return make_lab(nginx.url, destination={"proof": "status"}, upload={"retries": 2, "retry_min_s": "10ms"})


def test_what_a_plain_server_has_is_fetched_and_looked_at(plain: Lab, nginx: Nginx) -> None:
    ship(plain, "ep1", "ep2", "ep3")
    asked = run(plain, "verify", "--all")
    assert asked.code == 4
    assert "fastship verify --download" in asked.err
    ran = run(plain, "verify", "--all", "--download", "--local")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("3 equal, 0 not; ")
    assert ran.out.endswith(" downloaded\n")
    (one,) = run(plain, "verify", "ep2", "--download", "--json").document["episodes"]
    assert one["checked"]["found"]["read_from"] == "download"
    assert one["checked"]["found"]["artifact_bytes"] == stored_at(nginx, "ep2").stat().st_size


def test_what_rotted_or_went_away_at_a_plain_server_is_shipped_again(plain: Lab, nginx: Nginx) -> None:
    before = ship(plain, "ep1", "ep2", "ep3", "ep4")
    whole = stored_at(nginx, "ep3").stat().st_size
    spoil(stored_at(nginx, "ep1"))
    stored_at(nginx, "ep2").unlink()
    os.truncate(stored_at(nginx, "ep3"), 50_000)
    ran = run(plain, "verify", "--all", "--download")
    lines = sorted(ran.out.splitlines()[:-1])
    assert (ran.code, ran.err, len(lines)) == (1, "", 3)
    assert "ep1: it rotted at the receiver: its " in lines[0]
    assert "is damaged" in lines[0]
    assert lines[1].startswith("ep2: the receiver does not have it: it is not stored there (status 404)")
    assert f"ep3: it rotted at the receiver: 50000 bytes are there, {whole} were shipped" in lines[2]
    again = run(plain, "verify", "--all", "--download", "--reship")
    assert again.out.count("is back in episodes/ and will be shipped again") == 3
    assert plain.names("shipped") == ["ep4"]
    assert plain.once().shipped == 3
    assert run(plain, "verify", "--all", "--download", "--local").code == 0
    assert {name: tree(plain.shipped / name) for name in before} == before


def test_anothers_artifact_at_a_plain_server_is_told_and_not_replaced(plain: Lab, nginx: Nginx) -> None:
    ship(plain, "ep1", "ep2")
    theirs = stored_at(nginx, "ep2").read_bytes()
    stored_at(nginx, "ep1").write_bytes(theirs)
    ran = run(plain, "verify", "ep1", "--download", "--reship")
    assert ran.code == 1
    assert ran.out.startswith("ep1: the receiver has another artifact: SHA-256 ")
    assert plain.names("episodes") == []


def test_without_its_receipt_the_copy_here_says_what_was_shipped(plain: Lab, nginx: Nginx) -> None:
    ship(plain, "ep1", "ep2")
    (journal,) = (plain.root / "receipts").iterdir()
    journal.unlink()
    assert run(plain, "verify", "ep1", "--download").out.startswith("1 equal, 0 not")
    stored_at(nginx, "ep1").write_bytes(stored_at(nginx, "ep2").read_bytes())
    ran = run(plain, "verify", "ep1", "--download", "--reship")
    assert (ran.code, plain.names("episodes")) == (1, [])
    assert ran.out.startswith("ep1: its receipt here is lost; what is there is whole, with BLAKE3 ")


def test_a_download_from_a_real_server_goes_on_where_its_line_was_cut(plain: Lab, nginx: Nginx) -> None:
    asked: list[bytes] = []

    class Cut(Relay):
        """Of each of the first connections so much comes back."""

        def carry(self, number: int, source: socket.socket, sink: socket.socket, *, outward: bool) -> None:
            left = 40_000 if number < 2 and not outward else 1 << 30
            while left > 0 and (piece := source.recv(min(left, 1 << 16))):
                left -= len(piece)
                if outward:
                    asked.extend(line for line in piece.split(b"\r\n") if line.lower().startswith(b"range: "))
                sink.sendall(piece)

    ship(plain, "ep1")
    with Cut(int(nginx.url.rpartition(":")[2])) as line:
        plain.url = line.url
        assert run(plain, "verify", "ep1", "--download").code == 0
    assert len(asked) == 2
    assert asked[0] < asked[1]


def test_a_receiver_of_our_own_can_be_fetched_from_too(make_lab: MakeLab, own_receiver: Receiver) -> None:
    lab = make_lab(own_receiver.url)
    ship(lab, "ep1", "ep2", "ep3")
    assert run(lab, "verify", "--all", "--download").out.startswith("3 equal, 0 not; ")
    spoil(own_receiver.artifact("ep2"))
    own_receiver.artifact("ep3").unlink()
    ran = run(lab, "verify", "--all", "--download")
    assert ran.code == 1
    assert "ep2: it rotted at the receiver: " in ran.out
    assert "ep3: the receiver does not have it" in ran.out


def test_an_interrupted_download_ends_at_once_and_without_a_traceback(plain: Lab, tmp_path: Path) -> None:
    ship(plain, "ep1")

    def endless(peer: Peer, _head: Head) -> None:
        peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        while True:
            peer.sock.sendall(bytes(100_000))

    with Server(endless) as server:
        plain.url = server.url
        arguments = ("verify", "ep1", "--download", "-c", plain.settings_file())
        with Command(*arguments, log=tmp_path / "log") as command:
            wait_until(lambda: server.heads, "the download has begun")
            command.signal(signal.SIGINT)
            assert command.wait() == 130
            assert "Traceback" not in command.log
