"""What of the store a caller may have: unfinished uploads, the room they declare, and what is stored.

What always holds: an upload that there is already is never refused its rest for other unfinished ones; a refusal is
never about the episode, so no client of ours gives one up for it. Blocks; called in threads. Imported by ``app``.
"""

from __future__ import annotations

from fastship.receiver.policy import answers, decisions
from fastship.receiver.policy.access import Caller
from fastship.receiver.policy.answers import Answer
from fastship.receiver.policy.decisions import Declared
from fastship.receiver.store.store import Store
from fastship.receiver.uploads.upload import Upload
from fastship.receiver.uploads.uploads import LengthMismatch
from fastship.settings import ReceiverSettings


class Shares:
    """Of the uploads of a store."""

    def __init__(self, store: Store, settings: ReceiverSettings) -> None:
        self._store = store
        self._uploads = store.uploads
        self._settings = settings

    def may_begin(self, caller: Caller, declared: Declared) -> Answer | None:
        """Why the caller may not begin this upload, or not go on with it as something longer. Two that ask at once may
        both be let in."""
        held = self._uploads.held_by(declared)
        more = max(0, (declared.length or 0) - (held or 0))
        if held is not None and not more:
            return None
        for fresh in (False, True):  # only where the answer seems to be no the last word is asked for
            refused = self._decide(caller, more, begins=held is None, fresh=fresh)
            if refused is None:
                return None
        return refused

    def may_append(self, caller: Caller, upload: Upload, length: int | None, body_bytes: int) -> Answer | None:
        """Declare an upload's whole length, if it is said with an append; the answer where that cannot be, as for a
        creation that says it, or where the caller may have no more bytes."""
        if upload.declared.length is None:
            more = (length - upload.partial.offset) if length is not None else body_bytes
            if length is not None and self._settings.max_bytes and length > self._settings.max_bytes:
                return decisions.too_large(self._settings.max_bytes)
            if length is not None and more > self._store.room_bytes(None, more):
                return decisions.NO_ROOM.with_fields(*answers.about_upload())
            if caller.limits.upload_bytes and more > 0:
                refused = self._decide(caller, more, begins=False, fresh=True)
                if refused is not None:
                    return refused.with_fields(*answers.about_upload())
        whole = upload.declared.length or length or upload.partial.offset + body_bytes
        refused = decisions.decide_stored(*self.stored(upload.declared.owner, whole), whole)
        if refused is not None:  # what has come is kept, for when there is room
            return refused.with_fields(*answers.about_upload())
        if length is not None:
            try:
                self._uploads.declare_length(upload, length)
            except LengthMismatch as error:
                return answers.length_mismatch(str(error), upload.partial.offset)
        return None

    def stored(self, owner: str, wanted_bytes: int) -> tuple[int, int]:
        """How many bytes the owner has stored and may have; ``(0, 0)`` where nothing limits him.

        Where ``wanted_bytes`` more do not fit, all is counted again, soon: something may have been taken out. As of
        now: the last word is asked when the artifact gets its name.
        """
        most_bytes = self._store.accounts.most_bytes(owner)
        stored_bytes = self._store.accounts.stored_bytes(owner) if most_bytes else 0
        if decisions.decide_stored(stored_bytes, most_bytes, wanted_bytes) is not None:
            self._store.recount.ask()
        return stored_bytes, most_bytes

    def _decide(self, caller: Caller, new_bytes: int, *, begins: bool, fresh: bool) -> Answer | None:
        held = self._uploads.held(caller.owner, fresh=fresh)
        return decisions.decide_share(held, caller.limits, self._settings.max_uploads, new_bytes, begins=begins)
