"""Commands that somebody types, killed or failed at each of their system calls, and typed again: see ``sweep``.

What must hold: who ended with 0 did what was asked for, and who did not says why in a sentence and leaves nothing lost,
doubled or half made; typed again, with nothing in its way, it does it, or says that it is done; and after one more pass
of the shipper, or look of the receiver after its root, no stray file is left.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from interpose import CHANGING, Action, Call, Nursery, Program, Stuck, work
from lab import Receiver, wait_until
from sweep import FAILURES, KILL, READ_FAILURES, Look, Point, check_told, require, some_ways, sweep
from trials import GROUPS, TRIALS, Copies, DropLocal, KeepLocalAs, Retry, Trial, Word

from fastship.errors import EXIT_NOT_SHIPPED, EXIT_OK, EXIT_USAGE

pytestmark = [
    pytest.mark.skipif(not work(), reason="seccomp's user notifications do not work here"),
    pytest.mark.timeout(7200),
]

BESIDE = ["asked of a daemon", "copies"]
DRAWN = faults.some_of(BESIDE, "commands beside a daemon", least=len(BESIDE) if faults.SHARE >= 0.02 else 1)
"""They start daemons, which takes seconds: the smallest shares have one of the two, in time both."""


def drawn(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in DRAWN, reason="not drawn for this share of the faults (FASTSHIP_FAULTS)")


# --- typed by somebody -------------------------------------------------------------------------------------------


class Typist:
    """Runs commands of fastship, one at a time. ``directory``: for what they say."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery = nursery
        self.out, self.log = directory / "out.txt", directory / "log.txt"

    def start(self, words: tuple[str | Path, ...], look: Callable[[Call], Action] | None, **more: Any) -> Program:
        for path in (self.out, self.log):
            path.write_bytes(b"")
        return self._nursery.start(*words, out=self.out, log=self.log, look=look, **more)

    def type(self, words: tuple[str | Path, ...], look: Callable[[Call], Action] | None = None, **more: Any) -> int:
        return self.start(words, look, **more).wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def check(self, code: int, trial: Trial, point: Point | None) -> None:
        """What it said."""
        require("traceback" not in self.said.lower(), "untidy", f"a traceback:\n{self.said}")
        if code > EXIT_OK and code not in trial.worked:
            check_told(self.said, code, point)

    def check_again(self, trial: Trial) -> None:
        words = trial.again
        code = self.type(words)
        self.check(code, trial, None)
        done = code in trial.worked or (code == EXIT_USAGE and trial.is_done_already(self.said))
        require(done, "untidy", f"{words} once more ended with {code}:\n{self.said}")

    def ship(self, settings_file: Path) -> None:
        code = self.type(("once", "-c", settings_file))
        require(code in (EXIT_OK, EXIT_NOT_SHIPPED), "untidy", f"a pass ended with {code}:\n{self.said}")


@pytest.mark.parametrize("group", some_ways(list(GROUPS), "commands"))
def test_at_each_system_call(group: str, tmp_path: Path) -> None:
    """One receiver takes the episodes of all attempts: they have names of their own."""
    numbers = itertools.count()
    with contextlib.closing(Nursery()) as nursery, contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        typist = Typist(nursery, tmp_path)

        def one(name: str, point: Point | None, calls: frozenset[str]) -> Look:
            trial = TRIALS[name](tmp_path / str(number := next(numbers)), receiver.url, number)
            look = Look((name, name), {**trial.places, "log": typist.log, "output": typist.out}, point)
            code = typist.type(trial.words, look, calls=calls)
            require(code >= 0 or (point is not None and point.fault == KILL), "untidy", f"killed by {-code}")
            typist.check(code, trial, point)
            trial.check(code if code >= 0 else None)
            require(point is not None or code in trial.worked, "untidy", f"{code}: {typist.said}")
            if point is not None:
                typist.check_again(trial)
            trial.check_end(typist.ship, point)
            shutil.rmtree(trial.directory)
            return look

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            if point is not None:
                return one(point.process, point, calls)
            seen = Look((), {})
            for name in faults.nearly_all(GROUPS[group], group, least=3):
                seen.calls += one(name, None, calls).calls
            return seen

        sweep("commands", group, attempt, kinds=(KILL, *FAILURES, *READ_FAILURES), slow=True)


# --- asked of the daemon, and done by it -------------------------------------------------------------------------

WORDS: dict[str, type[Word]] = {"retry": Retry, "keep-local --as": KeepLocalAs, "drop-local": DropLocal}


