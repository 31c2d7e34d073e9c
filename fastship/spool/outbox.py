"""The outbox: where artifacts wait, and what a worker may write.

``<id>.tar.zst.partial`` while it is packed, then ``<id>.manifest.json``, then the rename to ``<id>.tar.zst``:
an artifact with its final name is whole and has its manifest, whatever process died when.

An artifact that is sent while it is packed has ``<id>.upload.json`` beside it: which upload has some of it. A crash
leaves the partial, whose whole frames are taken again (`frames.KeptFrames`), and the upload goes on behind them.

Nothing here is fsynced. An artifact can always be packed again from its episode, which stays until a receipt is
durable; so the worst that a power loss can do is to cost a pack. It must not be *believed* afterwards, though:
the manifest carries the boot id, and an artifact of another boot is digested again before it is sent
(`Outbox.find`).

Imports ``durable``, ``episode`` and ``errors``; the worker and ``spool`` import it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Collection
from pathlib import Path

import msgspec

from fastship import durable, sealed
from fastship.episode import ARTIFACT_SUFFIX, Manifest

log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ARTIFACT_SUFFIX + ".partial"
MANIFEST_SUFFIX = ".manifest.json"
UPLOAD_SUFFIX = ".upload.json"


class UploadNote(msgspec.Struct, frozen=True):
    """Where some of an artifact is. Of this boot only: after a power loss the file here may be less than was sent."""

    url: str
    destination: str
    boot_id: str


class Outbox:
    """The files of one directory. Each episode's files are touched by one worker at a time, the one it is with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._prefix = os.path.join(directory, "")  # strings: for a tiny episode paths made by pathlib are a cost

    def _path(self, episode: str, suffix: str) -> str:
        return f"{self._prefix}{episode}{suffix}"

    def artifact(self, episode: str) -> Path:
        return self.directory / (episode + ARTIFACT_SUFFIX)

    def partial(self, episode: str) -> Path:
        return self.directory / (episode + PARTIAL_SUFFIX)

    def manifest(self, episode: str) -> Path:
        return self.directory / (episode + MANIFEST_SUFFIX)

    def upload_note(self, episode: str) -> Path:
        return self.directory / (episode + UPLOAD_SUFFIX)

    def begin(self, episode: str) -> io.FileIO:
        """The partial, unbuffered, at its beginning, with what an interrupted packing left of it. Raises ``OSError``.

        Who writes it truncates it behind what he wrote. An upload of an older artifact is forgotten with it.
        """
        path = self._path(episode, PARTIAL_SUFFIX)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o644)
        except OSError:  # not a file of ours, or not ours to write
            self.drop_partial(episode)
            fd = os.open(path, flags, 0o644)
        try:
            if not os.fstat(fd).st_size:
                self.note_upload(episode, "", "")
        except BaseException:
            os.close(fd)
            raise
        return io.FileIO(fd, "r+b")

    def note_upload(self, episode: str, url: str, destination: str) -> None:
        """Keep in mind that the upload ``url`` has some of the artifact; "": none has. Raises ``OSError``."""
        if url:
            note = UploadNote(url, destination, durable.boot_id())
            durable.write_file(self.upload_note(episode), sealed.seal(msgspec.json.encode(note)), sync=False)
        else:
            durable.unlink_if_present(self._path(episode, UPLOAD_SUFFIX))

    def find_upload(self, episode: str, destination: str) -> str:
        """The upload at ``destination`` that has some of the artifact, or of the partial; "" where none has."""
        try:
            note = msgspec.json.decode(sealed.unseal(self.upload_note(episode).read_bytes()), type=UploadNote)
        except (OSError, ValueError):
            return ""
        return note.url if (note.destination, note.boot_id) == (destination, durable.boot_id()) else ""

    def commit(self, manifest: Manifest) -> Path:
        """Give the finished partial its name. A crash in between, or a rename that fails, leaves the partial beside a
        manifest that nobody reads as long as it is there (`drop_partial`).

        An older artifact goes first: beside the new manifest it would be believed if it had the same size. So the
        manifest is written in place, without a temporary file: while it is not whole there is no artifact.
        """
        artifact = self._path(manifest.episode, ARTIFACT_SUFFIX)
        durable.unlink_if_present(artifact)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path(manifest.episode, MANIFEST_SUFFIX), flags, 0o644)
        try:
            durable.write_all(fd, sealed.seal(msgspec.json.encode(manifest)))
        finally:
            os.close(fd)
        os.rename(self._path(manifest.episode, PARTIAL_SUFFIX), artifact)
        return Path(artifact)

    def peek(self, episode: str) -> Manifest | None:
        """The manifest of an artifact that is there with the right size, else None."""
        try:
            size = os.stat(self._path(episode, ARTIFACT_SUFFIX)).st_size
        except OSError:
            return None
        manifest = self._read_manifest(episode)
        return manifest if manifest is not None and manifest.artifact_bytes == size else None

    def _read_manifest(self, episode: str) -> Manifest | None:
        try:
            manifest = msgspec.json.decode(sealed.unseal(self.manifest(episode).read_bytes()), type=Manifest)
        except sealed.Spoilt as error:
            log.warning("%s: %s; its artifact is packed again", self.manifest(episode), error)
            return None
        except (OSError, ValueError):
            return None
        return manifest if manifest.episode == episode else None

    def find(self, episode: str) -> Manifest | None:
        """As `peek`, and the artifact can be believed: written in this boot, or its SHA-256 is right. Reads it then."""
        manifest = self.peek(episode)
        if manifest is None or (manifest.boot_id and manifest.boot_id == durable.boot_id()):
            return manifest
        return manifest if is_intact(self.artifact(episode), manifest) else None

    def give_up(self, episode: str) -> None:
        """Remove all but the manifest: the receiver has the artifact, and a full disk needs the room for its receipt.

        A crash before that is written, or a disk that stays full, leaves the manifest, by which the receiver is asked
        again. Packed again it could be another artifact (``pack.level = "auto"``, or set otherwise since), and to a
        receiver that compares no more than artifacts a conflict.
        """
        for suffix in (ARTIFACT_SUFFIX, PARTIAL_SUFFIX, UPLOAD_SUFFIX):
            durable.unlink_if_present(self._path(episode, suffix))

    def find_given_up(self, episode: str) -> Manifest | None:
        """The manifest that `give_up` left. A partial beside it is of a packing that came later, or of its own."""
        manifest = self._read_manifest(episode)  # first: mostly there is none, and then nothing else is looked for
        others = (self._path(episode, suffix) for suffix in (ARTIFACT_SUFFIX, PARTIAL_SUFFIX))
        return None if manifest is None or any(map(os.path.lexists, others)) else manifest

    def remove(self, episode: str) -> None:
        """Remove all files of an episode, the artifact first: a manifest alone is only asked about. May be repeated."""
        for suffix in (ARTIFACT_SUFFIX, PARTIAL_SUFFIX, MANIFEST_SUFFIX, UPLOAD_SUFFIX):
            durable.unlink_if_present(self._path(episode, suffix))

    def drop_partial(self, episode: str) -> None:
        """Remove what a packing left that failed. Raises ``OSError``.

        First the manifest, where there is no artifact: without the partial it would say that the artifact was given up.
        Where there is no partial none was begun, and a manifest alone says just that.
        """
        if not os.path.lexists(self._path(episode, PARTIAL_SUFFIX)):
            return
        if not os.path.lexists(self._path(episode, ARTIFACT_SUFFIX)):
            durable.unlink_if_present(self._path(episode, MANIFEST_SUFFIX))
        durable.unlink_if_present(self._path(episode, PARTIAL_SUFFIX))

    def partial_bytes(self, episode: str) -> int:
        """What an interrupted packing left of the artifact."""
        try:
            return os.stat(self._path(episode, PARTIAL_SUFFIX)).st_size
        except OSError:
            return 0

    def size_bytes(self, *, but: str = "") -> int:
        """Of all artifacts, whole or partial, but those of one episode. A stat for each."""
        own = {but + ARTIFACT_SUFFIX, but + PARTIAL_SUFFIX}
        total = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith((ARTIFACT_SUFFIX, PARTIAL_SUFFIX)) and entry.name not in own:
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_size
        return total

    def packed(self) -> list[str]:
        """The ids that have an artifact with its final name, as far as names tell."""
        names = os.listdir(self.directory)
        return [name.removesuffix(ARTIFACT_SUFFIX) for name in names if name.endswith(ARTIFACT_SUFFIX)]

    def drop_partials(self, but: Collection[str]) -> list[str]:
        """Remove what interrupted packings left, but of the episodes ``but``; returns whose. Each is packed anew."""
        dropped = []
        for name in os.listdir(self.directory):
            episode = name.removesuffix(PARTIAL_SUFFIX)
            if name.endswith(PARTIAL_SUFFIX) and episode not in but:
                with contextlib.suppress(OSError):
                    self.drop_partial(episode)
                    dropped.append(episode)
        return dropped

    def drop_temporaries(self, pid: int) -> None:
        """Remove what was not written to its end by the worker that was process ``pid``. Raises ``OSError``.

        Nobody else can be writing it: a temporary file has its writer's process id in its name, workers alone write
        here, and the caller has waited for this one's end (wait(2) returns after its last thread has ended) and started
        none since, which alone could have been given the same id.
        """
        durable.remove_temporaries(self.directory, pid=pid)

    def episodes(self) -> set[str]:
        """The ids that have any file here."""
        ids = set()
        for name in os.listdir(self.directory):
            for suffix in (PARTIAL_SUFFIX, ARTIFACT_SUFFIX, MANIFEST_SUFFIX, UPLOAD_SUFFIX):
                if name.endswith(suffix):
                    ids.add(name.removesuffix(suffix))
                    break
        return ids


def is_intact(artifact: Path, manifest: Manifest) -> bool:
    """Whether the file's bytes still are what the manifest says: reads all of it. False when it is unreadable."""
    try:
        with open(artifact, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == manifest.artifact_sha256
    except OSError:
        return False
