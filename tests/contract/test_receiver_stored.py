"""What a token may have stored: kept by however many processes, whoever dies, and given back what is taken out."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from receiver_process import WAIT_S, Reply, Server, Start, check_stored, make_artifact, sha256_field, wait_for

A: dict[str, Any] = {"Authorization": "Bearer token-a"}
B: dict[str, Any] = {"Authorization": "Bearer token-b"}
SMALL = 3000
LARGE = 700_000  # stored one by one, by another way than small ones


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def limit(tokens: Path, size: int) -> None:
    tokens.write_text(f"token-a name=a stored-bytes={size}\ntoken-b name=b\n")


def is_full(reply: Reply) -> bool:
    return reply.status == 507 and reply.json()["code"] == "stored-quota"


def truth(server: Server, owner: str = "name:a") -> int:
    """The bytes of what is in the store and is this owner's by its receipt."""
    found = 0
    for receipt in (server.root / "episodes").glob("*.receipt.json"):
        artifact = receipt.with_name(receipt.name.replace(".receipt.json", ".tar.zst"))
        if artifact.exists() and json.loads(receipt.read_bytes()).get("owner") == owner:
            found += artifact.stat().st_size
    return found


def account(server: Server, **fields: str) -> int:
    text = server.request("GET", "/metrics", **(fields or B)).body.decode()
    line = next(line for line in text.splitlines() if line.startswith('fastship_receiver_stored_bytes{owner="name:a"}'))
    return int(float(line.split()[-1]))


@pytest.mark.parametrize("workers", [1, 2])
def test_as_much_as_it_says_whichever_way_it_comes(start: Start, tokens: Path, workers: int) -> None:
    data = [make_artifact(f"e{number}", SMALL, number) for number in range(8)]
    most = sum(map(len, data[:4]))
    limit(tokens, most)
    server = start(token_file=str(tokens), workers=workers)
    assert server.put("e0", data[0], **A).status == 201
    location = server.create("e1", data[1], **A).headers["location"]
    assert server.append(location, data[1], 0, last=True, **A).status == 201
    assert server.put("e2", data[2], Expect="100-continue", **A).status == 201
    by_curl = ("-T", "-", "-H", "Authorization: Bearer token-a")  # chunked
    assert server.curl(*by_curl, f"{server.url}/v1/episodes/e3", send=data[3])[0] == 201
    assert account(server) == truth(server) == most
    way3 = {"Upload_Complete": "?0"}
    refused = [
        server.put("e4", data[4], **A),
        server.put("e4", data[4], Repr_Digest=sha256_field(data[4]), Expect="100-continue", **A),
        server.create("e4", data[4], **A),
        server.request("PUT", "/v1/episodes/e4", None, **way3, **A),
    ]
    assert all(map(is_full, refused)), [reply.body for reply in refused]
    told = refused[0].json()
    assert (told["stored_bytes"], told["max_bytes"]) == (most, most)
    assert "upload-complete" not in refused[0].headers
    chunked = server.curl(*by_curl, f"{server.url}/v1/episodes/e4", send=data[4])
    assert (chunked[0], json.loads(chunked[1])["code"]) == (507, "stored-quota")
    for number in range(4):  # what is stored is, whoever has how much
        assert server.put(f"e{number}", data[number], Repr_Digest=sha256_field(data[number]), **A).status == 200
        check_stored(server, f"e{number}", data[number], **A)
    assert server.put("e5", data[5], **B).status == 201
    assert "name:" not in server.request("GET", "/v1/receipts/e0", **B).body.decode()
    limit(tokens, most + len(data[4]))
    assert server.put("e4", data[4], **A).status == 201
    assert is_full(server.put("e6", data[6], **A))
    assert truth(server) == most + len(data[4])


def test_an_upload_that_fits_no_more_is_kept_until_it_does(start: Start, tokens: Path) -> None:
    data, other = make_artifact("kept", SMALL), make_artifact("other", SMALL, 1)
    most = max(len(data), len(other))
    limit(tokens, most)
    server = start(token_file=str(tokens))
    location = server.create("kept", data, **A).headers["location"]
    way3 = server.request("PUT", "/v1/episodes/way3", None, Upload_Complete="?0", **A).headers["location"]
    assert server.append(location, data[:1000], 0, **A).offset == 1000
    assert server.append(way3, data[:1000], 0, **A).offset == 1000
    assert server.put("other", other, **A).status == 201
    for refused in (
        server.append(location, data[1000:], 1000, last=True, **A),
        server.append(way3, data[1000:], 1000, **A),
    ):
        assert is_full(refused)
        assert refused.headers["upload-complete"] == "?0"
    limit(tokens, 2 * most)
    assert server.create("kept", data, **A).offset == 1000
    assert server.append(location, data[1000:], 1000, last=True, **A).status == 201
    check_stored(server, "kept", data, **A)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("way", ["small", "large", "resumable"])
