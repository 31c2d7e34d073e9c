"""A 409 of a plain WebDAV server: the directory is missing that the artifact is to be put into (RFC 4918, 9.7.1).

A receiver says with it that another content is stored under the id, which is a hold for each episode it is said of.
What always holds: a 409 that is not a receiver's own is a conflict only where something is stored under the id.

Pure. Imports ``course`` and ``verdict``; ``native`` imports it.
"""

from __future__ import annotations

from collections.abc import Generator

import msgspec

from fastship.episode import Outcome, Scope, Verdict
from fastship.upload.course import Answer, Body, Fault, Request, Result, Step
from fastship.upload.verdict import verdict_of_fault, verdict_of_status


def may_lack_directory(answer: Answer) -> bool:
    """Whether a 409 has the words of a server, and not a receiver's JSON, or nothing at all."""
    if answer.status != 409 or not answer.body.strip():
        return False
    try:
        msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return True
    return False


def find_directory(
    answer: Answer, head: Request, resumed_at: int, *, make: bool
) -> Generator[Step, Result, Verdict | None]:
    """What this 409 comes to; None: the directory is there now, the artifact is to be sent again.

    ``head`` asks for what is stored under the id. ``make`` the directory, with MKCOL; that of ``destination.url`` is
    the operator's to make.
    """
    result = yield head
    if isinstance(result, Fault):
        return verdict_of_fault(result, resumed_at)
    assert isinstance(result, Answer), f"a request ends in an Answer or a Fault, not {result!r}"
    if result.status not in (404, 410):
        return verdict_of_status(answer, resumed_at)
    directory = head.url.rpartition("/")[0]
    for url in (directory.rpartition("/")[0], directory) if make else ():
        made = yield Request(method="MKCOL", url=f"{url}/", body=Body(), answer_timeout_s=head.answer_timeout_s)
        if isinstance(made, Fault):
            return verdict_of_fault(made, resumed_at)
        # 405: it is there already (RFC 4918, 9.3.1), or this is no WebDAV: then the same 409 comes again.
        if url == directory and isinstance(made, Answer) and made.status in (201, 405):
            return None
    return Verdict(
        outcome=Outcome.TRANSIENT,
        scope=Scope.DESTINATION,
        status=answer.status,
        error=f"status 409, and nothing is stored under this id: make the directory {directory}/ at that server",
        body=answer.text,
        resumed_at=resumed_at,
    )
