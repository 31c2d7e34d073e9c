"""An operator's words to the daemon, by files."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from sample import files_below, hold_record, make_episode

from fastship.ages import Ages
from fastship.errors import UsageError
from fastship.spool import Spool, requests
from fastship.spool.requests import Answer, Effect, Request


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool")
    made.create()
    return made


def test_a_request_is_answered(spool: Spool) -> None:
    directory = spool.paths.requests
    reply = Answer(ok=False, text="no", remedy="try")
    request = Request(action="retry", episode="ep", new_id="ep-2")
    seen: list[Request | None] = []
    stop = threading.Event()

    def serve() -> None:
        while not seen and not stop.is_set():
            for path, one in requests.pending(directory):
                requests.answer(path, reply)
                seen.append(one)
            time.sleep(0.001)

    daemon = threading.Thread(target=serve)
    daemon.start()
    try:
        assert requests.submit(directory, request, timeout_s=60.0) == reply
    finally:
        stop.set()
        daemon.join()
    assert seen == [request]
    assert os.listdir(directory) == []


def test_a_request_nobody_serves_is_withdrawn(spool: Spool) -> None:
    assert requests.submit(spool.paths.requests, Request(action="drop", episode="ep"), timeout_s=0.05) is None
    assert os.listdir(spool.paths.requests) == []


def test_what_cannot_be_read_is_none_and_what_is_no_request_is_left_out(spool: Spool) -> None:
    directory = spool.paths.requests
    for name, raw in {
        "a.json": b"{",
        "b.json": b'{"action": "explode", "episode": "ep"}',
        "c.json": b'{"action": "drop", "episode": "ep"}',
        "d.answer": b"{}",
        ".tmp-e.json.1": b"torn",
        ".tmp-f.json": b"torn",
    }.items():
        (directory / name).write_bytes(raw)
    (directory / "g.json").mkdir()
    (directory / "h.json").symlink_to("c.json")
    found = requests.pending(directory)
    assert [(path.name, request) for path, request in found] == [
        ("a.json", None),
        ("b.json", None),
        ("c.json", Request(action="drop", episode="ep")),
    ]
    for path, _ in found:
        requests.answer(path, Answer(ok=True, text="done"))
    assert requests.pending(directory) == []


def test_a_name_that_is_not_utf8_comes_through(spool: Spool) -> None:
    request = Request(action="drop", episode=os.fsdecode(b"caf\xe9\n"))
    assert requests.submit(spool.paths.requests, request, timeout_s=0.0) is None  # nobody serves: it can be written
    path = spool.paths.requests / "1.json"
    path.write_bytes(requests._encode(request))
    assert requests.pending(spool.paths.requests) == [(path, request)]
    reply = Answer(ok=True, text=f"{request.episode} is gone")
    requests.answer(path, reply)
    assert requests._decode(path.with_suffix(".answer").read_bytes(), Answer) == reply


def test_a_request_is_removed_also_where_there_is_no_room_for_its_answer(spool: Spool) -> None:
    path = spool.paths.requests / "1.json"
    path.write_bytes(b"{}")
    path.with_suffix(".answer").mkdir()
    with pytest.raises(OSError, match="directory"):
        requests.answer(path, Answer(ok=True, text="done"))
    assert not path.exists()


def test_old_answers_are_forgotten(spool: Spool) -> None:
    directory = spool.paths.requests
    for name in ("old.answer", "new.answer"):
        (directory / name).touch()
    (directory / "directory").mkdir()
    for name in ("old.answer", "directory"):
        os.utime(directory / name, (1, 1))
    ages = Ages(directory.parent / "clock.json")
    ages.look()
    requests.forget_old(directory, ages, older_than_s=3600.0)
    assert sorted(os.listdir(directory)) == ["directory", "new.answer"]


def test_retry_and_drop(spool: Spool) -> None:
    for name in ("a", "b"):
        make_episode(spool.paths.episodes, name)
        spool.quarantine(name, status_code=422, error="e", body="")
    effect = requests.carry_out(spool, Request(action="retry", episode="a", new_id="a-2"))
    assert (effect.gone, effect.ready) == (None, "a-2")
    assert "a-2" in effect.text
    effect = requests.carry_out(spool, Request(action="drop", episode="b"))
    assert (effect.gone, effect.ready) == (None, None)
    assert os.listdir(spool.paths.quarantine) == []
    assert os.listdir(spool.paths.episodes) == ["a-2"]


@pytest.mark.parametrize("new_id", [None, "ep-2"])
def test_keep_local(spool: Spool, new_id: str | None) -> None:
    make_episode(spool.paths.episodes, "ep")
    spool.hold(hold_record("ep"))
    effect = requests.carry_out(spool, Request(action="keep-local", episode="ep", new_id=new_id))
    assert (effect.gone, effect.ready) == (("ep", "ep-2") if new_id else (None, "ep"))
    assert os.listdir(spool.paths.episodes) == [effect.ready]


def test_drop_local(spool: Spool) -> None:
    make_episode(spool.paths.episodes, "ep")
    spool.hold(hold_record("ep"))
    effect = requests.carry_out(spool, Request(action="drop-local", episode="ep"))
    assert isinstance(effect, Effect)
    assert (effect.gone, effect.ready) == ("ep", None)
    assert os.listdir(spool.paths.quarantine) == ["ep"]


@pytest.mark.parametrize("action", ["retry", "drop", "keep-local", "drop-local"])
@pytest.mark.parametrize("episode", ["", ".", "..", "nothing", "../episodes", "/etc", "a\0b", "x" * 300])
def test_a_word_about_nothing_is_refused_and_changes_nothing(
    spool: Spool, action: requests.Action, episode: str
) -> None:
    make_episode(spool.paths.episodes, "kept")
    make_episode(spool.paths.quarantine, "kept")
    before = files_below(spool.paths.root)
    with pytest.raises(UsageError) as refused:
        requests.carry_out(spool, Request(action=action, episode=episode))
    assert refused.value.remedy
    assert files_below(spool.paths.root) == before
