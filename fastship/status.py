"""What fastship is doing, as a value: written by the supervisor, read by ``fastship status`` and the displays.

What always holds: a `Snapshot` on disk (``state/status.json``) is whole, because it is replaced by rename; it
may be stale, which its ``updated_at`` and ``pid`` tell. It is for eyes only: nothing is decided from it.

Imports ``durable`` and ``errors``; the supervisor, the worker and the command line import it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import msgspec

from fastship import durable

STATUS_FILE = "status.json"
PRESSURE_FILE = "pressure.json"
_PRESSURE_BYTES = 1024  # filled up with spaces


class PassResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass did (of `run_once`), or all since the start (of a daemon's `Snapshot`)."""

    scanned: int = 0  # episodes with a marker that were looked at, held ones included
    shipped: int = 0
    transient_failures: int = 0
    conflicts: int = 0  # holds, old and new
    fatal: int = 0  # quarantined
    bytes_in: int = 0  # tar stream bytes of the shipped episodes
    bytes_out: int = 0  # artifact bytes of the shipped episodes
    seconds: float = 0.0


class EpisodeProgress(msgspec.Struct, frozen=True, kw_only=True):
    """An episode under way."""

    episode: str
    stage: str  # "packing" or "shipping"
    worker: int
    done_bytes: int = 0  # of the tar stream while packing, of the artifact while shipping
    total_bytes: int = 0  # 0: not known yet
    seconds: float = 0.0  # in this stage
    still_s: float = 0.0  # for so long no byte of it was read


class EpisodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """An episode that came to an end of its attempt."""

    episode: str
    outcome: str  # "shipped", "conflict", "quarantined", "transient"
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0  # from its claim to its retirement
    resumed_at: int = 0  # artifact bytes the receiver already had
    error: str = ""


class WaitingEpisode(msgspec.Struct, frozen=True, kw_only=True):
    """An episode that is tried again by itself: what keeps failing is seen here, however much else goes on."""

    episode: str
    attempts: int  # in a row, without a verdict on the episode
    retry_in_s: float
    error: str = ""  # of the last one


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    pid: int
    threads: int
    packing: int
    shipping: int


class DestinationStatus(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    state: str  # "up", "paused", "probing"
    reason: str = ""
    retry_in_s: float = 0.0


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What packing leaves to others (of a daemon that gives way)."""

    cores: int  # that packing may use on a host that nobody else uses
    budget: int  # that it may use now; 0: packing is paused
    why: str = ""  # fewer than all
    others_cores: float = 0.0  # that others use or wait for
    memory_pressure: float | None = None  # others', percent of time; None: not looked at, or not to be told
    io_pressure: float | None = None


class DiskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The file system of the spool."""

    level: str  # "ok", "low": below the reserve, "critical": below half of it
    free_bytes: int
    total_bytes: int
    reserve_bytes: int  # what packing may not eat into
    outbox_bytes: int
    outbox_limit_bytes: int = 0  # 0: none
    short: bool = False  # packing waits, but for one artifact at a time
    seconds_to_full: float | None = None  # if it goes on as it went; None: not for a year, or not known yet


class RetentionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Copies in ``shipped/``, of a daemon that is told to remove some."""

    copies: int = 0  # with a receipt
    bytes: int = 0
    removed: int = 0  # since the start
    kept: int = 0  # that should go, and which the receiver did not confirm
    why: str = ""  # the last of these was kept
    waits: str = ""  # why nobody could be asked


class DiskPressure(msgspec.Struct, frozen=True, kw_only=True):
    """``state/pressure.json``, for recorders: what docs/operations.md promises of it stays."""

    version: int = 1
    updated_at: float  # seconds since the epoch; replaced every few seconds while the daemon runs
    level: str  # "ok", "low", "critical"
    free_bytes: int
    total_bytes: int
    reserve_bytes: int  # below it the level is "low"
    critical_bytes: int  # below it "critical"
    free_inodes: int | None  # None: the file system makes them as needed
    waiting_bytes: int  # of artifacts in the outbox: what uploading them would free
    waiting_episodes: int  # with a marker, and with no worker yet
    seconds_to_full: float | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    started_at: float  # seconds since the epoch
    updated_at: float
    draining: bool
    ready: int  # episodes with a marker that wait
    recording: int  # episodes without a marker
    held: int
    totals: PassResult
    destination: DestinationStatus
    progress: list[EpisodeProgress] = []
    recent: list[EpisodeResult] = []  # the last 20, newest last
    waiting: list[WaitingEpisode] = []  # the 20 that were tried most often, those first
    workers: list[WorkerStatus] = []
    host: HostStatus | None = None  # None: it does not give way
    disk: DiskStatus | None = None
    retention: RetentionStatus | None = None  # None: no copies are to be removed


def write(state: Path, snapshot: Snapshot) -> None:
    """Replace the snapshot in ``state``; not synced, and a full disk does not stop the daemon for it."""
    with contextlib.suppress(OSError):
        durable.write_file(state / STATUS_FILE, msgspec.json.encode(snapshot), sync=False)


def publish_pressure(state: Path, pressure: DiskPressure) -> None:
    """Replace ``state/pressure.json``; not synced, and no fault of the disk is an error.

    A disk that is full has no room for a new file, and then is when somebody reads this one: it always has the same
    length, so that it can be written over in place. Whoever reads in that moment may find it torn, and reads again.
    """
    path = state / PRESSURE_FILE
    data = msgspec.json.encode(pressure).ljust(_PRESSURE_BYTES - 1) + b"\n"
    try:
        durable.write_file(path, data, sync=False)
    except OSError:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, data, 0)
            finally:
                os.close(fd)


def read(state: Path) -> Snapshot | None:
    """The last snapshot written, or None when there is none that can be read."""
    try:
        return msgspec.json.decode((state / STATUS_FILE).read_bytes(), type=Snapshot)
    except (OSError, ValueError):
        return None


def notify(message: str) -> None:
    """Tell systemd (sd_notify(3)): ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``... Without one, does nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address)
