"""``fastship receive`` killed or failed at each of its system calls, and a shipper that offers again: see ``sweep``."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import faults
import psutil
import pytest
import trustme
from faults import some_of
from interpose import CHANGING, END_S, Action, Call, Nursery, Program, work
from lab import COMMIT, wait_until
from receiver_process import make_artifact, sha256_field
from sweep import (
    FAILURES,
    KILL,
    READ_FAILURES,
    WAYS,
    Look,
    Point,
    Scene,
    Wrong,
    check_served,
    check_store,
    seed,
    some_ways,
    sweep,
)

FULL_S = 0.5  # some turns of the loop of the first process

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

    def run(self, point: Point | None, calls: frozenset[str]) -> Look:
        look = Look(("receiver",), {"store": self._store, "log": self._log, "output": self._out}, point)
        program = self._serve(look, calls)
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

    def _serve(self, look: Look | None = None, calls: frozenset[str] = CHANGING) -> Program:
        """Until it answers, or has ended."""
        self._out.write_bytes(b"")
        program = self._receiving.start(*self._options, out=self._out, log=self._log, look=look, calls=calls)
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

        def attempt(point: Point | None, calls: frozenset[str]) -> Look:
            one = Attempt(tmp_path / str(next(numbers)), shipping, receiving, port, way)
            look = one.run(point, calls)
            one.scene.remove()
            return look

        sweep("receiver", way, attempt, kinds=(KILL, *FAILURES, *READ_FAILURES))


class Several:
    """One receiver of two processes, for all attempts: one that lost a process must go on by itself."""

    def __init__(self, directory: Path, shipping: Nursery, receiving: Nursery, *, tls: bool) -> None:
        self._shipping, self._receiving = shipping, receiving
        self._directory = directory / "receiver"
        self._store = self._directory / "store"
        self._artifact = make_artifact("held")
        self._options = [*seed(self._store, self._artifact), "--workers", "2"]
        self._out, self._log = self._directory / "out", self._directory / "log"
        self._ca_file = str(self._certify()) if tls else ""
        self._look: Look | None = None
        self._stored: list[str] = []
        self._directories = (directory / str(number) for number in itertools.count())
        self._start()

    def _certify(self) -> Path:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        names = {"ca": authority.cert_pem, "cert": issued.cert_chain_pems[0], "key": issued.private_key_pem}
        for name, pem in names.items():
            pem.write_to_path(self._directory / name)
        for name in ("cert", "key"):
            self._options += ["--set", f"receiver.tls_{name}={self._directory / name}"]
        return self._directory / "ca"

    def _start(self) -> None:
        self._out.write_bytes(b"")
        options = [*self._options, "--listen", "127.0.0.1:0"]
        self._program = self._receiving.start(*options, out=self._out, log=self._log, look=self._see)
        wait_until(lambda: self._program.ended or self._out.read_bytes(), "a receiver")
        self._url = self._out.read_text().strip()

    def _see(self, call: Call) -> Action:
        look = self._look
        return look(call) if look is not None else None

    def attempt(self, point: Point | None, _calls: frozenset[str]) -> Look:
        """One pass of a shipper: who lost a process in it is served by the other one, without being asked again."""
        os.truncate(self._log, 0)
        directory = next(self._directories)
        number = int(directory.name)
        scene = Scene(directory, self._url, WAYS["sent while packed"], number, ca_file=self._ca_file)
        self._stored += [scene.small, scene.big]
        places = {"store": self._store, "log": self._log, "output": self._out}
        self._look = look = Look(("first process", "serving process"), places, point)
        try:
            self._ship(scene)
            scene.check_nothing_lost(self._store)
            killed = point is not None and point.fault == KILL
            if not killed:
                look.free()
                self._ship(scene)
        finally:
            self._look = None
        scene.check_all_right(self._store)
        if self._program.ended:
            raise Wrong("untidy", f"it ended with {self._program.wait()}:\n{self._log.read_text(errors='replace')}")
        wait_until(lambda: len(self._serving()) == 2, "another serving process in the place of the dead one")
        check_served(self._log, 0, point)
        scene.remove()
        return look

    def _serving(self) -> list[psutil.Process]:
        return [one for one in psutil.Process(self._program.pid).children() if one.status() != psutil.STATUS_ZOMBIE]

    def _ship(self, scene: Scene) -> None:
        code = self._shipping.start(*scene.once, out=scene.out, log=scene.log).wait()
        scene.check_log(code, None)

    def end(self) -> None:
        """SIGTERM, and what is in the store then."""
        self._program.signal(signal.SIGTERM)
        check_served(self._log, self._program.wait(), None)
        check_store(self._store, self._artifact, self._stored)


@pytest.mark.parametrize("tls", some_of([False, True], "receiver of several", least=2 if faults.SHARE >= 0.1 else 1))
def test_at_each_system_call_of_one_process_of_two(tls: bool, tmp_path: Path) -> None:
    with contextlib.closing(Nursery()) as shipping, contextlib.closing(Nursery()) as receiving:
        several = Several(tmp_path, shipping, receiving, tls=tls)
        way = f"two processes{' and TLS' if tls else ''}"
        sweep("receiver", way, several.attempt, kinds=(KILL, *FAILURES))
        several.end()


class Start:
    """A receiver of two processes, from its start to its end, with one episode between; a store for each attempt."""

    def __init__(self, directory: Path, nursery: Nursery, port: int) -> None:
        directory.mkdir()
        self._directory, self._nursery, self._port = directory, nursery, port
        self._store, self._artifact = directory / "store", make_artifact("held")
        self._options = [*seed(self._store, self._artifact), "--workers", "2", "--listen", f"127.0.0.1:{port}"]
        self._out, self._log = directory / "out", directory / "log"

    def run(self, point: Point | None) -> Look:
        places = {"store": self._store, "log": self._log, "output": self._out}
        look = Look(("first process", "serving process"), places, point)
        program = self._serve(look)
        try:
            program = self._store_one(program, look, point)
            look.free()
            if not program.ended:
                program.signal(signal.SIGTERM)
            code = program.wait()
            check_served(self._log, code, point)
            if code or (self._store / "metrics").exists():  # it did not come to tidy up
                program = self._serve(None)
                wait_until(lambda: program.ended or self._is_stored(), "a receiver")
                program.signal(signal.SIGTERM)
                assert program.wait() == 0
        finally:
            program.kill()
        check_store(self._store, self._artifact, ["small"])
        shutil.rmtree(self._directory)
        return look

    def _serve(self, look: Look | None) -> Program:
        self._out.write_bytes(b"")
        return self._nursery.start(*self._options, out=self._out, log=self._log, look=look)

    def _store_one(self, program: Program, look: Look, point: Point | None) -> Program:
        """Offered for as long as it is not stored; to another receiver, where the one has ended."""
        wait_until(lambda: program.ended or self._is_stored() or look.struck, "a receiver, or a fault")
        if look.lasts and look.struck:
            time.sleep(FULL_S)
        look.free()
        wait_until(lambda: program.ended or self._is_stored(), "a receiver that stores")
        if program.ended:
            check_served(self._log, program.wait(), point)
            program = self._serve(None)
            wait_until(lambda: program.ended or self._is_stored(), "a receiver that is started again")
        return program

    def _is_stored(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=END_S)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            data = make_artifact("small")
            fields = {"Repr-Digest": sha256_field(data), "X-Cis490-Code-Commit": COMMIT}
            connection.request("PUT", "/v1/episodes/small", data, fields)
            return connection.getresponse().status in (200, 201)
        return False


def test_at_each_system_call_of_the_start_of_several(tmp_path: Path) -> None:
    port, numbers = free_port(), itertools.count()
    with contextlib.closing(Nursery()) as nursery:

        def attempt(point: Point | None, _calls: frozenset[str]) -> Look:
            return Start(tmp_path / str(next(numbers)), nursery, port).run(point)

        sweep("receiver", "the start of two processes", attempt, kinds=(KILL, *FAILURES), slow=True)
