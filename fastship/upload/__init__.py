"""Uploading: an artifact in the outbox becomes a receipt, over any network, as often interrupted as it may be.

What always holds: a SHIPPED `Verdict` carries the receiver's own word for the bytes it holds (or says that it
believed a bare status because it was told to); an attempt ends, whatever the network and the receiver do; and what
the receiver made durable is not sent again.

- `course` is the seam: what a dialect and the session say to each other
- `native` is the dialect of fastship's own receiver, `streaming` its way to send an artifact while it is packed; a
  further dialect is one more such module
- `verdict` is the table of what each answer and fault means
- `verification` asks the receiver to read again what it stored; `download` fetches that, and looks at it here
- `probe` measures how fast the destination takes bytes, and leaves nothing there
- `session` carries several artifacts at once in one thread; `curl` alone talks to the network, `meter` measures it

The worker and ``tune`` import this; it imports ``settings``, ``episode``, ``fields`` and ``errors``.
"""

from __future__ import annotations

import queue

from fastship.episode import Verdict
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.course import Artifact, Growing
from fastship.upload.download import Wanted, download
from fastship.upload.probe import LinkSpeed, LinkUnknown, measure_link
from fastship.upload.session import OnProgress, OnVerdict, Session
from fastship.upload.verification import Reread, reread

__all__ = [
    "Artifact",
    "Growing",
    "LinkSpeed",
    "LinkUnknown",
    "OnProgress",
    "OnVerdict",
    "Reread",
    "Session",
    "Wanted",
    "download",
    "measure_link",
    "reread",
    "ship",
]


def ship(
    artifact: Artifact,
    destination: DestinationSettings,
    upload: UploadSettings,
    *,
    first_attempt: bool = True,
    on_progress: OnProgress | None = None,
) -> Verdict:
    """Ship one artifact in a session of its own and block until its verdict. Idempotent; see `Session`.

    ``first_attempt`` False: something of it may be at the receiver, go on from there. ``on_progress`` is called in
    another thread.
    """
    verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    with Session(
        destination, upload, on_verdict=lambda _episode, verdict: verdicts.put(verdict), on_progress=on_progress
    ) as session:
        session.submit(artifact, first_attempt=first_attempt)
        return verdicts.get()
