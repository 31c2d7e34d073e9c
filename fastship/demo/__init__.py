"""The demonstration: record, ship, read back, compare. The whole of fastship on this machine, with nothing faked.

What always holds: everything is written below one directory; the receiver is a process of its own, spoken to
over HTTP only, and is gone when `run_demo` returns or raises; an episode counts as equal only when what the
receiver gives back, extracted, is the same as what was recorded.

Imports ``shipper``, ``pack``, ``frames``, ``settings``, ``status``, ``errors``; the command line imports it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from fastship import status
from fastship.demo import recorder
from fastship.demo.compare import Tree, differences
from fastship.errors import ArtifactError, ReceiverError
from fastship.settings import Settings

_EPISODES = 5
_START_LIMIT_S = 60.0  # a receiver starts in under a second; a loaded machine may take long
_READ_LIMIT_S = 120.0  # one read of the socket while reading back
_CHUNK_BYTES = 1 << 20


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One episode's line in the demo's table."""

    episode: str
    equal: bool
    verdict: str  # "equal", or what is wrong, in words
    raw_bytes: int = 0  # of the recorded files' contents
    files: int = 0
    artifact_bytes: int = 0  # as the receiver gave it back
    seconds: float = 0.0  # from claim to retirement; 0 where it was not seen


class Ended(Exception):
    """The shipping was stopped (a signal) before everything was at the receiver."""


