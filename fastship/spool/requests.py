"""How an operator's command reaches the daemon that holds the spool: a file in, a file out.

``state/requests/<name>.json`` is the request, ``<name>.answer`` the answer; both appear whole (rename). The
daemon notices them by inotify and at every look. A request whose sender went away is carried out all the same:
it was an operator's word.

Imports ``durable``; ``spool``'s store, the supervisor and the shipper import it.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Literal

import msgspec

from fastship import durable

Action = Literal["retry", "drop", "keep-local", "drop-local"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    action: Action
    episode: str
    new_id: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    text: str
    remedy: str = ""


def submit(directory: Path, request: Request, *, timeout_s: float) -> Answer | None:
    """Leave a request for the daemon and wait for its answer; None when none came in time (it is withdrawn then)."""
    path = directory / f"{uuid.uuid4().hex}.json"
    answer = path.with_suffix(".answer")
    durable.write_file(path, msgspec.json.encode(request), sync=False)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer.exists():
            try:
                return msgspec.json.decode(answer.read_bytes(), type=Answer)
            finally:
                durable.unlink_if_present(answer)
        time.sleep(0.02)
    durable.unlink_if_present(path)
    return None


def pending(directory: Path) -> list[tuple[Path, Request | None]]:
    """The requests that wait; None for one that cannot be read."""
    found: list[tuple[Path, Request | None]] = []
    for name in sorted(os.listdir(directory)):
        if name.endswith(".json") and not name.startswith(durable.TEMP_PREFIX):
            path = directory / name
            try:
                found.append((path, msgspec.json.decode(path.read_bytes(), type=Request)))
            except (OSError, msgspec.MsgspecError):
                found.append((path, None))
    return found


def answer(path: Path, reply: Answer) -> None:
    """Answer the request at ``path`` and remove it."""
    durable.write_file(path.with_suffix(".answer"), msgspec.json.encode(reply), sync=False)
    durable.unlink_if_present(path)


def forget_old(directory: Path, *, older_than_s: float) -> None:
    """Remove answers nobody fetched."""
    for entry in os.scandir(directory):
        if time.time() - entry.stat().st_mtime > older_than_s:
            durable.unlink_if_present(entry.path)
