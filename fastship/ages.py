"""How old a file is, where the clock may have been wrong: nothing is cleaned up because a clock jumped.

A file's mtime and the clock now are both readings of a clock that people, NTP and a flat battery set. On a board that
boots in 1970 and hears the time a minute later everything looks half a century old; for a day in 2040 everything does.
So an age counts for no more than the time in which the clock is known to have gone steadily: as CLOCK_BOOTTIME does,
which nobody sets and which counts suspended time. A step found makes all files newly made, as far as their removal is
concerned. What always holds: an age is never more than it is by the clock, so the price of a step is a later cleaning.

Between two runs of one boot CLOCK_BOOTTIME tells the same. Across a boot nothing does: then the clock may have gone on
by `AWAY_S` at most since it was last written down, and is taken to have been set otherwise.

Imports ``durable``; ``spool``, ``receiver`` and the supervisor import it.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

from fastship import durable

STEP_S = 60.0  # a clock that is off by less was corrected: NTP slews, or steps by seconds
AWAY_S = 7 * 86400.0  # between two boots: a longer holiday costs one more time of keeping
WRITE_S = 60.0


class _Steady(msgspec.Struct, frozen=True):
    """What is written down."""

    wall: float  # seconds since the epoch
    boottime: float  # seconds, CLOCK_BOOTTIME
    boot_id: str
    steady_s: float | None  # for so long the clock is known to go steadily; None: no step was ever seen


class Ages:
    """The ages of files below one directory, which remembers in ``path`` how its clock went. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.steps = 0  # seen so far
        self._path = path
        self._written_at: float | None = None
        self._last = self._read()

    def look(self) -> bool:
        """Compare the clocks; whether the clock stepped since the last look. To be called before ages are asked for."""
        wall, boottime = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
        last, boot_id = self._last, durable.boot_id()
        if last is None:
            steady, stepped = None, False
        else:
            passed_s = wall - last.wall
            if last.boot_id == boot_id:
                stepped = abs(passed_s - (boottime - last.boottime)) > STEP_S
            else:
                stepped = not -STEP_S <= passed_s <= AWAY_S
            steady = 0.0 if stepped else None if last.steady_s is None else last.steady_s + max(0.0, passed_s)
        self.steps += stepped
        self._last = _Steady(wall, boottime, boot_id, steady)
        if stepped or self._written_at is None or boottime - self._written_at >= WRITE_S:
            self._written_at = boottime
            with contextlib.suppress(OSError):  # a full disk: what stands there is older, and finds the same step
                durable.write_file(self._path, msgspec.json.encode(self._last), sync=False)
        return stepped

    def age_s(self, mtime: float) -> float:
        """Seconds since ``mtime``, as of the last look and as far as the clock is to be trusted; 0 for the future."""
        last = self._last
        assert last is not None, "look() comes first"
        age_s = max(0.0, last.wall - mtime)
        return age_s if last.steady_s is None else min(age_s, last.steady_s)

    def _read(self) -> _Steady | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Steady)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            # It may tell of a step: it is not synced, so a power loss may have taken that, and who cannot read it now
            # (out of descriptors, say) knows of none.
            return _Steady(0.0, 0.0, "", 0.0)
