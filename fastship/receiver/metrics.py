"""The receiver's numbers for Prometheus.

What always holds: with several processes each counts in files below ``PROMETHEUS_MULTIPROC_DIR`` (set by
``server`` for its processes) and a scrape of any of them sums all; with one process nothing is written.

Imported by ``app``; the only module that imports prometheus_client.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        own = self._registry
        self.requests = Counter("fastship_receiver_requests", "Requests answered", ["method", "status"], registry=own)
        self.episodes = Counter("fastship_receiver_episodes", "Verdicts on episodes", ["verdict"], registry=own)
        self.body_bytes = Counter("fastship_receiver_body_bytes", "Bytes of artifacts received", registry=own)
        self.open_bodies = Gauge(
            "fastship_receiver_open_bodies",
            "Requests whose body is being received",
            registry=own,
            multiprocess_mode="livesum",
        )

    def text(self) -> bytes:
        """The exposition, for all processes."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