def run_demo(
    directory: Path,
    *,
    sources: Sequence[Path] = (),
    seconds: float = 5.0,
    keep: bool = False,
    observer: Callable[[status.Snapshot], None] = lambda _snapshot: None,
    say: Callable[[str], None] = lambda _line: None,
    shipping: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> list[Compared]:
    """Run the whole in ``directory`` (empty or new) and return a line for each episode, by name.

    ``sources``: ship copies of these directories instead of telemetry recorded for ``seconds``. ``keep``: leave the
    read-back artifacts and trees. ``observer`` sees the shipping, within the context ``shipping``; ``say`` gets a
    line at each step. Blocks; call it in the main thread. Raises `UsageError`, `ReceiverError`, `Ended`.
    """
    spool, store, log = directory / "spool", directory / "receiver", directory / "receiver.log"
    plan = recorder.plan_copies(sources)
    wanted = 3 * sum(recorder.size_bytes(source) for source, _ in plan) + 200_000_000
    recorder.check_room(directory, wanted)
    names = [name for _, name in plan] or [f"host-{number + 1}" for number in range(_EPISODES)]
    seen: dict[str, status.EpisodeResult] = {}

    def observe(snapshot: status.Snapshot) -> None:
        seen.update((one.episode, one) for one in snapshot.recent)
        observer(snapshot)

    with _receiver(store, log, reserve_bytes=min(512 << 20, wanted)) as url:
        say(f"the receiver answers at {url} and stores in {store}/episodes")
        settings = Settings.load(values={"spool": {"root": str(spool)}, "destination": {"url": url}})
        episodes = spool / "episodes"
        episodes.mkdir(parents=True)
        if plan:
            say(f"copying {len(plan)} directories into {episodes}")
            for source, name in plan:
                recorder.copy(source, directory / name)
                os.rename(directory / name, episodes / name)
            _ship(settings, observe, shipping, names, None)
        else:
            say(f"recording {len(names)} episodes of this host for {seconds:g} s, shipping each as it ends")
            host = recorder.HostRecorder(episodes, names, seconds)
            host.start()
            try:
                _ship(settings, observe, shipping, names, host)
            finally:
                host.stop()
                host.join()
        say("reading every episode back from the receiver and comparing it with what was recorded")
        return [_read_back(url, name, spool, directory, seen.get(name), keep=keep) for name in sorted(names)]


def _ship(
    settings: Settings,
    observe: Callable[[status.Snapshot], None],
    shipping: Callable[[], contextlib.AbstractContextManager[object]],
    names: Sequence[str],
    host: recorder.HostRecorder | None,
) -> None:
    """Run the daemon until every episode has left ``episodes/`` or is held. Raises `Ended` when it was told to stop."""
    from fastship.shipper import Shipper

    spool = Path(settings.spool.root)

    def settled() -> bool:
        if host is not None and host.is_alive():
            return False
        return not any((spool / "episodes" / name).is_dir() and not _held(spool, name) for name in names)

    with shipping():
        Shipper(settings, observer=observe, reload=lambda: settings).run_forever(stop_check=settled)
    if host is not None and host.error is not None:
        raise host.error
    if not settled():
        raise Ended


def _held(spool: Path, name: str) -> bool:
    return (spool / "holds" / f"{name}.json").exists()


@contextlib.contextmanager
def _receiver(store: Path, log: Path, *, reserve_bytes: int) -> Iterator[str]:
    """A receiver in a process of its own; gives its URL, and ends it. Raises `ReceiverError` when it does not start."""
    command = [sys.executable, "-m", "fastship", "receive", "--root", str(store), "--listen", "127.0.0.1:0"]
    command += ["--set", f"receiver.reserve_bytes={reserve_bytes}", "-c", os.devnull]  # not the reader's own settings
    with open(log, "wb") as errors:
        # In a session of its own: Ctrl-C reaches the shipper, which drains; the receiver must outlive that.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    assert process.stdout is not None
    try:
        url = _first_line(process.stdout, process)
        if not url.startswith("http"):
            process.kill()
            process.wait()
            told = log.read_text(errors="replace").strip().splitlines()[-4:]
            raise ReceiverError(
                "the receiver did not start: " + ("; ".join(line.strip() for line in told) or "it said nothing"),
                remedy=f"{' '.join(command)}",
            )
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_line(stream: IO[bytes], process: subprocess.Popen[bytes]) -> str:
    """The first line of the process's output, or "" when it ended or said nothing in time."""
    deadline = time.monotonic() + _START_LIMIT_S
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(0.2):
                return stream.readline().decode(errors="replace").strip()
            if process.poll() is not None:
                return ""
    return ""


def _read_back(
    url: str, name: str, spool: Path, directory: Path, seen: status.EpisodeResult | None, *, keep: bool
) -> Compared:
    """Fetch one episode over HTTP, extract it, and compare it with the one in ``shipped/``."""
    recorded = spool / "shipped" / name
    if not recorded.is_dir():
        where = "held" if _held(spool, name) else "quarantined" if (spool / "quarantine" / name).is_dir() else "left"
        return Compared(
            episode=name, equal=False, verdict=f"not shipped, {where}: {seen.error if seen else 'see the log'}"
        )
    artifact, restored = directory / "readback" / f"{name}.tar.zst", directory / "restored"
    artifact.parent.mkdir(exist_ok=True)
    restored.mkdir(exist_ok=True)
    tree = Tree()
    try:
        _fetch(url, name, artifact)
        _extract(artifact, restored)
        found = list(differences(recorded, restored / name, tree))
    except ArtifactError as error:
        return Compared(episode=name, equal=False, verdict=error.message)
    verdict = "equal" if not found else f"DIFFERS: {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else "")
    if tree.sockets:
        verdict += f" (but {tree.sockets} sockets, which no archive holds)"
    compared = Compared(
        episode=name,
        equal=not found,
        verdict=verdict,
        raw_bytes=tree.bytes,
        files=tree.files,
        artifact_bytes=artifact.stat().st_size,
        seconds=seen.seconds if seen else 0.0,
    )
    if not keep:
        artifact.unlink()
        shutil.rmtree(restored / name)
    return compared


def _fetch(url: str, name: str, target: Path) -> None:
    """``GET /v1/episodes/{name}`` into a file. Raises `ArtifactError` for any answer but a whole 200."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_READ_LIMIT_S)
    try:
        connection.request("GET", f"/v1/episodes/{name}")
        answer = connection.getresponse()
        if answer.status != 200:
            raise ArtifactError(f"the receiver answered {answer.status} {answer.reason} when asked for it")
        with open(target, "wb") as file:
            shutil.copyfileobj(answer, file, _CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise ArtifactError(f"reading it back failed: {error}") from None
    finally:
        connection.close()


def _extract(artifact: Path, target: Path) -> None:
    from fastship.frames import ArtifactReader
    from fastship.pack import extract

    with ArtifactReader.open(artifact) as reader:
        extract(reader, target)
