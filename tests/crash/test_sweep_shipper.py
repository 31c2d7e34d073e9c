"""``fastship once``, supervisor and workers, killed or failed at each of its system calls: see ``sweep``."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpose import work
from sweep import FAILURES, KILL, KILL_ALL, READ_FAILURES, Look, Point, some_ways, staged, sweep

pytestmark = [
    pytest.mark.skipif(not work(), reason="seccomp's user notifications do not work here"),
    pytest.mark.timeout(7200),
]


@pytest.mark.parametrize("way", some_ways(["sent while packed", "resumable"], "shipper"))
def test_at_each_system_call(way: str, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            scene = stage.scene(way)
            look = Look(("supervisor", "worker"), scene.places, point)
            code = stage.nursery.start(*scene.once, out=scene.out, log=scene.log, look=look, calls=calls).wait()
            scene.check_log(code if code >= 0 else None, point)
            scene.check_nothing_lost(stage.store)
            if point is not None:
                code = stage.nursery.start(*scene.once, out=scene.out, log=scene.log).wait()
                scene.check_log(code, None)
            scene.check_all_right(stage.store)
            scene.remove()
            return look

        sweep("shipper", way, attempt, kinds=(KILL, KILL_ALL, *FAILURES, *READ_FAILURES))
