"""How many cores packing may have while others want the host: told readings and time, it answers the budget.

The question is what the neighbours suffer, not how busy the host is: packing keeps every core busy by itself, and its
threads wait for each other. So the rule goes by the cores that *others* use or wait for, and leaves them those. The
budget falls at once and as far as needed, and comes back one core at a time, when there is room for it and a bit more.

Pure: no I/O, no clock. Imports ``events``; the supervisor imports it.
"""

from __future__ import annotations

import math

import msgspec

from fastship.lifecycle.events import Budget

SMOOTH_S = 2.0  # readings count for about so long: a neighbour's burst of a second takes nothing away
ROUND_CORES = 0.5  # others' half a core is left to the scheduler: the kernel's work for packing counts as others', too
RISE_CORES = 0.25  # what must be free beyond the next core before it is taken back
RISE_S = 3.0  # between two cores taken back
STEP_S = 2.0  # between two steps down for pressure, so that the first one can show its effect
EASED = 0.7  # of a limit: only below it packing takes cores back


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the rule needs. In each of the limits 0 means: does not count."""

    cores: int  # that packing may run on
    threads: int  # the budget on a host that nobody else uses
    pause_max_s: float
    memory_pressure: float = 0.0  # percent of time
    io_pressure: float = 0.0  # percent of time
    load: float = 0.0


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What the host was like since the reading before. None: cannot be told here."""

    others_cores: float  # that others used or waited for, of those that packing may run on
    memory_pressure: float | None = None  # percent of time
    io_pressure: float | None = None  # percent of time
    load: float | None = None  # of the others


class GiveWay:
    """The rule with its memory: one for a run of the supervisor."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.others_cores = 0.0  # smoothed, as are the pressures
        self.pressures: dict[str, float] = {}
        self._budget = limits.threads
        self._changed_at = self._paused_at = 0.0
        self._looked_at: float | None = None

    def look(self, reading: Reading, now: float) -> Budget:
        """The budget from now on. ``now``: seconds of a monotonic clock; call about once a second."""
        self._smooth(reading, now)
        limits, before = self.limits, self._budget
        free = limits.cores - self.others_cores + ROUND_CORES
        most = limits.threads if free >= limits.cores else max(0, min(limits.threads, math.floor(free)))
        why = self._over()
        if most < before:
            self._budget = most
        elif why and before and now - self._changed_at >= STEP_S:
            self._budget = before - 1
        elif before < limits.threads and self._eased() and now - self._changed_at >= RISE_S:
            room = most > before and (most == limits.threads or free >= before + 1 + RISE_CORES)
            self._budget = before + 1 if room else before
        if self._budget != before:
            self._changed_at = now
            if self._budget == 0:
                self._paused_at = now
        if self._budget == limits.threads:
            return Budget(limits.threads)
        why = why or f"others want {self.others_cores:.1f} of {limits.cores} cores"
        if self._budget == 0 and limits.pause_max_s and now - self._paused_at >= limits.pause_max_s:
            return Budget(1, f"{why}, for longer than host.pause_max_s")
        return Budget(self._budget, why)

    def _smooth(self, reading: Reading, now: float) -> None:
        gap_s = 1.0 if self._looked_at is None else now - self._looked_at
        weight = 1 - math.exp(-gap_s / SMOOTH_S)
        self._looked_at = now
        self.others_cores += weight * (reading.others_cores - self.others_cores)
        for name, value in (("memory pressure", reading.memory_pressure), ("io pressure", reading.io_pressure)):
            if value is None:
                self.pressures.pop(name, None)
            else:
                old = self.pressures.get(name, 0.0)
                self.pressures[name] = old + weight * (value - old)
        if reading.load is not None:
            self.pressures["load"] = reading.load  # the kernel has smoothed it

    def _over(self) -> str:
        """The first limit that is passed, in words; empty when none is."""
        for name, value, limit in self._limited():
            if value > limit:
                unit = "" if name == "load" else " %"
                return f"{name} of {value:.0f}{unit}, limit {limit:g}{unit}"
        return ""

    def _eased(self) -> bool:
        return all(value <= EASED * limit for _, value, limit in self._limited())

    def _limited(self) -> list[tuple[str, float, float]]:
        limits = {
            "memory pressure": self.limits.memory_pressure,
            "io pressure": self.limits.io_pressure,
            "load": self.limits.load,
        }
        return [(name, value, limits[name]) for name, value in self.pressures.items() if limits[name]]