def test_of_those_that_race_as_many_are_stored_as_may_be(start: Start, tokens: Path, workers: int, way: str) -> None:
    sized = SMALL if way == "small" else LARGE
    data = [make_artifact(f"e{number}", sized, number) for number in range(10)]
    limit(tokens, 5 * max(map(len, data)))
    server = start(token_file=str(tokens), workers=workers)
    replies: list[Reply] = []

    def run(number: int) -> None:
        episode = f"e{number}"
        if way == "resumable":
            location = server.create(episode, data[number], **A).headers["location"]
            all_there.wait(30)  # all were begun while there was room for each
            replies.append(server.append(location, data[number], 0, last=True, **A))
        else:
            replies.append(server.put(episode, data[number], **A))

    all_there = threading.Barrier(len(data))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reply.status for reply in replies) == [201] * 5 + [507] * 5
    assert all(is_full(reply) for reply in replies if reply.status == 507)
    assert account(server) == truth(server) <= 5 * max(map(len, data))


def test_what_an_operator_takes_out_may_be_stored_again(start: Start, tokens: Path) -> None:
    data = [make_artifact(f"e{number}", SMALL, number) for number in range(3)]
    limit(tokens, 2 * max(map(len, data)))
    server = start(token_file=str(tokens), workers=2)
    for number in range(2):
        assert server.put(f"e{number}", data[number], **A).status == 201
    assert is_full(server.put("e2", data[2], **A))
    for kind in ("tar.zst", "receipt.json"):
        (server.root / "episodes" / f"e0.{kind}").unlink()
    wait_for(lambda: server.put("e2", data[2], **A).status == 201)
    (server.root / "episodes" / "e1.tar.zst").unlink()
    server.kill()
    server = start(token_file=str(tokens))
    wait_for(lambda: account(server) == len(data[2]))  # counted at each start, too


def test_a_new_token_of_the_same_name_has_the_same_account(start: Start, tokens: Path) -> None:
    data = make_artifact("e", SMALL)
    limit(tokens, len(data))
    server = start(token_file=str(tokens))
    assert server.put("e", data, **A).status == 201
    tokens.write_text(f"token-new name=a stored-bytes={len(data)}\ntoken-b\n")
    assert is_full(server.put("f", make_artifact("f", SMALL, 1), Authorization="Bearer token-new"))


def test_what_was_stored_before_counts_for_nobody(start: Start, tokens: Path) -> None:
    server = start()
    data = [make_artifact(f"e{number}", SMALL, number) for number in range(2)]
    assert server.put("e0", data[0]).status == 201
    assert "owner" not in json.loads((server.root / "episodes" / "e0.receipt.json").read_bytes())
    server.kill()
    limit(tokens, len(data[1]))
    server = start(token_file=str(tokens))
    assert server.put("e1", data[1], **A).status == 201
    assert account(server) == len(data[1])


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is what stops the receiver at a system call")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("sized", [SMALL, LARGE])
def test_killed_where_an_artifact_gets_its_name(start: Start, tokens: Path, named: bool, sized: int) -> None:
    """Its bytes are added before, so what is there is never more than what was added."""
    data = [make_artifact(f"e{number}", sized, number) for number in range(4)]
    limit(tokens, 3 * max(map(len, data)))
    server = start(token_file=str(tokens))
    assert server.put("e0", data[0], **A).status == 201
    episodes = server.root / "episodes"
    at, call = (episodes, "fsync") if named else (episodes / "e1.tar.zst", "?link,?linkat")
    kill = ("-P", str(at), "-e", f"inject={call}:signal=SIGKILL", "-p", str(server.process.pid))
    strace = subprocess.Popen(["strace", "-f", "-o", "/dev/null", *kill], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    while "attached" not in (said := strace.stderr.readline()):
        if not said or "not permitted" in said:
            strace.wait(WAIT_S)
            pytest.skip("this machine lets nobody trace processes")
    with pytest.raises((OSError, http.client.HTTPException)):
        server.put("e1", data[1], **A)
    server.kill()
    strace.stderr.close()
    strace.wait(WAIT_S)
    assert (server.stored("e1") is not None) is named
    line = (server.root / "accounts" / "name.a").read_text()
    assert int(line.split()[0]) == len(data[0]) + len(data[1])

    server = start(token_file=str(tokens), workers=2)
    wait_for(lambda: account(server) == truth(server) == len(data[0]) + named * len(data[1]))
    assert server.put("e1", data[1], Repr_Digest=sha256_field(data[1]), **A).status == (200 if named else 201)
    assert server.put("e2", data[2], **A).status == 201
    assert is_full(server.put("e3", data[3], **A))
    check_stored(server, "e1", data[1], **A)
