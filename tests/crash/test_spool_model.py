"""The supervisor on a real spool beside a small model of who may move what (`spool_beside`).

Hypothesis makes histories: recorders begin episodes, finish them, take the marker away, write on after it, rename,
replace and delete them, or give them names that cannot be ids; workers pack, ship, die and drain; the receiver stores,
refuses, has another content, is away, does not know the token, or stores and is not heard; operators release, drop and
retry what is held or quarantined, put it back by hand, remove holds, ship copies again or delete them; cores and disk
come and go; settings are read anew; a call of the disk fails, the disk is full for long, the supervisor is killed
between any two calls, and started again, for ever or for one pass. After each step every content is in one place, which
it was allowed to go to; after a look the book says what is on disk; after a start nothing stray is left; at the end all
is shipped but what is held or refused for a reason that holds.
"""

from __future__ import annotations

import os
import shutil

import faults
import pytest
from histories import go_through
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from spool_beside import DATA, Beside
from spool_workers import CLOCK, FAULTS, install

from fastship.episode import MARKER, is_episode_id
from fastship.lifecycle import events as ev
from fastship.pack import digest_content
from fastship.spool.layout import episode_of

HERE = "tests/crash/test_spool_model.py"
HISTORIES = 1500
STEPS = 60

names = st.sampled_from(["a", "a", "b", "b", "c", "x y", ".hidden", "a~1"])
ids = st.sampled_from(["a", "b", "c", "d"])
picks = st.integers(0, 1000)
modes = st.sampled_from(["well"] * 4 + ["token", "away", "page", "mute"])
seldom = st.sampled_from([False] * 4 + [True])


