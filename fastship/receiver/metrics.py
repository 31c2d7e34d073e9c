"""The receiver's numbers for Prometheus.

What always holds: with several processes each counts in files below ``PROMETHEUS_MULTIPROC_DIR`` (set by
``server`` for its processes) and a scrape of any of them sums all; with one process nothing is written.

What each owner has stored stands in the accounts, which all processes share, and is read for a scrape. Its labels are
the names that the token file gives, or what is made of a token and tells nothing of it.

Imported by ``app``; the only module that imports prometheus_client. Blocks on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from fastship.receiver.store.accounts import Accounts


class _Stored(Collector):
    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def describe(self) -> list[Metric]:  # else it would be collected to be registered
        return []

    def collect(self) -> Iterator[Metric]:
        stored = GaugeMetricFamily("fastship_receiver_stored_bytes", "Stored by a token", labels=["owner"])
        most = GaugeMetricFamily("fastship_receiver_stored_limit_bytes", "That it may store", labels=["owner"])
        for owner, size in sorted(self._accounts.all().items()):
            stored.add_metric([owner], size)
            if limit := self._accounts.most_bytes(owner):
                most.add_metric([owner], limit)
        yield stored
        yield most


class Metrics:
    """Counters of one application."""

    def __init__(self, accounts: Accounts) -> None:
        self._stored = _Stored(accounts)
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
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        stored = CollectorRegistry()
        stored.register(self._stored)
        return generate_latest(registry) + generate_latest(stored)
