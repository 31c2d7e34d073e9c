"""The rules alone, in a simulated world in which everything happens in every order that is possible.

Workers are queues of what they were told, in order, and what they said is heard in order, late, in batches, or (when
they are killed) up to any point; the disk is a set of episodes, some of which it will not let be moved; the book is
told only what a supervisor could know, and is obeyed as the supervisor does: retirements wait for a group commit, what
the disk refuses is told behind what waits to be told. After each step the book is in order, and telling it once more
that time goes by changes nothing; at the end, once the world behaves, each episode that can be shipped is, in a bounded
number of steps, whatever some others are stuck with, on a short disk as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import faults
import pytest
from histories import go_through
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sample import manifest_of, shipped, verdict

from fastship.episode import Manifest, Outcome, Scope, Verdict
from fastship.lifecycle import CLAIMED, Book, Policy, State, decide, next_wake
from fastship.lifecycle import events as ev
from fastship.lifecycle.sharing import QUEUE_DEPTH

HERE = "tests/crash/test_lifecycle_model.py"
HISTORIES = 4000
STEPS = 60

PAGE = verdict(Outcome.TRANSIENT, Scope.EPISODE, status=413)
CHANGED = "changed"
ANSWERS: list[Verdict | str] = [
    verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=401),
    verdict(Outcome.TRANSIENT, Scope.NETWORK),
    verdict(Outcome.TRANSIENT, Scope.DESTINATION, status=429, retry_after_s=60.0),
    verdict(Outcome.CONFLICT, Scope.EPISODE, status=409),
    verdict(Outcome.REJECTED, Scope.EPISODE, status=412),
    verdict(Outcome.DAMAGED, Scope.EPISODE),
    PAGE,
    "shipped",
    "shipped",
    CHANGED,
]
STUCK = ["", "", "", "", "", "too large", "immovable", "unreadable"]
IMPOSSIBLE = "no id"


def policy(**changes: Any) -> Policy:
    values: dict[str, Any] = {
        "cores": 2, "in_flight": 4, "poison_after": 3, "pause_min_s": 1.0, "pause_max_s": 8.0, "pause_after": 3,
    }  # fmt: skip
    return Policy(**(values | changes))


class World(RuleBasedStateMachine):
    tried = 0

    @initialize(once=st.booleans(), cores=st.integers(1, 4), in_flight=st.integers(1, 4))
    def begin(self, once: bool, cores: int, in_flight: int) -> None:
        self.book = Book(policy(once=once, cores=cores, in_flight=in_flight))
        self.now = 0.0
        self.backwards = False  # spool.order
        self.disk: dict[str, str] = {}  # episode -> "ready" or "held"
        self.artifacts: set[str] = set()
        self.frames: dict[str, int] = {}
        self.stuck: dict[str, str] = {}  # what an episode will always be
        self.told: dict[int, deque[str]] = {}  # worker -> assignments not begun
        self.packing: dict[int, str | None] = {}
        self.shipping: dict[int, dict[str, bool]] = {}  # and whether its upload has begun
        self.said: dict[int, deque[ev.Event]] = {}  # on their way to the supervisor
        self.draining: set[int] = set()
        self.numbers = 0
        self.names = 0
        self.kills: dict[str, int] = {}
        self.answers: dict[str, Verdict] = {}
        self.retirements: list[ev.Retire] = []

    # --- what becomes of commands, as in the supervisor's loop -----------------------------------------------------

    def tell(self, *told: ev.Event) -> None:
        events = deque(told)
        while events:
            event = events.popleft()
            for command in decide(self.book, event, self.now, more=bool(events)):
                events.extend(self.obey(command, event))
            World.tried += 1
        # Who was given his first while packing gives way has his share, and with it room for more, from then on only.
        for _ in range(2):
            for command in decide(self.book, ev.Tick(), self.now):
                self.obey(command, ev.Tick())
        again = decide(self.book, ev.Tick(), self.now)
        assert again == [], f"nothing happened, and it says {again}"

    def obey(self, command: ev.Command, why: ev.Event) -> Sequence[ev.Event]:
        match command:
            case ev.Measure():
                return [ev.Measured(command.episode, self.frames.get(command.episode, 1))]
            case ev.Assign():
                self.assigned(command)
            case ev.Share():
                assert command.worker in self.book.workers
                assert command.threads >= (0 if self.book.restrained else 1)
            case ev.Recall():
                assert command.worker not in self.draining
                self.recall(command.worker)
            case ev.Retire():
                answer = self.answers.pop(command.episode)
                assert answer.outcome is Outcome.SHIPPED
                assert answer.receipt is command.receipt
                assert isinstance(why, ev.Answered)
                assert why.unchanged
                assert command.manifest is why.manifest
                assert command.receipt.artifact.sha256 == command.manifest.artifact_sha256
                self.retirements.append(command)
            case ev.Quarantine():
                if isinstance(why, ev.Found):
                    assert command.episode == IMPOSSIBLE
                elif isinstance(why, ev.Answered):
                    assert why.verdict.outcome is Outcome.REJECTED
                else:
                    assert isinstance(why, ev.WorkerLeft)
                    assert self.kills[command.episode] >= self.book.policy.poison_after
                return self.moved(command.episode)
            case ev.Hold():
                assert isinstance(why, ev.Answered | ev.PackFailed)
                if self.stuck.get(command.episode) == "immovable":
                    return [self.undone(command.episode)]
                if command.episode in self.disk:
                    self.disk[command.episode] = "held"
            case ev.Discard():
                self.artifacts.discard(command.episode)
        return ()

    def moved(self, episode: str) -> Sequence[ev.Event]:
        """Out of ``episodes/``, or told that it would not go."""
        if episode == IMPOSSIBLE:
            return ()
        if episode not in self.disk or self.stuck.get(episode) == "immovable":
            return [self.undone(episode)]
        del self.disk[episode]
        self.artifacts.discard(episode)
        return ()

    def undone(self, episode: str) -> ev.Undone:
        return ev.Undone(episode, self.key(episode), "busy")

    def key(self, episode: str) -> str:
        return f"{9999 - int(episode[2:]):04d}" if self.backwards else episode

    def assigned(self, command: ev.Assign) -> None:
        holders = [worker for worker in self.told if command.episode in self.with_worker(worker)]
        assert holders == [], "an episode is with at most one worker"
        assert command.worker in self.told, "only to a worker that is there"
        assert command.worker not in self.draining
        assert not self.book.draining
        paused = self.book.restrained and not self.book.budget.cores
        if paused:
            assert command.episode in self.book.packed
        if self.book.room.short and command.episode not in self.book.packed:
            assert self.book.load(command.worker).packing == 1
            assert sum(self.book.load(worker).packing for worker in self.book.workers) == 1
            assert command.floor_bytes == self.book.room.lent_floor_bytes
        if self.book.breaker.paused:
            assert self.now >= self.book.breaker.until
            assert self.book.breaker.probe == command.episode
        elif not paused and not self.book.room.short:
            turn = self.book.entries[command.episode].key, command.episode
            behind = [item for item in self.book.ready if item < turn]
            assert not behind, "in order"
        self.told[command.worker].append(command.episode)

    def recall(self, worker: int) -> None:
        if worker in self.draining:
            return
        for episode in self.told[worker]:
            self.said[worker].append(ev.Returned(episode))
        self.told[worker].clear()
        for episode in [one for one, begun in self.shipping[worker].items() if not begun]:
            del self.shipping[worker][episode]
            self.said[worker].append(ev.Returned(episode))

    def with_worker(self, worker: int) -> list[str]:
        """What the supervisor has heard no end of from this worker."""
        unheard = [
            one.episode for one in self.said[worker] if isinstance(one, ev.Answered | ev.PackFailed | ev.Returned)
        ]
        packing = self.packing[worker]
        return [*self.told[worker], *([packing] if packing else []), *self.shipping[worker], *unheard]

    def retire(self) -> None:
        batch, self.retirements = self.retirements, []
        for one in batch:
            self.tell(*self.moved(one.episode))

    def look(self) -> None:
        self.retire()
        ready = sorted((self.key(name), name) for name, state in self.disk.items() if state == "ready")
        held = [name for name, state in self.disk.items() if state == "held"]
        impossible = [IMPOSSIBLE] if self.names % 7 == 3 else []
        self.tell(ev.Found(ready, held, impossible, packed=tuple(self.artifacts)))
        entries = self.book.entries
        left = {name for name, entry in entries.items() if entry.state not in CLAIMED and name not in self.disk}
        assert not left, "what is gone is not kept"
        assert self.disk.keys() <= entries.keys()
        assert self.book.undone.keys() <= self.disk.keys()
        assert all(entry.key == self.key(name) for name, entry in entries.items() if entry.state is State.READY)

    # --- what can happen on the disk ------------------------------------------------------------------------------

    @rule(frames=st.sampled_from([1, 1, 1, 2, 50]), noticed=st.booleans(), stuck=st.sampled_from(STUCK))
    def record(self, frames: int, noticed: bool, stuck: str) -> None:
        self.names += 1
        name = f"ep{self.names * 7919 % 1000:03d}"
        if name in self.disk:
            return
        self.disk[name] = "ready"
        self.frames[name], self.stuck[name] = frames, stuck
        if noticed and name not in self.book.entries:
            self.tell(ev.Found([(self.key(name), name)], complete=False))

    @rule()
    def look_through(self) -> None:
        self.look()

    @precondition(lambda self: self.retirements)
    @rule()
    def group_commit(self) -> None:
        self.retire()

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), how=st.sampled_from(["gone", "noticed", "mended"]))
    def befalls(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        if how == "gone":
            del self.disk[name]
        elif how == "mended":
            self.stuck[name] = ""
        elif self.disk[name] == "ready":  # a marker that is set anew
            self.tell(ev.Found([(self.key(name), name)], complete=False))

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), word=st.sampled_from(["released", "gone", "by-hand"]))
    def operator(self, data: st.DataObject, word: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        entry = self.book.entries.get(name)
        if entry is not None and entry.state in CLAIMED:
            return  # refused
        if word == "gone":
            del self.disk[name]
            self.tell(ev.Gone(name))
        else:
            self.disk[name] = "ready"
            if word == "released":
                self.tell(ev.Released(name, self.key(name)))

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 100.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.tell(ev.Tick())

    @precondition(lambda self: not self.book.policy.once)
    @rule(cores=st.integers(0, 4))
    def give_way(self, cores: int) -> None:
        self.tell(ev.Budget(min(cores, self.book.policy.cores), "others want it"))

    @rule(short=st.booleans())
    def disk_short(self, short: bool) -> None:
        self.tell(ev.Room(short=short, floor_bytes=1000, lent_floor_bytes=75))

    @rule(cores=st.integers(1, 4), order=st.booleans())
    def settings_anew(self, cores: int, order: bool) -> None:
        self.book.begin_afresh(policy(once=self.book.policy.once, cores=cores))
        self.backwards = self.backwards != order
        for worker in sorted(set(self.told) - self.draining):
            self.step_drain(worker)
        self.join()
        self.look()

    # --- what workers can do: each step is said, and heard later --------------------------------------------------

    @precondition(lambda self: len(self.told) < 4)
    @rule()
    def join(self) -> None:
        self.numbers += 1
        for queues in (self.told, self.said):
            queues[self.numbers] = deque()
        self.packing[self.numbers] = None
        self.shipping[self.numbers] = {}
        self.tell(ev.WorkerJoined(self.numbers))

    @precondition(lambda self: self.told)
    @rule(data=st.data(), ends=st.sampled_from(["packed", "packed", "episode-changed", "outbox-full"]))
    def pack(self, data: st.DataObject, ends: str) -> None:
        self.step_pack(data.draw(st.sampled_from(sorted(self.told))), ends, begun=data.draw(st.booleans()))

    def step_pack(self, worker: int, ends: str, *, begun: bool = True) -> None:
        episode = self.packing[worker]
        if episode is None:
            if self.told[worker]:
                self.packing[worker] = self.told[worker].popleft()
                self.said[worker].append(ev.PackBegan(str(self.packing[worker])))
            return
        self.packing[worker] = None
        if ends == "packed" and episode in self.disk and self.stuck[episode] != "unreadable":
            reused = episode in self.artifacts
            self.artifacts.add(episode)
            self.shipping[worker][episode] = begun
            self.said[worker].append(ev.Packed(episode, manifest_of(episode), reused))
        else:
            code = "episode-unreadable" if ends == "packed" else ends
            self.said[worker].append(ev.PackFailed(episode, code, ends, "f00d"))

    @precondition(lambda self: any(self.shipping.values()))
    @rule(data=st.data(), answer=st.sampled_from(ANSWERS))
    def answer(self, data: st.DataObject, answer: Verdict | str) -> None:
        worker = data.draw(st.sampled_from([one for one, ships in self.shipping.items() if ships]))
        self.step_answer(worker, data.draw(st.sampled_from(sorted(self.shipping[worker]))), answer)

    def step_answer(self, worker: int, episode: str, answer: Verdict | str) -> None:
        del self.shipping[worker][episode]
        manifest: Manifest = manifest_of(episode)
        unchanged = answer != CHANGED and episode in self.disk
        if isinstance(answer, str):
            answer = PAGE if self.stuck[episode] == "too large" else shipped(manifest)
        self.answers[episode] = answer
        self.said[worker].append(ev.Answered(episode, answer, manifest, unchanged))

    @precondition(lambda self: any(self.said.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def hear(self, data: st.DataObject, count: int) -> None:
        worker = data.draw(st.sampled_from([one for one, said in self.said.items() if said]))
        self.tell(*(self.said[worker].popleft() for _ in range(min(count, len(self.said[worker])))))

    def hear_all(self, worker: int) -> None:
        said = [*self.said[worker]]
        self.said[worker].clear()
        self.tell(*said)

    @precondition(lambda self: set(self.told) - self.draining)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.step_drain(data.draw(st.sampled_from(sorted(set(self.told) - self.draining))))

    def step_drain(self, worker: int) -> None:
        self.draining.add(worker)
        self.tell(ev.WorkerLeaving(worker))
        while self.told[worker]:
            self.said[worker].append(ev.Returned(self.told[worker].popleft()))

    @precondition(lambda self: self.told)
    @rule(data=st.data(), heard=st.booleans())
    def die(self, data: st.DataObject, heard: bool) -> None:
        """Killed: what it said before is heard (or lost, when the supervisor noticed by sending to it)."""
        worker = data.draw(st.sampled_from(sorted(self.told)))
        if heard:
            self.hear_all(worker)
        for episode in self.book.workers[worker]:
            if self.book.entries[episode].state in (State.PACKING, State.SHIPPING):
                self.kills[episode] = self.kills.get(episode, 0) + 1
        self.leave(worker, died=True)

    @precondition(lambda self: any(not self.with_worker(one) for one in self.draining))
    @rule(data=st.data())
    def end_of_drain(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(one for one in self.draining if not self.with_worker(one))))
        self.hear_all(worker)
        self.leave(worker, died=False)

    def leave(self, worker: int, *, died: bool) -> None:
        for mine in (self.told, self.packing, self.shipping, self.said):
            del mine[worker]
        self.draining.discard(worker)
        self.tell(ev.WorkerLeft(worker, died, "killed by signal 9"))

    # --- what must hold after every step ----------------------------------------------------------------------------

    @invariant()
    def the_book_is_in_order(self) -> None:
        book = self.book
        by_state = {state: {one.episode for one in book.entries.values() if one.state is state} for state in State}
        assert book.ready == sorted((book.entries[one].key, one) for one in by_state[State.READY])
        assert book.waiting == by_state[State.WAITING]
        claimed = set().union(*(by_state[state] for state in CLAIMED))
        assert claimed | by_state[State.READY] | book.waiting | by_state[State.HELD] == book.entries.keys()
        had = [episode for episodes in book.workers.values() for episode in episodes]
        assert sorted(had) == sorted(claimed), "an episode is with at most one worker"
        for worker, episodes in book.workers.items():
            assert all(book.entries[one].worker == worker for one in episodes)
            assert set(self.with_worker(worker)) == episodes
            packing = [one for one in episodes if book.entries[one].state is not State.SHIPPING]
            assert len(packing) <= QUEUE_DEPTH
            load = book.load(worker)
            assert (load.packing, load.shipping) == (len(packing), len(episodes) - len(packing))
            assert load.frames == sum(book.entries[one].frames or 1 for one in packing)
        assert all(entry.worker is None for entry in book.entries.values() if entry.state not in CLAIMED)
        breaker = book.breaker
        assert breaker.probe is None or (breaker.paused and breaker.probe in claimed)
        for mine in (book.shares, book.loads, book.leaving):
            assert set(mine) <= set(book.workers)
        loads = {worker: threads for worker, threads in book.shares.items() if book.load(worker).packing}
        most = book.budget.cores if book.restrained else max(book.policy.cores, len(book.workers))
        assert sum(loads.values()) <= most
        assert book.packed <= set(book.entries)
        wake = next_wake(book)
        waits = [book.entries[one].not_before for one in book.waiting]
        if waits:
            assert wake is not None
            assert wake <= min(waits)
            assert book.policy.once or min(waits) > self.now

    def teardown(self) -> None:
        """Liveness."""
        if not hasattr(self, "book"):
            return
        if not self.told or set(self.told) == self.draining:
            self.join()
        self.tell(ev.Budget(self.book.policy.cores))
        self.look()
        for _ in range(40 * (len(self.disk) + len(self.book.entries) + 5)):
            for worker in list(self.told):
                self.step_pack(worker, "packed")
                for episode in list(self.shipping[worker]):
                    self.step_answer(worker, episode, "shipped")
                self.hear_all(worker)
            self.retire()
            if not self.book.policy.once:
                self.look()
            wake = next_wake(self.book)
            if wake is not None and not any(self.book.workers.values()):
                self.now = max(self.now, wake)
            self.tell(ev.Tick())
            self.the_book_is_in_order()
            if self.book.idle() if self.book.policy.once else not self.left():
                break
        if self.book.policy.once:
            assert self.book.idle()
            assert {entry.state for entry in self.book.entries.values()} <= {State.HELD, State.WAITING, State.READY}
        else:
            assert not self.left(), "can be shipped, and is not"

    def left(self) -> list[str]:
        return [name for name, state in self.disk.items() if state != "held" and not self.stuck[name]]


@pytest.mark.timeout(1800)
def test_the_rules_in_every_order() -> None:
    World.tried = 0
    histories = go_through(World, HISTORIES, least=40, steps=STEPS)
    faults.count(
        "the lifecycle's rules",
        f"histories of {STEPS} steps: episodes, workers, verdicts, operators, settings, cores and disk in any order;"
        f" the book in order after each, and all that can be shipped shipped at the end ({World.tried} events)",
        of=HISTORIES,
        tried=histories,
        test=HERE,
    )