class History(Beside):
    def touch(self, place: str, *, marker: bool) -> None:
        """Times that no other moment has."""
        self.tokens += 1
        when = 1_700_000_000_000_000_000 + self.tokens * 1_000_000_007
        path = self.path(place)
        if marker:
            (path / MARKER).touch()
            os.utime(path / MARKER, ns=(when, when))
        os.utime(path / DATA, ns=(when, when))
        os.utime(path, ns=(when, when))
        token = self.token_at(place)
        assert token is not None
        self.digests[token] = digest_content(path, "keep", name="x").blake3

    def is_in_question(self, name: str) -> bool:
        """Whether something was found out of it that is not done yet: who changes it now is not noticed by anybody."""
        if is_episode_id(name) and self.spool.facts(name).condemned:
            return True
        if self.supervisor is None:
            return False
        if any(one.episode == name for one in self.supervisor._retirements):
            return True
        said = [one for hand in self.hands for one in hand.said if isinstance(one, ev.Answered)]
        return any(one.episode == name for one in said)

    @initialize(once=seldom)
    def begin(self, once: bool) -> None:
        for name in ("a", "b"):
            self.record(name, True, False)
        self.start(once=once)

    # --- recorders ---------------------------------------------------------------------------------------------

    @rule(name=names, finished=st.sampled_from([True, True, True, False]), refused=seldom)
    def record(self, name: str, finished: bool, refused: bool) -> None:
        path = self.spool.paths.episodes / name
        if path.exists() or (is_episode_id(name) and self.spool.facts(name).condemned):
            return
        path.mkdir()
        self.tokens += 1
        token = f"{self.tokens:05}"
        (path / DATA).write_text(token)
        place = f"episodes/{name}"
        self.where[token], self.may[token] = place, set()
        if refused:
            self.refused.add(token)
        if not is_episode_id(name):
            self.may[token].add("quarantine")
        self.touch(place, marker=finished)

    def pick_episode(self, pick: int, *, marked: bool | None = None) -> str | None:
        there = [where for where in self.where.values() if where.startswith("episodes/")]
        if marked is not None:
            there = [one for one in there if (self.path(one) / MARKER).exists() == marked]
        there = [one for one in there if not self.is_in_question(one.partition("/")[2])]
        return sorted(there)[pick % len(there)] if there else None

    @precondition(lambda self: self.pick_episode(0, marked=False))
    @rule(pick=picks)
    def finish_episode(self, pick: int) -> None:
        place = self.pick_episode(pick, marked=False)
        if place is not None:
            self.touch(place, marker=True)

    @precondition(lambda self: self.any_in("episodes"))
    @rule(pick=picks, how=st.sampled_from(["grow", "grow", "unmark", "delete", "replace", "rename"]), to=ids)
    def meddle(self, pick: int, how: str, to: str) -> None:
        """After the marker, where recorders and operators had better not."""
        place = self.pick_episode(pick, marked=True)
        if place is None:
            return
        token, path = self.token_at(place), self.path(place)
        assert token is not None
        if how == "grow":
            with (path / DATA).open("a") as file:
                file.write("more")
            self.touch(place, marker=True)
        elif how == "unmark":
            (path / MARKER).unlink()
            self.touch(place, marker=False)
        elif how == "rename":
            target = self.spool.paths.episodes / to
            if not target.exists() and not self.is_in_question(to):
                path.rename(target)
                self.where[token] = f"episodes/{to}"
                self.may[token].discard("quarantine")
        else:
            shutil.rmtree(path)
            del self.where[token]
            if how == "replace":
                self.record(path.name, True, False)

    # --- workers and the receiver --------------------------------------------------------------------------------

    @precondition(lambda self: self.hands)
    @rule(
        pick=picks,
        ends=st.sampled_from(["packed"] * 5 + ["changed", "failed"]),
        begun=st.booleans(),
        steps=st.integers(1, 3),
    )  # fmt: skip
    def pack(self, pick: int, ends: str, begun: bool, steps: int) -> None:
        for _ in range(steps):
            self.step_pack(self.hands[pick % len(self.hands)], ends=ends, begun=begun)

    @precondition(lambda self: self.hands and not self.draining)
    @rule(told=st.booleans())
    def go_on_changing(self, told: bool) -> None:
        """Whatever is packed now changes under it, time and again, and perhaps also when it is looked at for why."""
        for _ in range(3):
            CLOCK.now += 6.0
            for hand in self.hands:
                for _ in range(3):
                    self.step_pack(hand, ends="changed", begun=told)
                self.hear(hand, 9)
            if self.supervisor is not None:
                self.turn()

    @precondition(lambda self: any(hand.shipping for hand in self.hands))
    @rule(pick=picks)
    def answer(self, pick: int) -> None:
        ships = [(hand, episode) for hand in self.hands for episode in hand.shipping]
        self.step_answer(*ships[pick % len(ships)])

    @precondition(lambda self: any(hand.said or hand.exit_status is not None for hand in self.hands))
    @rule(pick=picks, count=st.integers(1, 6))
    def hears(self, pick: int, count: int) -> None:
        said = [hand for hand in self.hands if hand.said or hand.exit_status is not None]
        self.hear(said[pick % len(said)], count)

    @precondition(lambda self: self.hands)
    @rule(steps=st.integers(1, 4))
    def all_work(self, steps: int) -> None:
        """What mostly happens."""
        for _ in range(steps):
            for hand in self.hands:
                self.step_pack(hand)
                self.step_pack(hand)
                for episode in list(hand.shipping):
                    self.step_answer(hand, episode)
                self.hear(hand, 9)
            if self.supervisor is not None:
                self.turn()

    @precondition(lambda self: self.hands)
    @rule(pick=picks)
    def kill_worker(self, pick: int) -> None:
        hand = self.hands[pick % len(self.hands)]
        if hand.exit_status is None:
            self.die(hand)

    @rule(mode=modes, name=ids, there=st.sampled_from([None, None, True, False]))
    def receiver_is(self, mode: str, name: str, there: bool | None) -> None:
        """Well or not; and it has somebody else's episode of an id, or none any more."""
        self.mode = mode
        if there and name not in self.receiver.stored:
            self.receiver.stored[name] = "of another host"
        elif there is False:
            self.receiver.stored.pop(name, None)

    # --- operators ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.any_in("quarantine"))
    @rule(pick=picks, new_id=st.none() | ids)
    def retry(self, pick: int, new_id: str | None) -> None:
        picked = self.pick_in("quarantine", pick)
        if picked is None:
            return
        place, token = picked
        name = place.partition("/")[2]
        target = new_id or episode_of(name)
        self.may[token].add(f"episodes/{target}")
        done = self.operate("retry", name, new_id)
        self.answered(token, place, done, f"episodes/{target}")
        if done is None or self.troubled:
            self.unreasoned.add(token)

    @precondition(lambda self: self.any_in("quarantine"))
    @rule(pick=picks)
    def drop(self, pick: int) -> None:
        picked = self.pick_in("quarantine", pick)
        if picked is not None:
            place, token = picked
            self.may[token].add("")
            self.unreasoned.add(token)
            self.answered(token, place, self.operate("drop", place.partition("/")[2], None), "")

    @precondition(lambda self: bool(os.listdir(self.spool.paths.holds)))
    @rule(pick=picks, new_id=st.none() | ids)
    def keep_local(self, pick: int, new_id: str | None) -> None:
        place, token = self.pick_held(pick)
        if token is None:
            return
        if new_id is not None:
            self.may[token].add(f"episodes/{new_id}")
        target = place if new_id is None else f"episodes/{new_id}"
        self.answered(token, place, self.operate("keep-local", place.partition("/")[2], new_id), target)

    @precondition(lambda self: bool(os.listdir(self.spool.paths.holds)))
    @rule(pick=picks)
    def drop_local(self, pick: int) -> None:
        place, token = self.pick_held(pick)
        if token is not None:
            self.may[token].add("quarantine")
            self.answered(token, place, self.operate("drop-local", place.partition("/")[2], None), "quarantine")

    @precondition(lambda self: self.any_in("shipped"))
    @rule(pick=picks)
    def reship(self, pick: int) -> None:
        picked = self.pick_in("shipped", pick)
        if picked is not None:
            place, token = picked
            target = f"episodes/{episode_of(place.partition('/')[2])}"
            self.may[token].add(target)
            self.answered(token, place, self.operate("reship", place.partition("/")[2], None), target)

    @precondition(lambda self: bool(os.listdir(self.spool.paths.holds)))
    @rule(pick=picks)
    def hold_removed_by_hand(self, pick: int) -> None:
        place, token = self.pick_held(pick)
        if token is not None:
            (self.spool.paths.holds / f"{place.partition('/')[2]}.json").unlink()

    @precondition(lambda self: self.any_in("quarantine"))
    @rule(pick=picks, to=ids)
    def put_back_by_hand(self, pick: int, to: str) -> None:
        """A move from quarantine/, its reason left in it: shipped along, and taken out with the next one."""
        picked, target = self.pick_in("quarantine", pick), self.spool.paths.episodes / to
        if picked is None or target.exists() or self.is_in_question(to):
            return
        place, token = picked
        self.path(place).rename(target)
        self.where[token] = f"episodes/{to}"
        self.may[token].clear()
        self.unreasoned.add(token)
        self.touch(f"episodes/{to}", marker=True)

    @precondition(lambda self: self.any_in("shipped"))
    @rule(pick=picks, by=st.sampled_from(["hand", "retention"]))
    def copy_goes(self, pick: int, by: str) -> None:
        picked = self.pick_in("shipped", pick)
        if picked is None:
            return
        place, token = picked
        if by == "hand":
            shutil.rmtree(self.path(place))
            del self.where[token]
        elif self.supervisor is not None:
            shelf = self.supervisor._spool.shelf
            self.may[token].add("")
            self.work(lambda: shelf.remove(place.partition("/")[2]))

    def pick_in(self, parent: str, pick: int) -> tuple[str, str] | None:
        """A place in there, and what is in it."""
        there = sorted((where, token) for token, where in self.where.items() if where.startswith(f"{parent}/"))
        return there[pick % len(there)] if there else None

    def pick_held(self, pick: int) -> tuple[str, str | None]:
        held = [one.episode for one in self.spool.holds() if self.token_at(f"episodes/{one.episode}")]
        place = f"episodes/{held[pick % len(held)]}" if held else ""
        return place, self.token_at(place)

    def answered(self, token: str, before: str, done: bool | None, target: str) -> None:
        """What an operator is told is so."""
        if done is None or self.troubled:
            return
        now = self.where.get(token, "")
        if done:
            assert now == target or now.partition("/")[0] == target or self.was_moved_on(now, target)
            self.may[token].clear()
        else:
            assert now == before or before.startswith("episodes/"), f"refused, and moved to {now}"
            self.may[token].clear()

    def was_moved_on(self, now: str, target: str) -> bool:
        return target.startswith("episodes/") and now.partition("/")[0] in ("shipped", "quarantine")

    # --- what befalls it ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.supervisor is None)
    @rule(once=seldom)
    def starts(self, once: bool) -> None:
        self.start(once=once)

    @precondition(lambda self: self.supervisor is not None)
    @rule(seconds=st.sampled_from([0.0, 0.05, 0.5, 6.0, 100.0]))
    def turns(self, seconds: float) -> None:
        CLOCK.now += seconds
        self.turn()

    @precondition(lambda self: self.supervisor is not None)
    @rule(steps=st.integers(0, 3))
    def looks(self, steps: int) -> None:
        self.look()
        self.all_work(steps)

    @precondition(lambda self: self.supervisor is not None)
    @rule(kind=st.sampled_from(["killed", "killed", "drain", "reload", "reload"]))
    def signalled(self, kind: str) -> None:
        assert self.supervisor is not None
        if kind == "killed":
            self.end()
            return
        if kind == "reload":
            self.orders = self.orders[::-1]
        self.supervisor._signals.raised.add(kind)
        self.turn()

    @precondition(lambda self: self.supervisor is not None)
    @rule(cores=st.none() | st.integers(0, 2), short=st.booleans())
    def host_has(self, cores: int | None, short: bool) -> None:
        assert self.supervisor is not None
        self.supervisor._disk.next = ev.Room(short=short)  # type: ignore[attr-defined]
        if cores is not None and not self.once:
            self.supervisor._courtesy.next = ev.Budget(cores, "others want it")  # type: ignore[attr-defined]

    @precondition(lambda _: FAULTS.how is None)
    @rule(how=st.sampled_from(["stop", "stop", "stop", "EIO", "ENOSPC", "full"]), calls=st.integers(0, 25))
    def fault(self, how: str, calls: int) -> None:
        FAULTS.arm(how, calls)

    @precondition(lambda _: FAULTS.how == "full")
    @rule()
    def room_on_the_disk(self) -> None:
        FAULTS.forget()


@pytest.mark.timeout(1800)
def test_the_spool_is_where_its_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    Beside.tried = Beside.met = 0
    histories = go_through(History, HISTORIES, least=15, steps=STEPS)
    faults.count(
        "the spool beside its model",
        f"histories of up to {STEPS} steps: recorders, workers, verdicts, operators, restarts, {Beside.met} faults of"
        f" the disk and kills between two calls; each content where it may be after each of {Beside.tried} turns,"
        " nothing stray, and all shipped at the end that can be",
        of=HISTORIES,
        tried=histories,
        test=HERE,
    )
