"""Receivers for the contract tests: one that a module shares, and any number of an own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from receiver_process import Server, Start


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("receiver") / "root")
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start receivers on one root; all are killed at the end."""
    servers: list[Server] = []

    def begin(**options: Any) -> Server:
        servers.append(Server(tmp_path / "root", **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()
