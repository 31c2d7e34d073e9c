"""Measuring a host: `run_bench` says which part is the bottleneck, `run_tune` chooses the level and what goes with it.

What always holds: the user's episodes are only read, and nothing is left behind, on this host or at the destination.

    bench | tuning > survey > report > words > model        survey > (episodes > telemetry) | measure > model

- `model` is the prediction: pure functions; `words` tells it in sentences; `report` is what comes out, as values
- `measure` has the primitives, `episodes` what they are applied to, `survey` their order and share of the time
- `telemetry` generates episodes where there are none

Imports ``pack``, ``frames``, ``upload``, ``loopback``, ``status``, ``settings``; the command line imports it.
"""

from fastship.tune.bench import run_bench
from fastship.tune.report import BenchReport, Part, TuneReport
from fastship.tune.tuning import run_tune
from fastship.tune.words import parse_link, settings_toml

__all__ = ["BenchReport", "Part", "TuneReport", "parse_link", "run_bench", "run_tune", "settings_toml"]
