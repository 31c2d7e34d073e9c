"""How an operator's command reaches the daemon that holds the spool: a file in, a file out.

``state/requests/<name>.json`` is the request, ``<name>.answer`` the answer; both appear whole (rename). The
daemon notices them by inotify and at every look. A request whose sender went away is carried out all the same:
it was an operator's word.

Imports ``store``, ``durable`` and ``errors``; the supervisor and the shipper import it.
"""

from __future__ import annotations

import json
import os
import stat
import time
import uuid
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from fastship import durable
from fastship.ages import Ages
from fastship.spool.store import Spool

Action = Literal["retry", "drop", "keep-local", "drop-local", "reship"]
T = TypeVar("T")


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
    durable.write_file(path, _encode(request), sync=False)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer.exists():
            try:
                return _decode(answer.read_bytes(), Answer)
            finally:
                durable.unlink_if_present(answer)
        time.sleep(0.02)
    durable.unlink_if_present(path)
    return None


def pending(directory: Path) -> list[tuple[Path, Request | None]]:
    """The requests that wait; None for one that cannot be read. What is no file is nobody's request."""
    with os.scandir(directory) as entries:
        names = sorted(
            entry.name for entry in entries if is_request(entry.name) and entry.is_file(follow_symlinks=False)
        )
    found: list[tuple[Path, Request | None]] = []
    for name in names:
        path = directory / name
        try:
            found.append((path, _decode(path.read_bytes(), Request)))
        except (OSError, ValueError, RecursionError):
            found.append((path, None))
    return found


def is_request(name: str) -> bool:
    """Whether a file of that name in ``state/requests/`` asks for something."""
    return name.endswith(".json") and not name.startswith(durable.TEMP_PREFIX)


def answer(path: Path, reply: Answer) -> None:
    """Answer the request at ``path`` and remove it, also where there is no room for the answer: it was carried out.

    Raises ``OSError``.
    """
    try:
        durable.write_file(path.with_suffix(".answer"), _encode(reply), sync=False)
    finally:
        durable.unlink_if_present(path)


def forget_old(directory: Path, ages: Ages, *, older_than_s: float) -> None:
    """Remove answers nobody fetched."""
    with os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if ages.age_s(status.st_mtime) > older_than_s and not stat.S_ISDIR(status.st_mode):
                durable.unlink_if_present(entry.path)


def _encode(value: Request | Answer) -> bytes:
    """JSON in ASCII, with what is not UTF-8 in a name as lone surrogates (PEP 383), which msgspec would refuse."""
    return json.dumps(msgspec.to_builtins(value)).encode()


def _decode(raw: bytes, kind: type[T]) -> T:
    """Raises ``ValueError`` (`msgspec.ValidationError` is one) and ``RecursionError``."""
    return msgspec.convert(json.loads(raw), type=kind)


def carry_out(spool: Spool, request: Request) -> Effect:
    """Do what an operator asked. The caller holds the spool lock. Raises `UsageError` when it cannot be."""
    episode = request.episode
    if request.action == "retry":
        ready = spool.retry(episode, new_id=request.new_id)
        return Effect(f"{ready} is back in episodes/ and will be tried again", ready=ready)
    if request.action == "reship":
        ready = spool.shelf.reship(episode)
        return Effect(f"{ready} is back in episodes/ and will be shipped again", ready=ready)
    if request.action == "drop":
        spool.drop_quarantined(episode)
        return Effect(f"{episode} was removed from quarantine, for good")
    if request.action == "keep-local":
        ready = spool.keep_local(episode, new_id=request.new_id)
        gone = episode if ready != episode else None
        return Effect(f"the hold on {episode} is released; it will be shipped as {ready}", gone, ready)
    target = spool.drop_local(episode)
    return Effect(f"{episode} was moved to quarantine/{target.name}; its data is kept there", gone=episode)
