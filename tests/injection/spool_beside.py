"""A supervisor on a real spool beside a model of who may move what: the real loop, book, patrol and spool, one step at
a time, with a clock of its own; in the place of processes workers that do on disk what real ones do (`spool_workers`).

`crash/test_spool_model.py` has the rules by which histories are made of this. What is known: every content that a
recorder ever finished, where it lies, and which moves of it were earned: to ``shipped/`` by the receiver's having it,
to ``quarantine/`` by a verdict, by workers that died or by an operator's word, back by an operator's word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from hypothesis.stateful import RuleBasedStateMachine
from sample import receipt_of
from spool_workers import CLOCK, FAULTS, Crew, Stop, Worker

from fastship import durable, shipper
from fastship.episode import MARKER, Manifest, Outcome, Scope, Verdict
from fastship.errors import FastshipError, PackError, UsageError
from fastship.lifecycle import CLAIMED, State
from fastship.lifecycle import events as ev
from fastship.pack import digest_content, fingerprint
from fastship.settings import Settings
from fastship.spool import Journal, Spool, requests
from fastship.spool.layout import episode_of
from fastship.supervisor import loop

DATA = "data.bin"
PLACES = ("episodes", "shipped", "quarantine")


class Receiver(NamedTuple):
    stored: dict[str, str]  # id -> content digest
    ever: set[tuple[str, str]]  # (id, content digest) that were stored by us


class Beside(RuleBasedStateMachine):
    """One spool, at times a supervisor on it, recorders, operators and a receiver."""

    tried = 0  # steps of supervisors
    met = 0  # faults

    def __init__(self) -> None:
        super().__init__()
        FAULTS.forget()
        CLOCK.now = 1000.0
        self.root = Path(tempfile.mkdtemp(prefix="spool-model-"))
        self.spool = Spool(self.root)
        self.spool.create()
        self.orders = ("name", "oldest")
        self.supervisor: loop.Supervisor | None = None
        self.once = False
        self.receiver = Receiver({}, set())
        self.mode = "well"
        self.where: dict[str, str] = {}  # token -> where it lies
        self.may: dict[str, set[str]] = {}  # token -> where it may go; "" is away
        self.digests: dict[str, str] = {}  # token -> its content under the id it has, since it was last recorded
        self.refused: set[str] = set()  # tokens that the receiver will not take
        self.unreasoned: set[str] = set()  # tokens whose reason may be lost: a retry was interrupted
        self.deaths = Counter[str]()
        self.tokens = 0
        self.troubled = False  # a fault came since the last whole start and look
        self.asked = 0

    # --- the disk, looked at -----------------------------------------------------------------------------------

    def path(self, place: str) -> Path:
        return self.root / place

    def token_at(self, place: str) -> str | None:
        return next((token for token, where in self.where.items() if where == place), None)

    def any_in(self, parent: str) -> bool:
        return any(where.startswith(parent) for where in self.where.values())

    def marked(self) -> list[str]:
        names = [where.partition("/")[2] for where in self.where.values() if where.startswith("episodes/")]
        return [name for name in names if (self.spool.paths.episodes / name / MARKER).exists()]

    def observe(self) -> None:
        """Everything is in one place, and has gone where it may go only."""
        found: dict[str, str] = {}
        for parent in PLACES:
            for entry in os.scandir(self.root / parent):
                if entry.name.startswith(".") and parent != "episodes":
                    continue
                if not entry.is_dir():
                    assert parent == "quarantine", entry.path
                    continue
                token = Path(entry.path, DATA).read_text()[:5]
                place = f"{parent}/{entry.name}"
                assert token not in found, f"{token} is in {found[token]} and {place}"
                found[token] = place
        for token, before in self.where.items():
            now = found.get(token, "")
            if now != before:
                self.justify(token, before, now)
                self.may[token] = set()
        assert found.keys() <= self.where.keys()
        self.where = found

    def justify(self, token: str, before: str, now: str) -> None:
        parent, _, name = now.partition("/")
        if before.startswith("episodes/") and parent == "shipped":
            episode = before.partition("/")[2]
            assert episode_of(name) == episode
            content = digest_content(self.path(now), "keep", name=episode).blake3
            assert (episode, content) in self.receiver.ever, f"{token} went to {now}, which the receiver never had"
            line = Journal(self.spool.paths.receipts).find(episode)
            assert line is not None
            assert line.receipt.content is not None
            assert line.receipt.content.blake3 == content
            return
        killed = parent == "quarantine" and self.deaths[before.partition("/")[2]] >= 3
        earned = killed or now in self.may[token] or parent in self.may[token]
        assert earned, f"{token} went from {before} to {now or 'nowhere'}"
        if not before.startswith("episodes/") and now and token not in self.unreasoned:
            content = digest_content(self.path(now), "keep", name="x").blake3
            assert content == self.digests[token], f"{token} went from {before} to {now}, and is not as it was"

    def in_order(self) -> None:
        """After a whole start or pass, without faults: nothing stray."""
        paths = self.spool.paths
        strays = [
            str(path.relative_to(self.root))
            for directory in (paths.outbox, paths.holds, paths.state, paths.quarantine, paths.shipped)
            for path in directory.iterdir()
            if path.name.startswith((".tmp-", ".condemned-", ".removing-", ".retired-"))
        ]
        assert not strays, strays
        living = {name for name in os.listdir(paths.episodes) if (paths.episodes / name).is_dir()}
        held = {name.removesuffix(".json") for name in os.listdir(paths.holds)}
        assert held <= living, f"holds of {held - living}"
        assert self.spool.outbox.episodes() <= living, f"in the outbox: {self.spool.outbox.episodes() - living}"
        for entry in self.spool.quarantined():
            token = self.token_at(f"quarantine/{entry.name}")
            assert entry.reason is not None or token in self.unreasoned, f"no reason of {entry.name}"

    def book_agrees(self) -> None:
        """After a look, without faults: what the supervisor knows is what is on disk."""
        assert self.supervisor is not None
        book = self.supervisor._book
        look = self.spool.look()
        unclaimed = {name for name, entry in book.entries.items() if entry.state not in CLAIMED}
        claimed = book.entries.keys() - unclaimed
        ready = {episode for _, episode in look.ready}
        assert unclaimed - ready - set(look.held) == set(), "gone, and still in the book"
        assert (ready | set(look.held)) - book.entries.keys() == set(), "there, and not in the book"
        held = {name for name, entry in book.entries.items() if entry.state is State.HELD}
        assert held == set(look.held) - claimed, "held in the book, and held on disk"
        order = sorted((self.spool_key(episode), episode) for episode in ready)
        assert [one for _, one in book.ready] == [one for _, one in order if book.entries[one].state is State.READY]

    def spool_key(self, episode: str) -> str:
        assert self.supervisor is not None
        return self.supervisor._spool.key(episode)

    # --- the supervisor, started, turned and ended ---------------------------------------------------------------

    def settings(self) -> Settings:
        return Settings.load(
            profile="ci",
            values={
                "spool": {"root": str(self.root), "order": self.orders[0]},
                "destination": {"url": "http://127.0.0.1:9"},
                "workers": {"count": 2},
                "pack": {"threads": 2},
            },
        )

    def start(self, *, once: bool) -> None:
        self.supervisor = supervisor = loop.Supervisor(self.settings(), once=once, reload=self.settings)
        self.once = once
        self.deaths.clear()

        def begin() -> None:
            supervisor._spool.paths.require(["episodes"])
            supervisor._spool.create()
            supervisor._lock = supervisor._spool.lock()
            supervisor._crew = Crew(self.settings(), 0, supervisor._selector)  # type: ignore[assignment]
            supervisor._begin()

        try:
            with FAULTS.at_work():
                begin()
        except FastshipError:
            assert FAULTS.met
            self.end()
        except Stop:
            self.end()
        self.observe()
        if self.supervisor is not None and not FAULTS.met:
            self.troubled = False
            self.in_order()
            self.book_agrees()
        self.settle_faults()

    def end(self) -> None:
        """The supervisor and its workers are gone, as if they were killed."""
        supervisor, self.supervisor = self.supervisor, None
        assert supervisor is not None
        with contextlib.suppress(AttributeError):  # it had not come so far
            supervisor._lock.release()
        supervisor._patrol.close()
        supervisor._selector.close()

    def settle_faults(self) -> None:
        if FAULTS.met:
            Beside.met += 1
            self.troubled = True
            if FAULTS.how != "full":
                FAULTS.forget()

    @property
    def hands(self) -> list[Worker]:
        return list(self.supervisor._crew.hands.values()) if self.supervisor else []  # type: ignore[arg-type]

    def work(self, step: Callable[[], object]) -> None:
        """One step of the supervisor, as its loop takes it; what comes of it is looked at."""
        assert self.supervisor is not None
        try:
            with FAULTS.at_work():
                step()
        except Stop:
            self.end()
        except OSError:
            assert FAULTS.met or FAULTS.how, "without a fault of the disk"
        self.settle_faults()
        self.observe()
        Beside.tried += 1

    def turn(self) -> None:
        """Once round the loop, but for what workers say."""
        supervisor = self.supervisor
        assert supervisor is not None
        for step in (
            supervisor._reap,
            self.receive,
            supervisor._obey,
            supervisor._scan,
            supervisor._decide_by_time,
            supervisor._retire,
            supervisor._report,
        ):
            if self.supervisor is None:
                return
            self.work(step)
        if self.supervisor is None:
            return
        supervisor._crew.flush()
        if supervisor._finished():
            self.work(self.finish)
            if self.supervisor is not None:
                self.end()

    def finish(self) -> None:
        """The end of `run`."""
        supervisor = self.supervisor
        assert supervisor is not None
        supervisor._book.draining = True
        supervisor._flush_retirements()
        supervisor._report(final=True)

    def receive(self) -> None:
        supervisor = self.supervisor
        assert supervisor is not None
        supervisor._crew.flush()
        for key, _ in supervisor._selector.select(0):
            key.data()

    def hear(self, hand: Worker, count: int) -> None:
        supervisor = self.supervisor
        if supervisor is None:
            return
        hand.hears = count
        self.work(lambda: supervisor._hear_all(hand))  # type: ignore[arg-type]
        if self.supervisor is not None:
            supervisor._crew.flush()

    def look(self) -> None:
        """A turn with a look and a pass in it."""
        CLOCK.now += 1.0
        self.turn()
        supervisor = self.supervisor
        if supervisor is None or self.once or self.draining or self.troubled or FAULTS.how is not None:
            return
        self.in_order()
        self.book_agrees()
        assert supervisor._timeout() > 0, "it would turn for ever"

    @property
    def draining(self) -> bool:
        return self.supervisor is not None and self.supervisor._drain_until is not None

    # --- what workers do -----------------------------------------------------------------------------------------

    def step_pack(self, hand: Worker, *, ends: str = "packed", begun: bool = True) -> None:
        """Begin with the next, or come to the end of what was begun."""
        outbox, episodes = self.spool.outbox, self.spool.paths.episodes
        if hand.exit_status is not None:
            return
        if hand.packing is None:
            if hand.queue:
                hand.packing, hand.partial = hand.queue.popleft().episode, None
                hand.said.append(ev.PackBegan(hand.packing))
            return
        episode, directory = hand.packing, episodes / hand.packing
        try:
            if hand.partial is None:
                manifest = outbox.find(episode) or outbox.find_given_up(episode)
                if manifest is not None and manifest.fingerprint == fingerprint(directory, owner="keep"):
                    self.packed(hand, manifest, begun=begun, reused=True)
                    return
                if hand.paused:
                    return
                hand.partial = self.manifest_of(episode)
                with outbox.begin(episode) as file:
                    file.write(hand.partial.content_blake3.encode()[:10])
                return
            if hand.paused:
                return
            if ends == "failed":
                raise PackError("no room", remedy="")
            if ends == "changed" or self.manifest_of(episode).fingerprint != hand.partial.fingerprint:
                self.pack_failed(hand, "episode-changed", told=begun)
                return
            if not (directory / MARKER).exists():
                raise PackError("unfinished", remedy="")
            with outbox.begin(episode) as file:
                file.write(hand.partial.content_blake3.encode())
                file.truncate()
            outbox.commit(hand.partial)
            self.packed(hand, hand.partial, begun=begun, reused=False)
        except (PackError, OSError):
            self.pack_failed(hand, "pack", told=True)

    def manifest_of(self, episode: str) -> Manifest:
        content = digest_content(self.spool.paths.episodes / episode, "keep", name=episode)
        return Manifest(
            episode=episode,
            artifact_sha256=sha256(content.blake3),
            artifact_bytes=len(content.blake3),
            content_blake3=content.blake3,
            content_bytes=content.bytes,
            members=3,
            frames=1,
            frame_bytes=8 << 20,
            levels={3: 1},
            fingerprint=content.fingerprint,
            boot_id=durable.boot_id(),
        )

    def packed(self, hand: Worker, manifest: Manifest, *, begun: bool, reused: bool) -> None:
        hand.packing = hand.partial = None
        hand.shipping[manifest.episode] = manifest, begun
        hand.said.append(ev.Packed(manifest.episode, manifest, reused))

    def pack_failed(self, hand: Worker, code: str, *, told: bool) -> None:
        episode = hand.packing
        assert episode is not None
        self.spool.outbox.drop_partial(episode)
        found = ""
        if told:  # else it changes while it is looked at
            with contextlib.suppress(PackError, OSError):
                found = fingerprint(self.spool.paths.episodes / episode, owner="keep")
        hand.packing = hand.partial = None
        hand.said.append(ev.PackFailed(episode, code, code, found))
        hand.end_if_drained()

    def step_answer(self, hand: Worker, episode: str) -> None:
        """The receiver's answer, or its silence; after a receipt the episode is looked at once more."""
        if hand.exit_status is not None:
            return
        manifest, _ = hand.shipping.pop(episode)
        verdict = self.judge(manifest)
        unchanged = True
        if verdict.outcome is Outcome.SHIPPED:
            try:
                unchanged = fingerprint(self.spool.paths.episodes / episode, owner="keep") == manifest.fingerprint
            except (PackError, OSError):
                unchanged = False
        elif verdict.outcome is Outcome.REJECTED:
            token = self.token_at(f"episodes/{episode}")
            if token is not None:
                self.may[token].add("quarantine")
        hand.said.append(ev.Answered(episode, verdict, manifest, unchanged))
        hand.end_if_drained()

    def judge(self, manifest: Manifest) -> Verdict:
        episode, content = manifest.episode, manifest.content_blake3
        stored = self.receiver.stored.get(episode)
        if self.mode == "token":
            return Verdict(outcome=Outcome.TRANSIENT, scope=Scope.DESTINATION, status=401, error="token")
        if self.mode == "away":
            return Verdict(outcome=Outcome.TRANSIENT, scope=Scope.NETWORK, error="away")
        if stored is None:
            artifact = self.spool.outbox.artifact(episode)
            if not artifact.exists() or artifact.read_text() != content:
                return Verdict(outcome=Outcome.DAMAGED, scope=Scope.EPISODE, error="the artifact cannot be read")
            if self.token_at(f"episodes/{episode}") in self.refused:
                return Verdict(outcome=Outcome.REJECTED, scope=Scope.EPISODE, status=412, error="no", body="{}")
            if self.mode == "page":
                return Verdict(outcome=Outcome.TRANSIENT, scope=Scope.EPISODE, status=413, error="page")
            self.receiver.stored[episode] = content
            self.receiver.ever.add((episode, content))
            if self.mode == "mute":
                return Verdict(outcome=Outcome.TRANSIENT, scope=Scope.NETWORK, error="no answer came")
        elif stored != content:
            return Verdict(outcome=Outcome.CONFLICT, scope=Scope.EPISODE, status=409, error="another", body="{}")
        receipt = receipt_of(manifest)
        return Verdict(outcome=Outcome.SHIPPED, scope=Scope.EPISODE, status=201, receipt=receipt)

    def die(self, hand: Worker) -> None:
        hand.kill()
        at = set(hand.shipping) | ({hand.packing} if hand.packing else set())
        # What it said of them and is not heard counts as not said, where the supervisor finds it dead by sending to it.
        at |= {one.episode for one in hand.said if isinstance(one, ev.Answered | ev.PackFailed | ev.Packed)}
        self.deaths.update(at)

    # --- what operators ask ------------------------------------------------------------------------------------

    def operate(self, action: requests.Action, name: str, new_id: str | None) -> bool | None:
        """Ask for it, of the supervisor where there is one; whether it says that it was done. None: it died of it."""
        if self.supervisor is None:
            return self.operate_alone(action, name, new_id)
        self.asked += 1
        path = self.spool.paths.requests / f"{self.asked:05}.json"
        asked = {"action": action, "episode": name, "new_id": new_id}
        path.write_text(json.dumps(asked))
        CLOCK.now += 1.0
        self.turn()
        answer = path.with_suffix(".answer")
        if not answer.exists():
            path.unlink(missing_ok=True)  # as it is withdrawn
            return None
        told = msgspec.json.decode(answer.read_bytes(), type=requests.Answer)
        answer.unlink()
        return told.ok

    def operate_alone(self, action: requests.Action, name: str, new_id: str | None) -> bool | None:
        done: bool | None = None
        try:
            with FAULTS.at_work():
                shipper.operate(self.settings(), action, name, new_id=new_id)
            done = True
        except UsageError:
            done = False
        except (FastshipError, OSError):
            assert FAULTS.met
        except Stop:
            pass
        self.settle_faults()
        self.observe()
        return done

    # --- the end -------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.come_to_rest()
        finally:
            if self.supervisor is not None:
                self.end()
            shutil.rmtree(self.root)

    def come_to_rest(self) -> None:
        """Once the world behaves, all that can be shipped is, in a bounded number of turns."""
        FAULTS.forget()
        self.mode = "well"
        if self.supervisor is not None and (self.once or self.draining):
            self.end()
        if self.supervisor is None:
            self.start(once=False)
        supervisor = self.supervisor
        assert supervisor is not None
        supervisor._courtesy.next = ev.Budget(2)  # type: ignore[attr-defined]
        for number in range(60):
            CLOCK.now += 70.0
            self.look()
            for hand in self.hands:
                while hand.exit_status is None and (hand.queue or hand.packing):
                    self.step_pack(hand)
                    self.hear(hand, 9)
                for episode in list(hand.shipping):
                    self.step_answer(hand, episode)
                self.hear(hand, 99)
            self.look()
            if number > 1 and self.is_at_rest():
                break
        assert self.is_at_rest(), self.left()
        self.end()
        self.start(once=False)  # which looks whether all is in order
        assert self.is_at_rest(), self.left()
        for record in self.spool.holds():
            stored = self.receiver.stored.get(record.episode)
            assert record.reason == "conflict", "it has been still for long"
            assert stored != self.manifest_of(record.episode).content_blake3, "there is no conflict any more"

    def left(self) -> list[str]:
        """What is finished and neither shipped, set aside nor held."""
        held = {one.episode for one in self.spool.holds()}
        return [name for name in self.marked() if name not in held]

    def is_at_rest(self) -> bool:
        assert self.supervisor is not None
        return not self.left() and not any(hand.busy_with for hand in self.hands)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
