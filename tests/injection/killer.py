"""A poison episode: whoever packs it is killed."""

from __future__ import annotations

import os
import signal
import threading

import psutil
from inotify_simple import INotify, flags
from lab import Lab, workers_of


class Killer:
    """Sends ``number`` to the worker of this process that opens the partial of ``episode``, ``times`` times."""

    def __init__(self, lab: Lab, episode: str, *, times: int, number: int = signal.SIGKILL) -> None:
        lab.outbox.mkdir(exist_ok=True)
        self.hit: list[int] = []
        self._partial = f"{episode}.tar.zst.partial"
        self._times, self._number = times, number
        self._ended = threading.Event()
        self._watch = INotify()
        self._watch.add_watch(str(lab.outbox), flags.OPEN)
        self._thread = threading.Thread(target=self._run, args=(lab,))
        self._thread.start()

    def _run(self, lab: Lab) -> None:
        while len(self.hit) < self._times and not self._ended.is_set():
            if any(event.name == self._partial for event in self._watch.read(timeout=50)):
                for worker in workers_of():
                    if self._has_open(worker):
                        os.kill(worker.pid, self._number)
                        self.hit.append(worker.pid)

    def _has_open(self, worker: psutil.Process) -> bool:
        try:
            return any(one.path.endswith(self._partial) for one in worker.open_files())
        except psutil.Error:
            return False

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._watch.close()
