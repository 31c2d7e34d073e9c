"""A receiver's processes: killed at every step, racing, watched over, started and ended."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import trustme
import zstandard
from receiver_process import LAUNCH, WAIT_S, Start, check_stored, make_artifact, sha256_field, wait_for

from fastship.settings import ReceiverSettings


def test_a_killed_receiver_goes_on_from_its_offset(start: Start) -> None:
    data = make_artifact("killed", 6_000_000)
    server = start(workers=2)
    location = server.create("killed", data).headers["location"]
    told = server.append(location, data[:1_000_000], 0).offset
    with server.begin_append(location, data[told:], told, 3_000_000):
        wait_for(lambda: server.request("HEAD", location).offset > 3_000_000)
        server.kill()
    server = start()
    created = server.create("killed", data)
    assert created.headers["location"] == location
    assert created.offset > 3_000_000
    assert server.append(location, data[created.offset :], created.offset, last=True).status == 201
    check_stored(server, "killed", data)
    assert server.stop() == 0


@pytest.mark.parametrize("same", [False, True])
def test_racing_uploads_of_one_id(start: Start, same: bool) -> None:
    server = start(workers=2)
    artifacts = [make_artifact("race", 2_000_000, seed=0 if same else seed) for seed in range(6)]
    replies: list[int] = []

    def run(index: int) -> None:
        fields = {"Repr_Digest": sha256_field(artifacts[index])} if index % 2 else {}
        replies.append(server.put("race", artifacts[index], **fields).status)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == ([200] * 5 + [201] if same else [201] + [409] * 5)
    stored = server.stored("race")
    assert stored in artifacts
    check_stored(server, "race", stored)


def test_processes_are_watched_over(start: Start) -> None:
    server = start(workers=2)
    children = psutil.Process(server.process.pid).children()
    assert len(children) == 2
    children[0].kill()
    wait_for(lambda: "starting another" in server.log.read_text())
    wait_for(lambda: len([c for c in psutil.Process(server.process.pid).children() if c.is_running()]) == 2)
    for _ in range(10):
        assert server.request("GET", "/healthz").status == 200
    metrics = server.request("GET", "/metrics").body.decode()
    assert 'fastship_receiver_requests_total{method="GET",status="200"} 10.0' in metrics
    everything = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    assert not [process for process in everything if process.is_running()]


def test_a_replacement_that_dies_while_it_starts_is_replaced_again(start: Start) -> None:
    server = start(workers=2)
    first = psutil.Process(server.process.pid)
    before = set(first.children())
    victim = before.pop()
    victim.kill()
    wait_for(lambda: bool(set(first.children()) - before - {victim}))
    replacement = (set(first.children()) - before - {victim}).pop()
    replacement.kill()
    known = before | {victim, replacement}
    wait_for(lambda: server.process.poll() is not None or bool(set(first.children()) - known))
    assert server.process.poll() is None
    assert server.request("GET", "/healthz").status == 200
    assert server.stop() == 0


def test_a_replacement_that_the_system_does_not_give_is_asked_for_again(start: Start) -> None:
    server = start(workers=2)
    first = psutil.Process(server.process.pid)
    victim, other = first.children()
    limit = first.rlimit(psutil.RLIMIT_NOFILE)
    first.rlimit(psutil.RLIMIT_NOFILE, (3, limit[1]))
    victim.kill()
    wait_for(lambda: "cannot be started" in server.log.read_text())
    assert server.request("GET", "/healthz").status == 200
    first.rlimit(psutil.RLIMIT_NOFILE, limit)
    wait_for(lambda: bool(set(first.children()) - {victim, other}))
    assert "Traceback" not in server.log.read_text()
    assert server.stop() == 0


def test_processes_end_with_the_first(start: Start) -> None:
    server = start(workers=2)
    children = psutil.Process(server.process.pid).children()
    server.process.kill()
    wait_for(lambda: all(map(is_gone, children)))


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_an_end_lets_the_request_finish(start: Start) -> None:
    server = start()
    data = make_artifact("ending", 500_000)
    location = server.create("ending", data).headers["location"]
    with server.begin_append(location, data, 0, 100_000) as connection:
        wait_for(lambda: server.request("HEAD", location).status == 204)
        server.process.terminate()
        time.sleep(0.3)
        connection.sendall(data[100_000:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 201 ")
    assert server.process.wait(WAIT_S) == 0
    assert server.stored("ending") == data


def test_an_end_does_not_wait_for_a_long_verification(start: Start) -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    data = frame * 8192  # 512 GiB of zeros
    server = start()
    location = server.create("long", data).headers["location"]
    lock = server.root / "uploads" / f"{location.rpartition('/')[2]}.lock"

    def is_verified() -> bool:
        with open(lock) as file:
            for _ in range(5):  # a write holds it for a moment only
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.1)
                else:
                    return False
        return lock.with_suffix(".part").stat().st_size == len(data)

    with server.begin_append(location, data, 0, len(data)):
        wait_for(is_verified)
        assert server.stop() == 0
    server = start(verify="artifact")
    assert server.create("long", data).offset == len(data)
    assert server.append(location, b"", len(data), last=True).status == 201


def test_a_restart_knows_everything(start: Start) -> None:
    data, half = make_artifact("known"), make_artifact("half", 100_000)
    server = start()
    assert server.put("known", data).status == 201
    location = server.create("half", half).headers["location"]
    server.append(location, half[:5000], 0)
    ended = server.create("tomb", data).headers["location"]
    server.append(ended, data, 0, last=True)
    assert server.stop() == 0
    server = start()
    assert server.put("known", data, Repr_Digest=sha256_field(data)).status == 200
    assert server.create("half", half).offset == 5000
    assert server.append(ended, data, 0, last=True).status == 201
    assert server.append(location, half[5000:], 5000, last=True).status == 201  # its digest is read from the file
    check_stored(server, "half", half)


STEPS = [
    ("fsync", 1),
    ("fsync", 2),
    ("fsync", 3),
    ("rename", 1),
    ("link", 1),
    ("unlink", 1),
]
SMALL = 0  # way 1, for an artifact that is stored together with others


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is what stops the receiver at a system call")
@pytest.mark.parametrize(
    ("call", "number", "way"), [(*step, way) for step in STEPS for way in (SMALL, 1, 2)] + [("rename", 2, 2)]
)
def test_killed_at_each_step_of_publishing(start: Start, call: str, number: int, way: int) -> None:
    """Stopped before the system call of that number, the receiver then stores or has stored the episode whole."""
    data = make_artifact("step", 200_000)
    server = start()
    location = server.create("step", data).headers["location"]
    if way == 2:
        server.append(location, data[:-1], 0)
    server.kill()

    # Python calls the older or the newer of a call's forms, as the architecture has them; "?" allows for both.
    calls = f"?{call},?{call}at" + (",?renameat2" if call == "rename" else "")
    trace = ("-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={number}")
    server = start()
    attach = ["strace", "-f", "-o", "/dev/null", *trace, "-p", str(server.process.pid)]  # not to what its start syncs
    strace = subprocess.Popen(attach, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline()
    if "not permitted" in said:
        strace.wait(WAIT_S)
        pytest.skip("this machine lets nobody trace processes")
    assert "attached" in said
    killed = False
    try:
        if way == SMALL:
            content_bytes = zstandard.get_frame_parameters(data).content_size
            server.put("step", data, Repr_Digest=sha256_field(data), Fastship_Content_Length=str(content_bytes))
        elif way == 1:
            server.put("step", data, Repr_Digest=sha256_field(data))
        else:
            server.append(location, data[-1:], len(data) - 1, last=True)
    except (OSError, http.client.HTTPException):
        killed = True
    assert killed, "the publishing does not have this step any more: correct the list"
    server.kill()
    strace.stderr.close()
    strace.wait(WAIT_S)

    server = start()
    before = server.stored("step")
    assert before in (None, data)
    if before is not None:
        wait_for((server.root / "episodes" / "step.receipt.json").exists)
        check_stored(server, "step", data)
    again = server.create("step", data)
    if before is not None:
        assert again.status == 200
    else:
        # The other way's upload is still there, or begins anew; either way it ends well.
        assert again.status == 201
        done = server.append(again.headers["location"], data[again.offset :], again.offset, last=True)
        assert done.status == 201
    check_stored(server, "step", data)


def test_tls_with_client_certificates(start: Start, tmp_path: Path) -> None:
    ca = trustme.CA()
    cert, key, ca_file, mine = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem", "client.pem"))
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(ca_file)
    ca.issue_cert("lab@example.org").private_key_and_cert_chain_pem.write_to_path(mine)
    server = start(tls_cert=str(cert), tls_key=str(key), client_ca=str(ca_file))
    assert server.url.startswith("https://")
    file = tmp_path / "a"
    file.write_bytes(make_artifact("tls"))
    options = ["--cacert", str(ca_file), "-T", str(file), f"{server.url}/v1/episodes/tls"]
    assert server.curl("--cert", str(mine), *options)[0] == 201
    context = ssl.create_default_context(cafile=str(ca_file))
    connection = http.client.HTTPSConnection(server.host or "", server.port, context=context, timeout=WAIT_S)
    with contextlib.closing(connection), pytest.raises(OSError):  # noqa: PT011, PT012 - no certificate of the client
        connection.request("GET", "/healthz")  # with TLS 1.3 the refusal may come only with the answer
        connection.getresponse()


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    missing = str(tmp_path / "missing")
    code = LAUNCH.replace("sys.exit(serve(", "from fastship.errors import ReceiverError\ntry: serve(").replace(
        "flush=True)))", "flush=True))\nexcept ReceiverError as e: print(e.message, '->', e.remedy)"
    )
    with taken:
        for settings, told in (
            (ReceiverSettings(root=""), "receiver.root is not set"),
            (ReceiverSettings(root="/proc/nowhere"), "cannot be used"),
            (ReceiverSettings(root=str(tmp_path / "r"), listen=f"127.0.0.1:{port}"), "cannot listen"),
            (ReceiverSettings(root=str(tmp_path / "r"), listen="nonsense"), "is not an address"),
            (ReceiverSettings(root=str(tmp_path / "r"), token_file=missing), "cannot be read"),
            (ReceiverSettings(root=str(tmp_path / "r"), commits_file=missing), "cannot be read"),
            (ReceiverSettings(root=str(tmp_path / "r"), tls_cert=missing, tls_key=missing), "TLS files"),
        ):
            command = [sys.executable, "-c", code, msgspec.json.encode(settings).decode()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
            assert told in done.stdout
            assert done.stdout.strip().split("->")[1]
            assert "Traceback" not in done.stderr


def test_a_serving_process_that_cannot_start_says_why_in_a_line(tmp_path: Path) -> None:
    """The root may be full, or gone, by the time that one takes the place of another."""
    said, says = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        handed = [listening.fileno(), says]
        settings = msgspec.json.encode(ReceiverSettings(root="/proc/nowhere")).decode()
        command = [sys.executable, "-m", "fastship.receiver", settings, *map(str, handed)]
        done = subprocess.run(command, pass_fds=handed, capture_output=True, text=True, timeout=WAIT_S, check=False)
    os.close(said)
    os.close(says)
    assert done.returncode == 3
    assert "cannot be used" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_written_outside_the_root(start: Start, tmp_path: Path) -> None:
    server = start(workers=2)
    server.put("inside", make_artifact("inside"))
    server.create("other", b"x")
    assert server.stop() == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"root", "root.log"}
    assert {entry.name for entry in (tmp_path / "root").iterdir()} == {"episodes", "uploads", "accounts", "secret"}
    assert os.stat(tmp_path / "root" / "secret").st_mode & 0o077 == 0


def test_a_signal_while_starting_ends_it(start: Start) -> None:
    server = start(workers=2)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_binding_and_serving_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastship", "receive", "--root", str(tmp_path / "root"), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def handles_signals() -> bool:
        """Its own handlers are there (``SigCgt`` of proc(5)); uvicorn's come much later."""
        caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    try:
        wait_for(handles_signals)
        process.send_signal(number)
        process.wait(WAIT_S)
    finally:
        process.kill()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is what makes the disk fail")
def test_bytes_that_failed_to_sync_are_not_told_by_the_next_sync(start: Start) -> None:
    """Linux reports a lost write to one fsync only; the one after it succeeds."""
    data = make_artifact("eio", 900_000)
    server = start()
    location = server.create("eio", data).headers["location"]
    server.append(location, data[:500_000], 0)
    server.kill()
    part = str(server.root / location.removeprefix("/v1/")) + ".part"
    fails = ("-P", part, "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO")
    try:
        server = start(prefix=("strace", "-f", "-qq", "-o", "/dev/null", *fails))
    except AssertionError as error:
        if "not permitted" in str(error):
            pytest.skip("this machine lets nobody trace processes")
        raise
    failed = server.append(location, data[500_000:], 500_000, last=True)
    assert (failed.status, failed.json()["code"]) == (500, "storage")
    server.kill()
    server = start()
    assert server.create("eio", data).offset == 0
    assert server.append(location, data, 0, last=True).status == 201
    check_stored(server, "eio", data)
