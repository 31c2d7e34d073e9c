"""Why an episode is in quarantine, as a file in it or beside it.

What always holds: a reason is written whole, and takes the place of nothing that the recorder made.

Imports ``durable``; ``store`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import msgspec

from fastship import durable

REASON_FILE = "quarantine_reason.json"


class QuarantineReason(msgspec.Struct, frozen=True, kw_only=True):
    """``quarantine_reason.json`` (shared with the tool that fastship replaced)."""

    status_code: int | None
    error: str
    body: str
    quarantined_at_wall: str  # UTC, %Y-%m-%dT%H:%M:%SZ
    mtime_ns: int = 0  # of the directory before the reason was put into it


def reason_places(entry: Path) -> tuple[Path, Path]:
    """Where the reason of an entry of ``quarantine/`` is: in it, or beside it where that cannot be, or a file that the
    recorder named so stands there (one that is no reason: ours are written whole)."""
    return entry / REASON_FILE, entry.with_name(f"{entry.name}.{REASON_FILE}")


def reason_of(entry: Path) -> QuarantineReason | None:
    """Of an entry of ``quarantine/``; None where there is none that can be read."""
    for place in reason_places(entry):
        with contextlib.suppress(OSError):
            found = read_reason(place)
            if found is not None:
                return found
    return None


def read_reason(path: Path) -> QuarantineReason | None:
    """None where there is none, or something else. Raises ``OSError`` where that cannot be told."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            raw = file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link in a circle, a socket
            return None
        raise
    try:
        return msgspec.json.decode(raw, type=QuarantineReason)
    except ValueError:
        return None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a recorder may have made a FIFO of that name


def put_reason(entry: Path, reason: QuarantineReason) -> None:
    """Write the reason of an entry of ``quarantine/``, durably. Raises ``OSError``. May be repeated."""
    # Written outside and moved in: a crash may leave no temporary file among the episode's own.
    staged = entry.with_name(f"{durable.TEMP_PREFIX}{REASON_FILE}")
    durable.write_file(staged, msgspec.json.format(msgspec.json.encode(reason)))
    place, beside = reason_places(entry)
    try:
        os.rename(staged, beside if os.path.lexists(place) and read_reason(place) is None else place)
        durable.sync_directory(entry)
    except PermissionError:  # a directory of another owner: beside it, then
        os.rename(staged, beside)
    durable.sync_directory(entry.parent)
