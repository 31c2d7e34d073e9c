"""Is everything that was retired still at the receiver? Its word now, beside its receipt of then and the copy here.

What always holds: looking changes nothing here; an episode counts as equal only when the receiver has just read its
artifact again and its content is what the receipt in ``receipts/`` says, or when the artifact was just fetched from
there and is so. A receiver that finds its copy rotten sets it aside, so that the episode can be shipped again from its
copy in ``shipped/``, if that is what was shipped; at a plain server what is shipped again takes the place of it.

Imports ``spool``, ``pack``, ``upload`` and ``settings``; the command line imports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Literal

import msgspec

from fastship.episode import Receipt
from fastship.errors import PackError, UsageError
from fastship.pack import digest_content
from fastship.settings import Settings
from fastship.spool import Journal, Spool
from fastship.upload import Reread, Wanted, download, reread

State = Literal["equal", "missing", "rotted", "differs", "unknown", "local-differs"]


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One episode.

    ``state``: "missing" and "rotted" are the receiver's; "differs": it has another content than its receipt says;
    "unknown": the receiver cannot tell; "local-differs": it is right there, and the copy in ``shipped/`` is not what
    was shipped.
    """

    episode: str
    state: State
    error: str = ""  # what is not equal, one sentence
    copy: str | None = None  # of what was shipped, below shipped/; None: there is none, or it was not looked for
    copy_error: str = ""  # why there is none
    found: Reread
    receipt: Receipt | None = None  # the one here
    retired_at: str = ""


class Ledger:
    """The episodes of one spool that were retired. Raises `UsageError` where there is no spool."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spool = Spool(settings.spool.root)
        self._spool.paths.require()
        self._journal = Journal(self._spool.paths.receipts)
        self.spoilt = self._journal.spoilt

    def episodes(self) -> Iterable[str]:
        """All that have a receipt."""
        return self._journal.episodes()

    def require(self, episodes: Iterable[str]) -> None:
        """Raises `UsageError` for the first that was never retired."""
        for episode in episodes:
            if self._journal.find(episode) is None and not self._spool.shelf.names_of(episode):
                spoilt = f"; {len(self.spoilt)} lines of receipts/ cannot be read" if self.spoilt else ""
                raise UsageError(
                    f"there is no receipt of {episode} in {self._spool.paths.receipts}{spoilt}",
                    remedy="name an episode that was shipped from here, or ask for --all",
                )

    def check(self, episodes: Iterable[str], *, local: bool, fetch: bool = False) -> Generator[Checked, None, None]:
        """Ask the receiver about each, as it answers. Raises `DestinationError`.

        ``local``: read the copies in ``shipped/``, too; those of what the receiver lost are read in any case.
        ``fetch``: instead of asking the receiver to read, download what it has and look at that here.
        """
        destination, upload = self._settings.destination, self._settings.upload
        if fetch:
            all_found = download(map(self._wanted, episodes), destination, upload)
        else:
            all_found = reread(episodes, destination, upload)
        with contextlib.closing(all_found):
            for found in all_found:
                yield self._compare(found, local=local)

    def _wanted(self, episode: str) -> Wanted:
        line = self._journal.find(episode)
        if line is None:
            return Wanted(episode=episode)
        artifact = line.receipt.artifact
        return Wanted(episode=episode, artifact_sha256=artifact.sha256, artifact_bytes=artifact.bytes)

    def _compare(self, found: Reread, *, local: bool) -> Checked:
        line = self._journal.find(found.episode)
        receipt = line.receipt if line is not None else None
        state, error = _judge(found, receipt)
        content = receipt.content.blake3 if receipt is not None and receipt.content is not None else None
        if state == "equal" or (receipt is None and found.verdict == "sound"):
            content = content or found.content_blake3
        copy, copy_error = None, ""
        if local or state != "equal":
            copy, copy_error = self._find_copy(found.episode, content, line.fingerprint if line is not None else "")
        if state == "unknown" and receipt is None and found.verdict == "sound" and copy is not None:
            state, error = "equal", ""  # by its copy here
        if state == "equal" and local and copy is None and self._spool.shelf.names_of(found.episode):
            state, error = "local-differs", f"it is right at the receiver, but {copy_error}"
        return Checked(
            episode=found.episode,
            state=state,
            error=error,
            copy=copy,
            copy_error=copy_error,
            found=found,
            receipt=receipt,
            retired_at=line.retired_at if line is not None else "",
        )

    def _find_copy(self, episode: str, content: str | None, fingerprint: str) -> tuple[str | None, str]:
        """The copy in ``shipped/`` that is what was shipped, by its content, or by its fingerprint where the receipt
        says nothing of that; or why there is none."""
        if (self._spool.paths.episodes / episode).is_dir():
            return None, "it is in episodes/, to be shipped when its turn comes"
        names = self._spool.shelf.names_of(episode)
        if not names:
            return None, "no copy of it is in shipped/"
        if content is None and not fingerprint:
            return None, "nothing here says what was shipped"
        owner = self._settings.pack.owner
        why = ""
        for name in names:
            try:
                here = digest_content(self._spool.paths.shipped / name, owner, name=episode)
            except (PackError, OSError) as error:
                why = f"the copy in shipped/{name} cannot be read: {error}"
                continue
            if here.blake3 == content or (content is None and here.fingerprint == fingerprint):
                return name, ""
            why = f"the copy in shipped/{name} is not what was shipped: it has BLAKE3 {here.blake3}"
            why += f", not {content}" if content is not None else ""
        return None, why


def _judge(found: Reread, receipt: Receipt | None) -> tuple[State, str]:
    """What the receiver found, beside the receipt here. The content digest is the episode's identity: an artifact that
    was packed otherwise is as good."""
    if found.verdict == "missing":
        return "missing", f"the receiver does not have it: {found.error}"
    if found.verdict == "rotted":
        place = f"; it is set aside there as {found.set_aside}" if found.set_aside else ""
        return "rotted", f"it rotted at the receiver: {found.error}{place}"
    if found.verdict not in ("sound", "mended"):
        return "unknown", f"the receiver cannot tell: {found.error}"
    if receipt is None and found.read_from == "download":
        return "unknown", f"its receipt here is lost; what is there is whole, with BLAKE3 {found.content_blake3}"
    if receipt is None:
        return "equal", ""  # its receipt here is lost: the receiver's own is all there is
    if receipt.content is not None and found.content_blake3 is not None:
        if found.content_blake3 == receipt.content.blake3:
            return "equal", ""
        said = f"BLAKE3 {found.content_blake3}, the receipt here says {receipt.content.blake3}"
        return "differs", f"the receiver has another content: {said}"
    if found.artifact_sha256 == receipt.artifact.sha256:
        return "equal", ""
    said = f"SHA-256 {found.artifact_sha256}, the receipt here says {receipt.artifact.sha256}"
    return "differs", f"the receiver has another artifact: {said}"
