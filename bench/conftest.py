"""What the suites share: one corpus, one nginx, one receiver; each made when first asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.corpus import Corpus
from bench.servers import Nginx, Receiver, ServerMissing

Named = Callable[[str], str]


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def nginx(work: Path) -> Iterator[Nginx]:
    """Skips, with the reason, where nginx is not installed."""
    try:
        server = Nginx(work / "nginx")
    except ServerMissing as why:
        pytest.skip(str(why))
    with server:
        yield server


@pytest.fixture(scope="module")
def receiver(work: Path) -> Iterator[Receiver]:
    """fastship's own, one worker, verifying contents."""
    with Receiver(work / "receiver", "--set", "receiver.reserve_bytes=0") as server:
        yield server


@pytest.fixture
def fresh() -> Named:
    """A name that was not used before: a receiver answers 200 to what it holds already."""
    count = itertools.count()
    return lambda prefix: f"{prefix}-{next(count)}"
