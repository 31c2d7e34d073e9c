"""How much each owner has stored: never too little, by whatever thread or process, and right once it is counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastship.receiver.store.accounts import Accounts, Full

A, B = "name:host-a", "token:" + "ab" * 16


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path, lambda owner: 100 if owner == A else 0)


def add(accounts: Accounts, owner: str, size: int) -> None:
    with accounts.adding(owner, size):
        pass


def test_as_much_as_one_may_have_and_no_more(accounts: Accounts, tmp_path: Path) -> None:
    add(accounts, A, 60)
    with pytest.raises(Full) as caught:
        add(accounts, A, 41)
    assert (caught.value.stored_bytes, caught.value.most_bytes) == (60, 100)
    add(accounts, A, 40)
    add(accounts, B, 1000)
    add(accounts, "", 1000)
    again = Accounts(tmp_path, lambda _owner: 0)
    assert again.all() == {A: 100, B: 1000}
    assert again.stored_bytes("name:other") == 0


def test_what_got_no_name_is_not_added(accounts: Accounts) -> None:
    with pytest.raises(FileExistsError), accounts.adding(A, 60):
        raise FileExistsError
    assert accounts.stored_bytes(A) == 0


def test_threads_and_processes_add_without_losing_anything(accounts: Accounts, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fastship.receiver.store.accounts import Accounts\n"
        "accounts = Accounts(Path(sys.argv[1]), lambda _owner: 0)\n"
        f"for _ in range(200):\n  with accounts.adding({B!r}, 3): pass\n"
    )
    beside = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])

    def add_all() -> None:
        for _ in range(200):
            add(accounts, B, 1)

    threads = [threading.Thread(target=add_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside.wait(60) == 0
    assert accounts.stored_bytes(B) == 200 * 3 + 4 * 200


def test_a_process_that_is_killed_within_leaves_too_much_and_its_lock_to_others(
    accounts: Accounts, tmp_path: Path
) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from fastship.receiver.store.accounts import Accounts\n"
        f"with Accounts(Path(sys.argv[1]), lambda _owner: 0).adding({A!r}, 30): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60).returncode == -9
    assert accounts.stored_bytes(A) == 30
    with accounts.counting() as put:
        assert put is not None
        put({})
    assert accounts.stored_bytes(A) == 0


def test_what_is_added_while_all_is_counted_is_not_lost(accounts: Accounts, tmp_path: Path) -> None:
    add(accounts, A, 50)
    add(accounts, B, 7)
    with accounts.counting() as put, accounts.counting() as second:
        assert put is not None
        assert second is None
        add(accounts, A, 20)
        add(accounts, "name:new", 9)
        put({A: 30, "name:lost": 4, "": 5, "name:../../x": 6})
    assert accounts.all() == {A: 50, B: 0, "name:new": 9, "name:lost": 4}
    assert set(os.listdir(tmp_path)) == {"name.host-a", f"token.{'ab' * 16}", "name.new", "name.lost", ".counting"}
    with accounts.counting() as put:
        assert put is not None
        put({A: 30})
    assert accounts.stored_bytes(A) == 30


def test_a_spoilt_account_is_nothing_until_all_is_counted(
    accounts: Accounts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for spoilt in (b"x" * 64, b"1 2 3", b"\0" * 64, b" "):
        (tmp_path / "name.host-a").write_bytes(spoilt)
        with caplog.at_level(logging.ERROR):
            assert accounts.stored_bytes(A) == 0
        add(accounts, A, 10)
        assert accounts.stored_bytes(A) == 10
    assert "host-a is spoilt" in caplog.text
