"""``fastship run``, supervisor and workers, killed or failed at each of its system calls: see ``sweep``.

One marker comes while it runs, and SIGTERM when nothing is left to do. Until then it has no help: where a worker was
killed, or a call failed, the daemon that lives must come to the end by itself. One that was killed, or could not begin,
is started again; `Program.wait` waits for the end of every worker that it had.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from pathlib import Path

import pytest
from interpose import READING, Action, Call, Program, Stuck, work
from lab import fastship, wait_until
from sweep import FAILURES, KILL, KILL_ALL, READ_FAILURES, Look, Point, Scene, some_ways, staged, sweep

pytestmark = [
    pytest.mark.skipif(not work(), reason="seccomp's user notifications do not work here"),
    pytest.mark.timeout(7200),
]

FULL_S = 0.5  # some turns of the supervisor's loop


def settle(scene: Scene, program: Program, look: Look, *, but: str = "") -> None:
    """Until the daemon has ended, or has nothing left to do. Raises `Stuck`."""
    try:
        if look.lasts:
            wait_until(lambda: program.ended or look.struck or scene.is_settled(but=but), "a fault")
            time.sleep(FULL_S if look.struck else 0.0)
            look.free()
        wait_until(lambda: program.ended or scene.is_settled(but=but), "the end of all episodes")
    except AssertionError as error:
        raise Stuck(f"{error}:\n{scene.log.read_text(errors='replace')}") from None


def end(scene: Scene, program: Program, point: Point | None) -> int:
    """SIGTERM for one that lives; its exit code."""
    if not program.ended:
        program.signal(signal.SIGTERM)
    code = program.wait()
    scene.check_log(code if code >= 0 else None, point)
    return code


@pytest.mark.parametrize("way", some_ways(["sent while packed", "resumable"], "daemon"))
def test_at_each_system_call(way: str, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            scene, nursery = stage.scene(way, late=True), stage.nursery
            look = Look(("supervisor", "worker"), scene.places, point)
            program = nursery.start(*scene.run, out=scene.out, log=scene.log, look=look, calls=calls)
            try:
                settle(scene, program, look, but=scene.small)
                scene.finish()
                settle(scene, program, look)
                code = end(scene, program, point)
                scene.check_nothing_lost(stage.store)
                if code:
                    program = nursery.start(*scene.run, out=scene.out, log=scene.log)
                    settle(scene, program, Look((), {}))
                    assert end(scene, program, None) in (0, -signal.SIGTERM)  # which came before it listened
            finally:
                program.kill()
            if point is not None:
                code = nursery.start(*scene.once, out=scene.out, log=scene.log).wait()
                scene.check_log(code, None)
            scene.check_all_right(stage.store)
            scene.remove()
            return look

        sweep("daemon", way, attempt, kinds=(KILL, KILL_ALL, *FAILURES, *READ_FAILURES), slow=True)


def test_a_file_that_cannot_be_read_any_more_is_told_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    """For as long as it lasts the episode stays where it is, and ``fastship status`` says why; then it is shipped."""
    with staged(tmp_path) as stage:
        scene = stage.scene("resumable")
        spoilt = True

        def look(call: Call) -> Action:
            return errno.EIO if spoilt and call.path.endswith("deep/noise") and call.name.startswith("pread") else None

        program = stage.nursery.start(*scene.run, out=scene.out, log=scene.log, look=look, calls=READING)
        try:
            wait_until(lambda: not program.ended and tried(scene, scene.big) >= 2, "a second attempt")
            wait_until(lambda: set(scene.lab.names("episodes")) == {scene.big, "held"}, "the end of all others")
            scene.check_nothing_lost(stage.store)
            said = subprocess.run(fastship("status", "-c", scene.settings_file), capture_output=True, text=True).stdout
            assert "WAITING" in said
            assert f"{scene.big}/deep/noise cannot be read: Input/output error; look into the kernel's log" in said
            spoilt = False
            settle(scene, program, Look((), {}))
            assert end(scene, program, None) == 0
        finally:
            program.kill()
        scene.check_all_right(stage.store)


def tried(scene: Scene, episode: str) -> int:
    snapshot = scene.lab.snapshot()
    return max((one.attempts for one in (snapshot.waiting if snapshot else []) if one.episode == episode), default=0)
