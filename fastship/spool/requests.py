"""How an operator's command reaches the daemon that holds the spool: a file in, a file out.

``state/requests/<name>.json`` is the request, ``<name>.answer`` the answer; both appear whole (rename). The
daemon notices them by inotify and at every look. A request whose sender went away is carried out all the same:
it was an operator's word.

Imports ``store``, ``durable`` and ``errors``; the supervisor and the shipper import it.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Literal

import msgspec

from fastship import durable
from fastship.spool.store import Spool

Action = Literal["retry", "drop", "keep-local", "drop-local"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    action: Action
    episode: str
    new_id: str | None = None


class Effect(msgspec.Struct, frozen=True):
    """What carrying out a request did, for the supervisor's book and the operator's eyes."""

    text: str
    gone: str | None = None  # the id that left episodes/
    ready: str | None = None  # the id that is ready now


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
    with os.scandir(directory) as entries:
        for entry in entries:
            if time.time() - entry.stat().st_mtime > older_than_s:
                durable.unlink_if_present(entry.path)


def carry_out(spool: Spool, request: Request) -> Effect:
    """Do what an operator asked. The caller holds the spool lock. Raises `UsageError` when it cannot be."""
    episode = request.episode
    if request.action == "retry":
        ready = spool.retry(episode, new_id=request.new_id)
        return Effect(f"{ready} is back in episodes/ and will be tried again", ready=ready)
    if request.action == "drop":
        spool.drop_quarantined(episode)
        return Effect(f"{episode} was removed from quarantine, for good")
    if request.action == "keep-local":
        ready = spool.keep_local(episode, new_id=request.new_id)
        gone = episode if ready != episode else None
        return Effect(f"the hold on {episode} is released; it will be shipped as {ready}", gone, ready)
    target = spool.drop_local(episode)
    return Effect(f"{episode} was moved to quarantine/{target.name}; its data is kept there", gone=episode)
