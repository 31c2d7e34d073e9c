"""The demonstration: record, ship, read back, compare. The whole of fastship on this machine, with nothing faked.

What always holds: everything is written below one directory; the receiver is a process of its own, spoken to
over HTTP only, and is gone when `run_demo` returns or raises; an episode counts as equal only when what the
receiver gives back, extracted, is the same as what was recorded.

Imports ``shipper``, ``pack``, ``frames``, ``loopback``, ``settings``, ``status``, ``errors``; the command line imports
it.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from fastship import status
from fastship.demo import recorder
from fastship.demo.compare import Tree, differences
from fastship.errors import ArtifactError
from fastship.loopback import LoopbackReceiver
from fastship.settings import Settings

_EPISODES = 5
_READ_LIMIT_S = 120.0  # one read of the socket while reading back
_DRAIN_LIMIT_S = 5.0  # Ctrl-C in a demo is meant now
_ROOM_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 20


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One episode's line in the demo's table."""

    episode: str
    equal: bool
    verdict: str  # "equal", or what is wrong, in words
    raw_bytes: int = 0  # of the tar stream, as everywhere else: the files' contents and their headers
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
    plan = recorder.plan_copies(sources)
    recorder.check_room(directory, 3 * sum(recorder.size_bytes(source) for source, _ in plan) + _ROOM_BYTES)
    if plan:
        makers = {name: recorder.copy_of(source) for source, name in plan}
        doing = f"copying {len(plan)} of your directories, shipping each as soon as it is copied"
    else:
        makers = {f"host-{number + 1}": recorder.host_telemetry(seconds / _EPISODES) for number in range(_EPISODES)}
        doing = f"recording {_EPISODES} episodes of this host in {seconds:g} s, shipping each as soon as it ends"
    seen: dict[str, status.EpisodeResult] = {}

    def observe(snapshot: status.Snapshot) -> None:
        seen.update((one.episode, one) for one in snapshot.recent)
        observer(snapshot)

    spool = directory / "spool"
    with LoopbackReceiver(directory / "receiver", directory / "receiver.log", "the demo's") as receiver:
        say(f"working in {directory}")
        say(f"the receiver answers at {receiver.url}")
        say(doing)
        settings = Settings.load(
            values={
                "spool": {"root": str(spool)},
                "destination": {"url": receiver.url},
                "workers": {"drain_timeout_s": _DRAIN_LIMIT_S},
                "host": {"give_way": False},  # to our own receiver and recorder, that is
            }
        )
        (spool / "episodes").mkdir(parents=True)
        recording = recorder.Recorder(spool / "episodes", makers)
        recording.start()
        try:
            with shipping():
                _ship(settings, observe, recording, list(makers), receiver)
        finally:
            recording.stop()
            recording.join()
        say("reading every episode back from the receiver and comparing")
        compared = []
        for name in sorted(makers):
            compared.append(_read_back(receiver.url, name, spool, directory, seen.get(name), keep=keep))
            if receiver.has_ended():
                raise receiver.error("ended in the middle")
        return compared


def _ship(
    settings: Settings,
    observe: Callable[[status.Snapshot], None],
    recording: recorder.Recorder,
    names: Sequence[str],
    receiver: LoopbackReceiver,
) -> None:
    """Run the daemon until every episode has left ``episodes/`` or is held. Raises `Ended` when it was told to stop."""
    from fastship.shipper import Shipper

    spool = Path(settings.spool.root)

    def settled() -> bool:
        if recording.is_alive():
            return False
        return not any((spool / "episodes" / name).is_dir() and not _held(spool, name) for name in names)

    shipper = Shipper(settings, observer=observe, reload=lambda: settings)  # with `reload`, signals drain
    shipper.run_forever(stop_check=lambda: recording.error is not None or receiver.has_ended() or settled())
    if recording.error is not None:
        raise recording.error
    if receiver.has_ended():
        raise receiver.error("ended in the middle")
    if not settled():
        raise Ended


def _held(spool: Path, name: str) -> bool:
    return (spool / "holds" / f"{name}.json").exists()


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
        modes, raw_bytes = _extract(artifact, restored)
        found = list(differences(recorded, restored / name, tree, archived_modes=modes))
    except ArtifactError as error:
        return Compared(episode=name, equal=False, verdict=error.message)
    verdict = "equal" if not found else f"DIFFERS: {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else "")
    if tree.sockets:
        verdict += f" (sockets left out: {tree.sockets})"
    compared = Compared(
        episode=name,
        equal=not found,
        verdict=verdict,
        raw_bytes=raw_bytes,
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


def _extract(artifact: Path, target: Path) -> tuple[dict[bytes, int], int]:
    """Extract all of it; returns the mode of each member by its path below the top, as the artifact has it, and the
    length of its tar stream in bytes."""
    from fastship.frames import ArtifactReader
    from fastship.pack import extract, list_members

    with ArtifactReader.open(artifact) as reader:
        extract(reader, target)
        modes = {one.name.rstrip(b"/").partition(b"/")[2]: one.mode for one in list_members(reader)}
        return modes, reader.content_bytes or 0
