"""The spool: looking at it, and every move of an episode between its states.

What always holds: each method leaves, wherever it is interrupted, a spool that the next look brings to the
state before or after it, with nothing lost (argued at each); only the holder of the lock calls those that
change something; an episode's directory is only ever renamed within the spool, never written into, but for the
reason in a quarantined one.

Imports ``layout``, ``outbox``, ``reason``, ``removal``, ``shelf``, ``durable``, ``episode``, ``lifecycle``, ``errors``;
the supervisor and the shipper import it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from fastship import durable, sealed
from fastship.ages import Ages
from fastship.episode import MARKER, Manifest, Receipt, is_episode_id, now_wall
from fastship.errors import UsageError
from fastship.lifecycle import Facts
from fastship.spool.journal import Line
from fastship.spool.layout import Layout, Lock, episode_of, remedy_for, require_id
from fastship.spool.outbox import Outbox
from fastship.spool.reason import REASON_FILE, QuarantineReason, put_reason, read_reason, reason_of, reason_places
from fastship.spool.removal import remove_tree
from fastship.spool.shelf import Shelf

log = logging.getLogger(__name__)  # not structlog: `fastship status` imports this, and structlog is slow to load

_CONDEMNED_PREFIX = ".condemned-"
_REMOVING_PREFIX = ".removing-"
_ENTRY_NAME_BYTES = 200  # as long as an id can be


class Look(msgspec.Struct, frozen=True):
    """What one look through ``episodes/`` found."""

    ready: list[tuple[str, str]]  # (sort key, episode), sorted: with a marker and not held
    held: list[str]
    impossible: list[str]  # with a marker, but the name cannot be an id
    recording: list[str]  # without a marker
    links: list[str]  # symbolic links to a directory with a marker: no episodes


class HoldRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Why an episode is held; on disk as ``holds/<id>.json``."""

    episode: str
    reason: str  # "conflict", "changing", "changed-after-packing"
    status: int | None
    error: str
    body: str
    fingerprint: str  # of the episode when it was held
    artifact_sha256: str
    held_at: str  # UTC


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``quarantine/``."""

    episode: str
    name: str  # of the directory: the id, or id~N where there were more of that id
    reason: QuarantineReason | None  # None: not readable
    modified_at: float  # seconds since the epoch


class _Condemned(msgspec.Struct, frozen=True):
    """A decided quarantine, durable before anything moves."""

    name: str  # of the directory in episodes/, its bytes as hex
    target: str  # in quarantine/, likewise
    reason: QuarantineReason


class Spool:
    """One spool. Blocks on the disk; raises ``OSError`` where the disk does."""

    def __init__(self, root: Path | str, *, order: str = "name") -> None:
        self.paths = Layout(Path(root))
        self.outbox = Outbox(self.paths.outbox)
        self.shelf = Shelf(self.paths)
        self.ages = Ages(self.paths.state / "clock.json")
        self.order = order
        self.unfinished = True
        """Whether `finish_quarantines` may have something to complete; not known before it has looked."""
        self._unfinished: dict[str, OSError] = {}  # what it could not complete, by the entry's name, and why

    def create(self) -> None:
        """Make the directories that are missing. Raises `SpoolError` when they cannot be used. May be repeated."""
        self.paths.create()

    def lock(self, *, wait_s: float = 0.0) -> Lock:
        """Take the spool. Raises `SpoolBusy`."""
        return Lock(self.paths.lock, wait_s=wait_s)

    # --- looking ---------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """Go through ``episodes/``: one system call an entry (``access`` of the marker), none blocks on data."""
        ready: list[tuple[str, str]] = []
        impossible: list[str] = []
        recording: list[str] = []
        links: list[str] = []
        held = {name.removesuffix(".json") for name in os.listdir(self.paths.holds)}
        held_here: list[str] = []
        fd = os.open(self.paths.episodes, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = entry.name
                    if not entry.is_dir(follow_symlinks=False):
                        if entry.is_symlink() and os.access(f"{name}/{MARKER}", os.F_OK, dir_fd=fd):
                            links.append(name)
                        continue
                    if not os.access(f"{name}/{MARKER}", os.F_OK, dir_fd=fd, follow_symlinks=True):
                        recording.append(name)
                    elif not is_episode_id(name):
                        impossible.append(name)
                    elif name in held:
                        held_here.append(name)
                    else:
                        ready.append((self.key(name), name))
        finally:
            os.close(fd)
        ready.sort()
        return Look(ready, sorted(held_here), sorted(impossible), recording, sorted(links))

    def key(self, episode: str) -> str:
        """What decides an episode's turn (setting ``spool.order``)."""
        if self.order == "name":
            return episode
        try:
            age_ns = os.stat(self.paths.episodes / episode / MARKER).st_mtime_ns
        except OSError:
            age_ns = 0
        return f"{age_ns if self.order == 'oldest' else (1 << 63) - age_ns:020d}"

    def facts(self, episode: str) -> Facts:
        """What is on disk of one id, for `lifecycle.infer`."""
        directory = self.paths.episodes / episode
        return Facts(
            # os.path's: what may not or cannot be looked into is not there for us, and raises nothing.
            directory=os.path.isdir(directory) and not os.path.islink(directory),
            marker=os.path.exists(directory / MARKER),
            artifact=self.outbox.peek(episode) is not None,
            leftovers=any(
                os.path.exists(path)
                for path in (
                    self.outbox.artifact(episode),
                    self.outbox.partial(episode),
                    self.outbox.manifest(episode),
                )
            ),
            hold=os.path.exists(self.paths.holds / f"{episode}.json"),
            condemned=os.path.exists(self._condemned_path(episode)),
            quarantined=os.path.isdir(self.paths.quarantine / episode),
            retired=os.path.isdir(self.paths.shipped / episode),
        )

    # --- retiring --------------------------------------------------------------------------------------------

    def retire(self, retirements: Iterable[tuple[str, Receipt, Manifest]]) -> dict[str, OSError]:
        """Move proven episodes to ``shipped/`` and remove their artifacts; one group commit for all of them.

        1. The receipts, one journal line each, one fsync. 2. The renames. 3. fsync of both directories. 4. The
        artifacts. Interrupted before 2 is through: the episode is still in ``episodes/``, is offered again and
        answered 200. Before 4: the artifact has no episode any more and the sweep removes it. An episode of the
        same id that was retired before is not touched: the newer one stands beside it as ``<id>~1``.
        Returns those that could not be moved, with the reason; they stay as they are.

        A full disk has no room for a receipt, and for as long as none is written nothing leaves the outbox. So the
        artifacts go first then: each is proven to be at the receiver, which can be asked again by the manifests that
        stay. The episodes stay until their receipts are durable. Raises ``OSError`` where those cannot be written for
        all that.
        """
        batch = list(retirements)
        if not batch:
            return {}
        wall = now_wall()
        journal = self.paths.receipts / f"{wall[:10]}.jsonl"
        lines = [
            sealed.seal(msgspec.json.encode(Line(receipt=receipt, retired_at=wall, fingerprint=manifest.fingerprint)))
            for _, receipt, manifest in batch
        ]
        try:
            durable.append_lines(journal, lines)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            for episode, _, _ in batch:
                self.outbox.give_up(episode)
            durable.append_lines(journal, lines)
        failed: dict[str, OSError] = {}
        episodes, shipped = os.path.join(self.paths.episodes, ""), os.path.join(self.paths.shipped, "")
        for episode, _, _ in batch:
            try:
                target = shipped + episode
                if os.path.lexists(target):
                    target = os.fspath(durable.free_path(self.paths.shipped, episode))
                durable.rename_directory(episodes + episode, target)
            except OSError as error:
                failed[episode] = error
        durable.sync_directory(self.paths.shipped)
        durable.sync_directory(self.paths.episodes)
        for episode, _, _ in batch:
            if episode not in failed:
                self.outbox.remove(episode)
        return failed

    # --- quarantine ------------------------------------------------------------------------------------------

    def quarantine(self, name: str, *, status_code: int | None, error: str, body: str) -> Path:
        """Move an episode to ``quarantine/`` with its reason, and remove its artifact; keeps all its data.

        The decision is made durable first (``.condemned-*``), so that `finish_quarantines` can complete it from
        any point: the directory is found in the one place or in the other, never in both.
        """
        directory = self.paths.episodes / name
        target = durable.free_path(self.paths.quarantine, _entry_name(name))
        reason = QuarantineReason(
            status_code=status_code,
            error=error,
            body=body,
            quarantined_at_wall=now_wall(),
            mtime_ns=os.stat(directory).st_mtime_ns,
        )
        condemned = _Condemned(os.fsencode(name).hex(), os.fsencode(target.name).hex(), reason)
        path = self._condemned_path(name)
        durable.write_file(path, msgspec.json.encode(condemned))
        try:
            self._finish_quarantine(path, condemned)
        except OSError:
            if os.path.lexists(directory):  # it would not move: taken back, or it would hit what stands there one day
                durable.unlink_if_present(path)
            self.unfinished = True
            raise
        return target

    def finish_quarantines(self) -> None:
        """Complete the quarantines and removals that a crash or a fault of the disk interrupted. May be repeated.

        One that cannot be completed now (a full disk) is logged and left, `unfinished`: it stops nobody else.
        """
        unfinished: dict[str, OSError] = {}
        for entry in list(os.scandir(self.paths.quarantine)):
            if entry.name.startswith(_CONDEMNED_PREFIX):
                name = entry.name
                try:
                    condemned = msgspec.json.decode(Path(entry.path).read_bytes(), type=_Condemned)
                    name = os.fsdecode(bytes.fromhex(condemned.target))
                    self._finish_quarantine(Path(entry.path), condemned)
                except (ValueError, IsADirectoryError):  # not one that we wrote
                    continue
                except OSError as error:
                    unfinished[name] = error
                    log.error("the quarantine of %s cannot be completed now: %s", entry.name, error)
            elif entry.name.startswith(_REMOVING_PREFIX):
                _remove(Path(entry.path))
            elif entry.name.endswith(f".{REASON_FILE}"):
                self._forget_reason(Path(entry.path))
        self.unfinished, self._unfinished = bool(unfinished), unfinished

    def _finish_quarantine(self, path: Path, condemned: _Condemned) -> None:
        name = os.fsdecode(bytes.fromhex(condemned.name))
        source, target = (
            self.paths.episodes / name,
            self.paths.quarantine / os.fsdecode(bytes.fromhex(condemned.target)),
        )
        if source.is_dir() and not target.exists():
            durable.move(source, target)
        if target.is_dir():
            put_reason(target, condemned.reason)
        if is_episode_id(name):
            self.outbox.remove(name)
            durable.unlink_if_present(self.paths.holds / f"{name}.json")
        durable.unlink_if_present(path)
        durable.sync_directory(self.paths.quarantine)  # or it would come back and condemn a later episode of that name

    def _forget_reason(self, beside: Path) -> None:
        """What an interrupted `retry` left beside an entry that has moved."""
        entry = beside.with_name(beside.name.removesuffix(f".{REASON_FILE}"))
        with contextlib.suppress(OSError):
            if not os.path.lexists(entry) and read_reason(beside) is not None:
                os.unlink(beside)

    def _condemned_path(self, name: str) -> Path:
        # By digest: any name fits, however long or odd.
        return self.paths.quarantine / f"{_CONDEMNED_PREFIX}{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"

    def quarantined(self) -> list[Quarantined]:
        """The entries of ``quarantine/``, by name."""
        found = []
        for entry in os.scandir(self.paths.quarantine):
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                found.append(self._quarantined(Path(entry.path)))
        return sorted(found, key=lambda one: one.name)

    def _quarantined(self, path: Path) -> Quarantined:
        episode, modified_at = episode_of(path.name), path.stat().st_mtime
        return Quarantined(episode=episode, name=path.name, reason=reason_of(path), modified_at=modified_at)

    def retry(self, name: str, *, new_id: str | None = None) -> str:
        """Put a quarantined episode back into ``episodes/``, as it was; returns its id. Raises `UsageError`.

        The reason goes out of it first, durably, or it would come back inside the episode. It stands beside it until
        the episode has moved: the directory gets its time back from it, also where a retry is repeated. One that an
        interruption leaves without an entry is removed by `finish_quarantines`.
        """
        path = self._quarantine_path(name)
        episode = new_id or episode_of(path.name)
        if not (new_id or is_episode_id(episode)):
            raise UsageError(f"{episode!r} cannot be an episode's id", remedy="give it another id with --as")
        require_id(episode)
        if (self.paths.episodes / episode).exists():
            raise UsageError(f"episodes/{episode} is there already", remedy="give it another id with --as")
        place, beside = reason_places(path)
        reason = None
        with contextlib.suppress(PermissionError):  # another's directory: its reason is beside it
            reason = read_reason(place)
        inside = reason is not None
        reason = reason or read_reason(beside)
        if inside:
            os.rename(place, beside)
            durable.sync_directory(self.paths.quarantine)
        if reason is not None and reason.mtime_ns:
            os.utime(path, ns=(reason.mtime_ns, reason.mtime_ns))  # so its content digest is what it was
        if inside:
            durable.sync_directory(path)
        durable.move(path, self.paths.episodes / episode)
        durable.unlink_if_present(beside)
        return episode

    def drop_quarantined(self, name: str) -> None:
        """Remove a quarantined episode for good. Raises `UsageError`."""
        self._remove_entry(self._quarantine_path(name))

    def _quarantine_path(self, name: str) -> Path:
        """Where the entry is, once nothing of its quarantine is left to do: a decision that were carried out afterwards
        would take the episode that is put back, or the next one of its name. Raises `UsageError`."""
        if self.unfinished:
            self.finish_quarantines()
        error = self._unfinished.get(name)
        if error is not None:
            text = f"the quarantine of {name} cannot be completed now: {error.strerror}"
            raise UsageError(text, remedy=remedy_for(error))
        path = self.paths.quarantine / name
        # An empty name would be quarantine/ itself.
        if (
            not name
            or name != Path(name).name
            or name.startswith(".")
            or not os.path.isdir(path)
            or os.path.islink(path)
        ):
            raise UsageError(f"{name} is not in quarantine", remedy="see: fastship quarantine list")
        return path

    def clean_quarantine(self, keep_days: float) -> list[str]:
        """Remove the entries older than ``keep_days`` by mtime (0 or less: none); returns their names.

        As old as `Ages` believes: a clock that jumped removes nothing.
        """
        if keep_days <= 0:
            return []
        self.ages.look()
        removed = []
        for entry in self.quarantined():
            if entry.name not in self._unfinished and self.ages.age_s(entry.modified_at) > keep_days * 86400:
                self._remove_entry(self.paths.quarantine / entry.name)
                removed.append(entry.name)
        return removed

    def _remove_entry(self, path: Path) -> None:
        # A reason beside it goes first, else nobody would remove it after an interruption. Then it is renamed: an
        # interrupted removal is recognised and finished, and never looks like an entry, nor does after a power loss.
        durable.unlink_if_present(reason_places(path)[1])
        # One that would not go may be there.
        doomed = durable.free_path(self.paths.quarantine, f"{_REMOVING_PREFIX}{path.name}")
        os.rename(path, doomed)
        durable.sync_directory(self.paths.quarantine)
        _remove(doomed)

    # --- holds -----------------------------------------------------------------------------------------------

    def hold(self, record: HoldRecord) -> None:
        """Leave an episode and its artifact where they are until the hold is released. One durable file."""
        durable.write_file(self.paths.holds / f"{record.episode}.json", msgspec.json.encode(record))

    def release(self, episode: str) -> bool:
        """End a hold, durably: nobody would release again one that came back. True when there was one."""
        released = durable.unlink_if_present(self.paths.holds / f"{episode}.json")
        if released:
            durable.sync_directory(self.paths.holds)
        return released

    def holds(self) -> list[HoldRecord]:
        """The holds, by id."""
        found = []
        for name in sorted(os.listdir(self.paths.holds)):
            if name.endswith(".json") and not name.startswith("."):
                record = self.find_hold(name.removesuffix(".json"))
                if record is not None:
                    found.append(record)
        return found

    def find_hold(self, episode: str) -> HoldRecord | None:
        """The hold on one episode; one that cannot be read holds all the same, with that as its reason."""
        path = self.paths.holds / f"{episode}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=HoldRecord)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return HoldRecord(
                episode=episode,
                reason="unreadable",
                status=None,
                error=f"{path} cannot be read: {error}",
                body="",
                fingerprint="",
                artifact_sha256="",
                held_at="",
            )

    def keep_local(self, episode: str, *, new_id: str | None = None) -> str:
        """An operator's word on a hold: ship the local episode, as ``new_id`` where given; returns its id.

        Under its own id it is offered again as it is, for when the receiver's copy was put right. The artifact
        goes with the hold only for a new id, which the names inside it must carry.
        """
        self._require_hold(episode)
        if new_id is not None:
            require_id(new_id)
            if (self.paths.episodes / new_id).exists():
                raise UsageError(f"episodes/{new_id} is there already", remedy="choose another id")
            durable.move(self.paths.episodes / episode, self.paths.episodes / new_id)
            self.outbox.remove(episode)
        self.release(episode)
        return new_id or episode

    def drop_local(self, episode: str) -> Path:
        """An operator's word on a hold: the receiver's copy is right. The local one is kept, in quarantine."""
        record = self._require_hold(episode)
        return self.quarantine(
            episode, status_code=record.status, error=f"dropped by an operator: {record.error}", body=record.body
        )

    def _require_hold(self, episode: str) -> HoldRecord:
        record = self.find_hold(episode) if is_episode_id(episode) else None
        if record is None or not (self.paths.episodes / episode).is_dir():
            raise UsageError(f"{episode} is not held", remedy="see: fastship holds list")
        return record

    # --- sweeping --------------------------------------------------------------------------------------------

    def sweep(self) -> list[str]:
        """Remove outbox files and holds whose episode is not in ``episodes/`` any more; returns those ids.

        What cannot be removed (somebody's directory named like an artifact) is logged and left.
        """
        ids = self.outbox.episodes()
        ids.update(name.removesuffix(".json") for name in os.listdir(self.paths.holds) if name.endswith(".json"))
        swept = []
        for episode in sorted(ids):
            if (self.paths.episodes / episode).is_dir():
                continue
            try:
                self.outbox.remove(episode)
                self.release(episode)
            except OSError as error:
                log.warning("%s cannot be swept: %s", episode, error)
            else:
                swept.append(episode)
        return swept

    def remove_temporaries(self) -> None:
        """Remove what interrupted writes left. At start only, under the lock."""
        for directory in (self.paths.outbox, self.paths.holds, self.paths.state, self.paths.quarantine):
            durable.remove_temporaries(directory)


def _remove(path: Path) -> None:
    if not remove_tree(path):
        log.warning("%s could not be removed whole; the next start tries again", ascii(os.fspath(path)))


def _entry_name(name: str) -> str:
    """Under what name an episode stands in ``quarantine/``: its own, but for one that cannot be an id and would be
    taken for a file of ours there (a leading dot), or has no room for what we put around it (255 bytes is the limit).
    """
    return os.fsdecode(os.fsencode(f"_{name}" if name.startswith(".") else name)[:_ENTRY_NAME_BYTES])