class Beside:
    """A daemon and somebody who types beside it; calls of the one or of the other are looked at."""

    def __init__(self, directory: Path, trial: Word, typing: Nursery, serving: Nursery) -> None:
        self._trial = trial
        directory.mkdir()
        self.typist, self._daemon = Typist(typing, directory), Typist(serving, directory / "daemon")
        (directory / "daemon").mkdir()
        self._look: Look | None = None
        self._start()

    def _start(self) -> None:
        state = self._trial.lab.state / "status.json"
        state.unlink(missing_ok=True)
        self._program = self._daemon.start(("run", "-c", self._trial.settings_file), self._see)
        self._until(lambda: self._program.ended or state.exists(), "a daemon")

    def _see(self, call: Call) -> Action:
        look = self._look
        return look(call) if look is not None else None

    def _until(self, true: Callable[[], bool], what: str) -> None:
        try:
            wait_until(true, what)
        except AssertionError as error:
            raise Stuck(f"{error}:\n{self._daemon.said}") from None

    def type(self, name: str, point: Point | None, *, looked_at: str) -> Look:
        trial, spool = self._trial, self._trial.spool.paths
        places = {"requests": spool.requests, "quarantine": spool.quarantine, "holds": spool.holds}
        if looked_at == "the daemon":
            look = Look(
                (name, f"{name}, worker"), {**places, "episodes": spool.episodes, "outbox": spool.outbox}, point
            )
            self._look = look
            code = self.typist.type(trial.words)
            self._look = None
        else:
            look = Look((name, name), {**places, "log": self.typist.log, "output": self.typist.out}, point)
            code = self.typist.type(trial.words, look)
        look.free()
        self.typist.check(code, trial, point)
        if point is not None and code != EXIT_OK:
            if self._program.ended:
                require(self._program.wait() == -signal.SIGKILL, "untidy", self._daemon.said)
                self._start()
            self.typist.check_again(trial)
        self._until(trial.is_at_end, f"what {name} was to do")
        self.end()
        return look

    def end(self) -> None:
        """SIGTERM, and what it said."""
        killed = self._program.ended
        if not killed:
            self._program.signal(signal.SIGTERM)
        code = self._program.wait()
        self._daemon.check(code, self._trial, None)
        require(code == EXIT_OK or killed, "untidy", f"the daemon ended with {code}:\n{self._daemon.said}")

    def close(self) -> None:
        self._program.kill()


@drawn("asked of a daemon")
@pytest.mark.parametrize("looked_at", faults.nearly_all(["the command", "the daemon"], "looked at"))
def test_asked_of_the_daemon(looked_at: str, tmp_path: Path) -> None:
    numbers = itertools.count()
    typing, serving = (contextlib.closing(Nursery()) for _ in range(2))
    with typing as one, serving as other, contextlib.closing(Receiver(tmp_path / "store")) as receiver:

        def word(name: str, point: Point | None) -> Look:
            number = next(numbers)
            trial = WORDS[name](tmp_path / str(number), receiver.url, number)
            with contextlib.closing(Beside(tmp_path / f"beside-{number}", trial, one, other)) as beside:
                look = beside.type(name, point, looked_at=looked_at)
                trial.check_end(beside.typist.ship, point)
            shutil.rmtree(trial.directory)
            return look

        def attempt(point: Point | None, _calls: frozenset[str]) -> Look:
            if point is not None:
                return word(point.process.partition(",")[0], point)
            seen = Look((), {})
            for name in faults.nearly_all(list(WORDS), f"asked, {looked_at}"):
                seen.calls += word(name, None).calls
            return seen

        sweep("commands", f"asked of a daemon, {looked_at}", attempt, kinds=(KILL, *FAILURES), slow=True)


@drawn("copies")
def test_copies_that_the_daemon_removes(tmp_path: Path) -> None:
    """Each goes after the receiver read it again, and whole; one that a fault kept goes after the next start."""
    numbers = itertools.count()
    with contextlib.closing(Nursery()) as nursery, contextlib.closing(Receiver(tmp_path / "store")) as receiver:
        typist = Typist(nursery, tmp_path)

        def run(trial: Copies, gone: Callable[[], bool], look: Look | None, calls: frozenset[str] = CHANGING) -> int:
            (trial.lab.state / "status.json").unlink(missing_ok=True)
            program = typist.start(trial.words, look, calls=calls)
            try:
                wait_until(lambda: program.ended or gone(), "a copy to go")
                if not program.ended:
                    program.signal(signal.SIGTERM)
                return program.wait()
            except AssertionError as error:
                raise Stuck(f"{error}:\n{typist.said}") from None
            finally:
                program.kill()

        def waits(trial: Copies) -> bool:
            snapshot = trial.lab.snapshot()
            kept = snapshot.retention if snapshot is not None else None
            return kept is not None and bool(kept.waits or kept.kept)

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            number = next(numbers)
            trial = Copies(tmp_path / str(number), receiver.url, number)
            look = Look(("supervisor", "worker"), trial.places, point)
            code = run(trial, lambda: trial.is_at_end() or waits(trial), look, calls)
            typist.check(code, trial, point)
            trial.check(None)
            if trial.lab.names("shipped"):  # or what is left of it
                code = run(trial, lambda: not trial.lab.names("shipped"), None)
                require(code == EXIT_OK, "untidy", typist.said)
            trial.check_end(typist.ship, point)
            shutil.rmtree(trial.directory)
            return look

        reads = READ_FAILURES if faults.SHARE >= 0.1 else ()
        sweep("commands", "removing copies", attempt, kinds=(KILL, *FAILURES, *reads), slow=True)
