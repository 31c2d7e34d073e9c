"""``fastship receive`` killed or failed at each of its system calls, and a shipper that offers again: see ``sweep``."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import socket
from pathlib import Path

import faults
import pytest
from interpose import Nursery, Program, work
from lab import wait_until
from receiver_process import make_artifact
from sweep import ERRORS, FULL, KILL, WAYS, Look, Point, Scene, check_served, check_store, seed, some_ways, sweep

pytestmark = [
    pytest.mark.skipif(not work(), reason="seccomp's user notifications do not work here"),
    pytest.mark.timeout(7200),
]


def free_port() -> int:
    """Of those that the kernel gives to no client: it must be free again each time a receiver starts."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


class Attempt:
    """One receiver, killed or failed at a point, and its shipper."""

    def __init__(self, directory: Path, shipping: Nursery, receiving: Nursery, port: int, way: str) -> None:
        self._shipping, self._receiving = shipping, receiving
        self.scene = Scene(directory, f"http://127.0.0.1:{port}", WAYS[way])
        self._store = directory / "receiver" / "store"
        self._artifact = make_artifact("held")
        self._port = port
        self._options = [*seed(self._store, self._artifact), "--listen", f"127.0.0.1:{port}"]
        self._out, self._log = directory / "receiver" / "out", directory / "receiver" / "log"

    def run(self, point: Point | None) -> Look:
        look = Look(("receiver",), {"store": self._store, "log": self._log, "output": self._out}, point)
        program = self._serve(look)
        try:
            self._ship()
            self.scene.check_nothing_lost(self._store)
            if program.ended:  # else it goes on without being started again
                check_served(self._log, program.wait(), point)
                program = self._serve()
            look.free()
            if point is not None:
                self._ship()
            self.scene.check_all_right(self._store)
            if not program.ended:
                program.signal(signal.SIGTERM)
            check_served(self._log, program.wait(), point)
        finally:
            program.kill()
        check_store(self._store, self._artifact, [self.scene.small, self.scene.big])
        return look

    def _serve(self, look: Look | None = None) -> Program:
        """Until it answers, or has ended."""
        self._out.write_bytes(b"")
        program = self._receiving.start(*self._options, out=self._out, log=self._log, look=look)
        wait_until(lambda: program.ended or self._out.read_bytes() or self._listens(look), "a receiver")
        return program

    def _listens(self, look: Look | None) -> bool:
        """Whether it does on its port: one that was failed may not be able to say so."""
        if look is None or not look.struck:
            return False
        return f":{self._port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()

    def _ship(self) -> None:
        code = self._shipping.start(*self.scene.once, out=self.scene.out, log=self.scene.log).wait()
        self.scene.check_log(code, None)


@pytest.mark.parametrize("way", some_ways(list(WAYS), "receiver"))
def test_at_each_system_call(way: str, tmp_path: Path) -> None:
    port, numbers = free_port(), itertools.count()
    with contextlib.closing(Nursery()) as shipping, contextlib.closing(Nursery()) as receiving:

        def attempt(point: Point | None) -> Look:
            one = Attempt(tmp_path / str(next(numbers)), shipping, receiving, port, way)
            look = one.run(point)
            one.scene.remove()
            return look

        recordings = [attempt(None).calls for _ in range(faults.times(2))]
        sweep("receiver", way, recordings, attempt, kinds=(KILL, FULL, *ERRORS))
