"""Care for the host: what the settings come to here, workers made modest at their start, and giving way to others.

What always holds: no fault here stops the daemon: what the kernel refuses is logged, what it does not tell does not
count. Nothing is decided here (`lifecycle.GiveWay` does).

Imports ``gauge``, ``lifecycle``, ``settings``, ``errors``, ``frames`` (what memory they take); ``crew``, ``tally``, the
loop and ``config check`` import it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from fastship import logs
from fastship.errors import SettingsError
from fastship.frames import pool_bytes
from fastship.lifecycle import GiveWay, Limits
from fastship.lifecycle.events import Budget
from fastship.settings import HostSettings, Settings, format_size
from fastship.status import HostStatus
from fastship.supervisor.gauge import Gauge, stalled_s

log = logs.Logger(__name__)

LOOK_S = 1.0
WORKER_BYTES = 48 << 20  # of a worker without its frame pool: measured 34 MiB


# --- what settings come to on this host --------------------------------------------------------------------------


def packing_cores(host: HostSettings) -> list[int]:
    """The cores that workers may run on: those this process may use without the reserved first ones, one at least."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[min(host.reserved_cores, len(usable) - 1) :]


def thread_count(settings: Settings) -> int:
    """Cores to pack with: ``pack.threads``, or all that workers may run on."""
    return settings.pack.threads or len(packing_cores(settings.host))


def most_threads(settings: Settings) -> int:
    """The threads that one worker's memory allows. Raises `SettingsError` when that is none."""
    limit, most = settings.host.memory_limit_bytes, thread_count(settings)
    if not limit:
        return most
    chosen, frame_bytes = settings.pack.level == "auto", settings.pack.frame_bytes
    level = settings.pack.level_max if settings.pack.level == "auto" else settings.pack.level
    needed = [
        WORKER_BYTES + pool_bytes(threads, level=level, frame_bytes=frame_bytes, chosen=chosen)
        for threads in range(1, most + 1)
    ]
    fitting = sum(1 for size in needed if size <= limit)
    if not fitting:
        raise SettingsError(
            f"host.memory_limit_bytes = {format_size(limit)} is less than a worker takes with one thread at"
            f" pack.level{'_max' if chosen else ''} = {level} and pack.frame_bytes = {format_size(frame_bytes)}",
            remedy=f"raise it to {-(-needed[0] >> 20)}MiB, or lower one of these",
        )
    return fitting


def unavailable(settings: Settings) -> Iterator[str]:
    """What these settings ask for and this host cannot do: a sentence each. Nothing fails for one of them."""
    host, usable = settings.host, len(os.sched_getaffinity(0))
    if host.reserved_cores >= usable:
        yield f"host.reserved_cores = {host.reserved_cores}: of {usable} cores one is left to pack"
    if host.io_class != "none":
        try:
            psutil.Process().ionice(psutil.Process().ionice().ioclass)
        except (OSError, psutil.Error) as error:
            yield f"host.io_class cannot be set here: {error}"
    if host.give_way:
        for limit, name in ((host.memory_pressure_limit, "memory"), (host.io_pressure_limit, "io")):
            if limit and stalled_s(name) is None:
                yield f"host.{name}_pressure_limit does not count: this kernel has no /proc/pressure (boot with psi=1)"
        if stalled_s("cpu") is None:
            yield "host.give_way goes by the cores that others use alone: this kernel does not tell who waits (psi=1)"


# --- workers, modest ---------------------------------------------------------------------------------------------

_IO_CLASSES = {"best-effort": psutil.IOPRIO_CLASS_BE, "idle": psutil.IOPRIO_CLASS_IDLE}


def restrain(pid: int, host: HostSettings) -> None:
    """Give a process that has no threads yet its cores, nice value and I/O class; its threads will have the same."""
    for step in (_restrain_cores, _restrain_cpu, _restrain_io):
        try:
            step(pid, host)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return  # it is reaped soon
        except (OSError, psutil.Error) as error:  # the others may be allowed
            log.warning("host-care-refused", what=step.__name__.removeprefix("_restrain_"), pid=pid, error=str(error))


def _restrain_cores(pid: int, host: HostSettings) -> None:
    if host.reserved_cores:
        os.sched_setaffinity(pid, packing_cores(host))


def _restrain_cpu(pid: int, host: HostSettings) -> None:
    if host.nice > os.getpriority(os.PRIO_PROCESS, pid):
        os.setpriority(os.PRIO_PROCESS, pid, host.nice)


def _restrain_io(pid: int, host: HostSettings) -> None:
    if host.io_class != "none":
        priority = host.io_priority if host.io_class == "best-effort" else None
        psutil.Process(pid).ionice(_IO_CLASSES[host.io_class], priority)


def restrain_group(pid: int, host: HostSettings) -> bool:
    """The same nice value for the scheduling group of its session (sched(7), "The autogroup feature").

    Where the kernel groups by session, a nice value alone counts among the threads of one session only. False: to be
    called again, because the kernel takes only one such change in 0.1 s from users without privileges.
    """
    if not host.nice:
        return True
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(host.nice))
    except BlockingIOError:
        return False
    except OSError:
        pass  # no autogroups here, or no such process any more
    return True


# --- the supervisor's side ---------------------------------------------------------------------------------------


class Courtesy:
    """Looks about once a second and says when the budget changes."""

    def __init__(self, settings: Settings) -> None:
        host = settings.host
        cores = packing_cores(host)
        self.rule = GiveWay(
            Limits(
                cores=len(cores),
                threads=thread_count(settings),
                pause_max_s=host.pause_max_s,
                memory_pressure=host.memory_pressure_limit,
                io_pressure=host.io_pressure_limit,
                load=host.load_limit,
            )
        )
        self._on = host.give_way
        self._gauge = Gauge(cores)
        self._next_look = 0.0
        self._said = Budget(thread_count(settings))

    def turn(self, workers: Iterable[int]) -> Budget | None:
        """The new budget, when it is time to look and it is another one. ``workers``: their pids."""
        now = time.monotonic()
        if not self._on or now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        reading = self._gauge.read({os.getpid(), *workers}, now)
        if reading is None:
            return None
        budget = self.rule.look(reading, now)
        changed = budget.cores != self._said.cores
        self._said = budget
        return budget if changed else None

    def status(self) -> HostStatus | None:
        """For eyes; None where nothing is given way to."""
        if not self._on:
            return None
        rule = self.rule
        return HostStatus(
            cores=rule.limits.threads,
            budget=self._said.cores,
            why=self._said.why,
            others_cores=round(rule.others_cores, 2),
            memory_pressure=rule.pressures.get("memory pressure"),
            io_pressure=rule.pressures.get("io pressure"),
        )
