"""Fixtures of the system and crash tests; what they give is in ``lab``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blackout
import faults
import pytest
import syscalls
from lab import Destination, Lab, Receiver

from bench.servers import Nginx, ServerMissing

MakeLab = Callable[..., Lab]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell gives it to what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the commands under test would inherit it


def pytest_report_header() -> str:
    return f"FASTSHIP_FAULTS={faults.SHARE} FASTSHIP_SEED={faults.SEED}"


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    """A real one, that takes PUT."""
    try:
        server = Nginx(tmp_path / "nginx")
    except ServerMissing:
        pytest.skip("no nginx here")
    with server:
        yield server


@pytest.fixture
def destination() -> Iterator[Destination]:
    """A scripted server."""
    server = Destination()
    yield server
    server.close()


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """The real receiver, one for all tests of a module: give each test's episodes names of their own."""
    process = Receiver(tmp_path_factory.mktemp("receiver") / "store")
    yield process
    process.close()


@pytest.fixture
def make_lab(tmp_path: Path) -> MakeLab:
    """``make_lab(url, section={...})``: a fresh spool that ships to ``url``."""

    def make(url: str, **sections: dict[str, Any]) -> Lab:
        return Lab(tmp_path, url, sections)

    return make


@pytest.fixture
def lab(make_lab: MakeLab, destination: Destination) -> Lab:
    """A spool that ships to the scripted server."""
    return make_lab(destination.url)


@pytest.fixture
def own_receiver(tmp_path: Path) -> Iterator[Receiver]:
    """One of this test alone: to be killed, or to be looked into."""
    process = Receiver(tmp_path / "store")
    yield process
    process.close()


@pytest.fixture(scope="session")
def blackout_run(tmp_path_factory: pytest.TempPathFactory) -> blackout.Run:
    """The run of ``blackout``, recorded once for all processes of this test run."""
    if not syscalls.works():
        pytest.skip("strace is missing, or may not trace here")
    shared = tmp_path_factory.getbasetemp()
    return blackout.record((shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "blackout")
