"""The survey of a host: the measurements that `bench` and `tune` share, each with its share of the time.

What always holds: what is made on disk is made in one directory, which goes when the survey ends; episodes are only
read; what cannot be measured is None, with a note that says why.

Imports the rest of ``tune``, ``upload``, ``loopback``, ``status``, ``settings``; `bench` and `tuning` import it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from fastship import __version__, status
from fastship.errors import ReceiverError, UsageError
from fastship.loopback import LoopbackReceiver
from fastship.pack import PackOptions
from fastship.settings import DestinationSettings, Settings
from fastship.tune import episodes, measure
from fastship.tune.episodes import Chosen
from fastship.tune.measure import Compressed, Cost, Packed, Storage, Writing
from fastship.tune.model import Host, LevelCost, calibrated
from fastship.tune.report import MeasuredEpisodes, MeasuredHost
from fastship.upload import LinkSpeed, LinkUnknown, measure_link

SEND_CPU_S = 0.4e-9
"""CPU seconds a byte sent where it could not be measured: docs/design.md, Upload by CPU."""

EPISODE_CPU_S = 1.8e-3
"""CPU seconds an episode costs beside its bytes: claiming, request, receipt, retiring. Of `fastship once` with 1,000
episodes of 1 MB (bench/bench_tune.py), less what packing and sending their bytes costs; 2.6 GHz."""

Say = Callable[[str], None]
_SCRATCH_PREFIX = ".tmp-measuring-"
_BUSY_CORES = 0.1  # of all: what others may use before it is said
_FRESH_S = 60.0  # a daemon writes its status far more often
_WRITE_BYTES = 8 << 20
_WRITES_BYTES = 128 << 20  # more says no more
_LINK_LIMIT_BYTES = 256 << 20


class Survey:
    """One run. Use as a context manager: its scratch directory goes at the end."""

    def __init__(
        self, settings: Settings, sources: Sequence[Path], *, size_bytes: int, seconds: float, say: Say
    ) -> None:
        self.settings = settings
        self.options = PackOptions(frame_bytes=settings.pack.frame_bytes, owner=settings.pack.owner)
        self.cores = len(os.sched_getaffinity(0))
        self.threads = settings.pack.threads or max(1, self.cores - settings.host.reserved_cores)
        self.notes: list[str] = []
        self.seconds = seconds
        self._sources = sources
        self._size_bytes = size_bytes
        self.say = say
        self._cores_seen: list[float] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Survey:
        with contextlib.ExitStack() as stack:
            self.started = time.monotonic()
            root = Path(self.settings.spool.root) if self.settings.spool.root else None
            chosen = episodes.choose(self._sources, root, self._size_bytes)  # before there is anything of ours
            self.outbox = self._scratch_place()
            self.scratch = Path(stack.enter_context(_scratch(self.outbox)))
            self._busy = _BusyOthers()
            self._prepare(chosen)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _scratch_place(self) -> Path:
        """Where artifacts are written: the outbox, else this user's place for temporary files."""
        root = self.settings.spool.root
        if root:
            outbox = Path(root) / "outbox"
            if outbox.is_dir() and os.access(outbox, os.W_OK | os.X_OK):
                return outbox
            self.notes.append(f"{outbox} cannot be written to, so {tempfile.gettempdir()} was measured instead")
        return Path(tempfile.gettempdir())

    def _prepare(self, chosen: Chosen | None) -> None:
        if chosen is None:
            self.say("generating telemetry")
            chosen = episodes.generate(self.scratch, min(self._size_bytes, 256_000_000))
            root = self.settings.spool.root
            where = f"{root} has no finished episode" if root else "no spool is set"
            self.notes.append(f"{where}: measured on generated telemetry, not on yours; see --from")
        self.chosen = chosen
        self.files = list(episodes.regular_files(chosen))
        self.pieces = episodes.read_pieces(chosen, self.options, min(self._size_bytes, self._piece_limit()))
        self.piece_bytes = sum(map(len, self.pieces))

    def _piece_limit(self) -> int:
        return max(16 << 20, min(256 << 20, int(psutil.virtual_memory().available) // 8))

    # --- the parts -------------------------------------------------------------------------------------------

    def read(self) -> Storage:
        self.say("reading")
        share, limit = self.seconds / 15, self._size_bytes
        cold = None
        if measure.drop_from_cache(self.files, limit):
            cold = measure.read_files(self.files, limit, share)
        measure.read_files(self.files, limit, share)  # those that the first one did not come to
        warm = measure.fastest(lambda: measure.read_files(self.files, limit, share), share)
        return Storage(cold, warm)

    def digest(self, *, sha256: bool) -> Cost:
        self.say("SHA-256" if sha256 else "BLAKE3")
        return measure.fastest(lambda: measure.digest(self.pieces, sha256=sha256), self.seconds / 30)

    def write(self) -> Writing:
        self.say("writing")
        data = os.urandom(_WRITE_BYTES)
        most = min(_WRITES_BYTES, self._size_bytes)
        try:
            first = measure.write_file(self.outbox, data, _WRITE_BYTES, sync=True)
            # A slow disk takes long to sync what memory has taken at once.
            size = max(_WRITE_BYTES, min(most, int(first.bytes_per_s * self.seconds / 20)))
            synced = measure.fastest(
                lambda: measure.write_file(self.outbox, data, size, sync=True), self.seconds / 20, rounds=2
            )
            cached = measure.fastest(lambda: measure.write_file(self.outbox, data, size, sync=False), self.seconds / 30)
            return Writing(cached, synced)
        except OSError as error:
            raise UsageError(
                f"{self.outbox} cannot be written to: {error.strerror}", remedy="free space there, or a smaller --size"
            ) from None

    def compress(self, level: int, threads: int, seconds: float) -> tuple[Compressed, int]:
        """At a level, on as many pieces as go into the time, at least one a thread; and how many these were."""
        self.say(f"zstd level {level}, {_threads(threads)}")
        count = min(threads, len(self.pieces))
        made = measure.compress(self.pieces[:count], level, threads)
        fitting = min(len(self.pieces), int(count * seconds / max(made.cost.wall_s, 1e-6)))
        if fitting >= 2 * count:
            count, made = fitting, measure.compress(self.pieces[:fitting], level, threads)
        if threads == self.threads:
            self._cores_seen.append(min(made.cores, float(threads)))
        return made, count

    def pieces_within(self, level: int, seconds: float) -> int:
        """About how many pieces all threads compress at a level in that time, at least one each."""
        made = measure.compress(self.pieces[: self.threads], level, self.threads)
        return max(self.threads, min(len(self.pieces), int(self.threads * seconds / max(made.cost.wall_s, 1e-6))))

    def levels(self, levels: Sequence[int], seconds: float) -> list[LevelCost]:
        """Each of the levels, on all threads; high ones on a part, set right by the lowest one on that part."""
        lowest = min(levels)
        share = seconds / (len(levels) + 1)
        wholes, count = self.compress(lowest, self.threads, share)
        whole = wholes.at(lowest)
        parts = {count: whole}
        found = [whole]
        for level in sorted(levels)[1:]:
            made, part = self.compress(level, self.threads, share)
            if part not in parts:
                parts[part] = measure.compress(self.pieces[:part], lowest, self.threads).at(lowest)
            found.append(calibrated(whole, parts[part], made.at(level)))
        return found

    def pack(self, level: int, seconds: float) -> tuple[Packed, int]:
        """Packing as it is done, and with how many threads: one where episodes have a frame or two only."""
        self.say(f"packing at level {level}")
        frames = self.chosen.bytes / len(self.chosen.paths) / self.options.frame_bytes
        threads = self.threads if frames >= 2 * self.threads else 1
        options = PackOptions(level=level, frame_bytes=self.options.frame_bytes, owner=self.options.owner)
        return measure.pack_episodes(self.chosen.paths, self.outbox, options, threads, seconds), threads

    # --- links -----------------------------------------------------------------------------------------------

    def loopback(self, seconds: float) -> LinkSpeed | LinkUnknown:
        """A receiver of our own takes what it can; what it verifies at an upload's end is not in it."""
        self.say("uploading to a receiver on loopback")
        try:
            with LoopbackReceiver(self.scratch / "receiver", self.scratch / "receiver.log", "the") as receiver:
                destination = DestinationSettings(url=receiver.url)
                return measure_link(
                    destination, self.settings.upload, connections=2, seconds=seconds, limit_bytes=_LINK_LIMIT_BYTES
                )
        except ReceiverError as error:
            return LinkUnknown(error.message)

    def link(self, seconds: float, connections: int, commit: str | None) -> LinkSpeed | LinkUnknown:
        """What the configured destination takes."""
        destination = self.settings.destination
        if not destination.url:
            return LinkUnknown("no destination is set")
        self.say(f"the link to {destination.url}")
        return measure_link(
            destination,
            self.settings.upload,
            connections=connections,
            seconds=seconds,
            limit_bytes=_LINK_LIMIT_BYTES,
            code_commit=commit,
        )

    # --- the host --------------------------------------------------------------------------------------------

    @property
    def cores_to_be_had(self) -> float:
        """Cores that were at work while all threads compressed: fewer than there are on a busy or a limited host."""
        return statistics.median(self._cores_seen)

    def measured_host(self) -> MeasuredHost:
        root = self.settings.spool.root
        return MeasuredHost(
            cpu=_processor(),
            cores=self.cores,
            cores_to_be_had=round(self.cores_to_be_had, 2),
            memory_available_bytes=int(psutil.virtual_memory().available),
            kernel=platform.release(),
            fastship=__version__,
            spool=file_system(Path(root)) if root else "none is set",
            outbox=file_system(self.outbox),
        )

    def measured_episodes(self) -> MeasuredEpisodes:
        return MeasuredEpisodes(
            told=self.chosen.told,
            generated=self.chosen.generated,
            episodes=len(self.chosen.paths),
            files=self.chosen.files,
            bytes=self.chosen.bytes,
        )

    def all_notes(self) -> list[str]:
        """What whoever reads the figures must know."""
        notes = list(self.notes)
        others = self._busy.cores()
        if others > _BUSY_CORES * self.cores:
            notes.append(f"others used {others:.1f} of the {self.cores} cores meanwhile: measure again on a quiet host")
        root = self.settings.spool.root
        if root and _daemon_runs(Path(root) / "state"):
            notes.append("fastship is running on this spool: these figures are of what it left over")
        return notes


def host_of(
    reading: Storage,
    writing: Writing,
    packed: Packed,
    reference: LevelCost,
    sha256: Cost,
    send_cpu_s: float,
    cores: float,
    link_bytes_per_s: float | None,
) -> Host:
    """The model's values from what was measured. ``reference`` is of the level that was packed with."""
    stored = sha256.cpu_s_per_byte + writing.cached.cpu_s_per_byte
    around = packed.cost.cpu_s_per_byte - reference.zstd_cpu_s - stored / reference.ratio
    return Host(
        cores=cores,
        around_cpu_s=max(0.0, around),
        artifact_cpu_s=stored + send_cpu_s,
        episode_cpu_s=EPISODE_CPU_S,
        episode_bytes=packed.cost.bytes / packed.episodes,
        read_bytes_per_s=(reading.cold or reading.warm).bytes_per_s,
        write_bytes_per_s=writing.synced.bytes_per_s,
        link_bytes_per_s=link_bytes_per_s,
    )


def _daemon_runs(state: Path) -> bool:
    snapshot = status.read(state)
    return snapshot is not None and psutil.pid_exists(snapshot.pid) and time.time() - snapshot.updated_at < _FRESH_S


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


class _BusyOthers:
    """CPU that is not ours, from /proc/stat."""

    def __init__(self) -> None:
        self._before = self._used(), time.monotonic()

    def cores(self) -> float:
        return max(0.0, (self._used() - self._before[0]) / max(1e-3, time.monotonic() - self._before[1]))

    @staticmethod
    def _used() -> float:
        times = psutil.cpu_times()
        ours = psutil.Process().cpu_times()
        system = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        return float(system - sum(ours[:4]))


def file_system(path: Path) -> str:
    """``/data/spool/outbox (ext4 on /dev/sda1)``."""
    best = ("", "?", "?")
    with contextlib.suppress(OSError):
        real = os.path.realpath(path)
        for one in psutil.disk_partitions(all=True):
            inside = real == one.mountpoint or real.startswith(one.mountpoint.rstrip("/") + "/")
            if inside and len(one.mountpoint) >= len(best[0]):
                best = (one.mountpoint, one.fstype, one.device)
    return f"{path} ({best[1]} on {best[2]})"


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[str]:
    """A directory on the file system of ``beside``, which the spool's own sweeping does not look at.

    Whoever works in it holds its lock (``flock(2)``): what one that was killed left, generated episodes, goes here.
    """
    parent = beside.parent if beside.name == "outbox" and os.access(beside.parent, os.W_OK) else beside
    try:
        _remove_left(parent)
        place = tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=parent)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{parent} cannot be written to: {error.strerror}", remedy="free space there") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place
    finally:
        os.close(lock)
        shutil.rmtree(place, ignore_errors=True)


def _remove_left(parent: Path) -> None:
    for path in parent.glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or of somebody who measures now
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
