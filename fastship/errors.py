"""Every error fastship raises on purpose, and what each one asks of its reader.

What always holds: an error has a stable ``code`` for scripts, an ``exit_code`` for shells, whether trying
again unchanged can help (``retryable``), and a ``remedy``: what the operator should do next. The command
line prints ``message`` and ``remedy`` and never a traceback for one of these.

Imports nothing of fastship; everything may import it.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_DIFFERS = 1
EXIT_USAGE = 2
EXIT_SETTINGS = 3
EXIT_NOT_SHIPPED = 4
EXIT_BUSY = 5
EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h


class FastshipError(Exception):
    """Base of all. ``str(error)`` is one sentence for people; ``remedy`` is the next step, possibly empty."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = EXIT_INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(FastshipError):
    """The command line asks for something that cannot be."""

    code = "usage"
    exit_code = EXIT_USAGE


class SettingsError(FastshipError):
    """A settings file, profile or ``--set`` is wrong; the message names the key and where it was set."""

    code = "settings"
    exit_code = EXIT_SETTINGS


class SpoolError(FastshipError):
    """The spool's directories cannot be used (missing, not ours, on two file systems)."""

    code = "spool"
    exit_code = EXIT_SETTINGS


class SpoolBusy(FastshipError):
    """Another process holds the spool's lock."""

    code = "busy"
    exit_code = EXIT_BUSY
    retryable = True


class OutputError(FastshipError):
    """Standard output does not take what is written to it; what the command was to do is done."""

    code = "output"
    exit_code = EXIT_INTERNAL


class WorkerCannotStart(FastshipError):
    """A worker process ended before it said it was ready: starting more of them would not help."""

    code = "worker-boot"
    exit_code = EXIT_INTERNAL


class PackError(FastshipError):
    """An episode could not be packed; nothing of it was changed."""

    code = "pack"
    exit_code = EXIT_NOT_SHIPPED
    retryable = True


class EpisodeChanged(PackError):
    """A file of the episode changed, grew, shrank or vanished while it was being read."""

    code = "episode-changed"


class EpisodeUnfinished(PackError):
    """Its marker was taken away again: the recorder is not finished with it."""

    code = "episode-unfinished"


class EpisodeUnmovable(PackError):
    """It could not be retired: a mount point, or a directory that is another's."""

    code = "episode-unmovable"


class EpisodeUnreadable(PackError):
    """A file or directory of the episode cannot be read (permissions, I/O error)."""

    code = "episode-unreadable"


class OutboxFull(PackError):
    """The file system of the outbox has no room (ENOSPC, EDQUOT)."""

    code = "outbox-full"


class DiskShort(PackError):
    """Packing would eat into the space that is kept free for others, or the outbox has all that it may have."""

    code = "disk-short"


class ArtifactError(FastshipError):
    """An artifact is not what it should be: truncated, damaged, or not zstd and tar at all."""

    code = "artifact"
    exit_code = EXIT_NOT_SHIPPED


class ExtractRefused(ArtifactError):
    """A member would be written outside the target directory, or is of a kind that is not extracted."""

    code = "extract-refused"


class ExtractError(FastshipError):
    """The target's file system does not take a member (no room, no permission, a name it cannot hold)."""

    code = "extract"
    exit_code = EXIT_NOT_SHIPPED
    retryable = True


class DestinationError(FastshipError):
    """The destination cannot be asked, or does not answer as one that could be; nothing is known of any episode."""

    code = "destination"
    exit_code = EXIT_NOT_SHIPPED
    retryable = True


class ReceiverError(FastshipError):
    """The receiver cannot start or its root cannot be used."""

    code = "receiver"
    exit_code = EXIT_SETTINGS
