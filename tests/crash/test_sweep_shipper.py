"""``fastship once``, supervisor and workers, killed or failed at each of its system calls: see ``sweep``."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
from interpose import Nursery, work
from lab import Receiver
from receiver_process import make_artifact
from sweep import FAILURES, KILL, KILL_ALL, READ_FAILURES, WAYS, Look, Point, Scene, check_store, seed, some_ways, sweep

pytestmark = [
    pytest.mark.skipif(not work(), reason="seccomp's user notifications do not work here"),
    pytest.mark.timeout(7200),
]


@pytest.mark.parametrize("way", some_ways(["sent while packed", "resumable"], "shipper"))
def test_at_each_system_call(way: str, tmp_path: Path) -> None:
    """One receiver takes the episodes of all attempts: they have names of their own."""
    store, artifact = tmp_path / "receiver" / "store", make_artifact("held")
    _, _, _, *options = seed(store, artifact)
    stored: list[str] = []
    numbers = itertools.count()
    with contextlib.closing(Nursery()) as nursery, contextlib.closing(Receiver(store, *options)) as receiver:

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            number = next(numbers)
            scene = Scene(tmp_path / str(number), receiver.url, WAYS[way], number)
            stored.extend((scene.small, scene.big))
            look = Look(("supervisor", "worker"), scene.places, point)
            code = nursery.start(*scene.once, out=scene.out, log=scene.log, look=look, calls=calls).wait()
            scene.check_log(code if code >= 0 else None, point)
            scene.check_nothing_lost(store)
            if point is not None:
                code = nursery.start(*scene.once, out=scene.out, log=scene.log).wait()
                scene.check_log(code, None)
            scene.check_all_right(store)
            scene.remove()
            return look

        sweep("shipper", way, attempt, kinds=(KILL, KILL_ALL, *FAILURES, *READ_FAILURES))
    check_store(store, artifact, stored)
