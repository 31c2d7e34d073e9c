"""A 409 in a server's own words: mostly of a plain WebDAV server, where the directory is missing that the artifact is
to be put into (RFC 4918, 9.7.1).

A receiver says with it that another content is stored under the id, which is a hold for each episode it is said of.
What always holds: a 409 that is not a receiver's own is a conflict only where something is stored under the id, as far
as that can be asked. Else it is of this attempt alone, as any page is (`verdict`): said of one id it keeps no other
waiting, and three in a row pause the destination, so that one which says it to everything leaves all in place.

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
    if result.status // 100 == 2 or result.status in (405, 501):  # what does not know HEAD cannot say more than 409
        return verdict_of_status(answer, resumed_at)
    if result.status not in (404, 410):
        error = f"and whether anything is stored under this id it does not say (HEAD: status {result.status})"
        return _of_this_attempt(answer, f"{error}; see destination.url", resumed_at)
    directory = head.url.rpartition("/")[0]
    for url in (directory.rpartition("/")[0], directory) if make else ():
        made = yield Request(method="MKCOL", url=f"{url}/", body=Body(), answer_timeout_s=head.answer_timeout_s)
        if isinstance(made, Fault):
            return verdict_of_fault(made, resumed_at)
        # 405: it is there already (RFC 4918, 9.3.1), or this is no WebDAV: then the same 409 comes again.
        if url == directory and isinstance(made, Answer) and made.status in (201, 405):
            return None
    error = f"and nothing is stored under this id: make the directory {directory}/ at that server, where it is missing"
    return _of_this_attempt(answer, f"{error}; else see there what it has against this id", resumed_at)


def _of_this_attempt(answer: Answer, error: str, resumed_at: int) -> Verdict:
    return Verdict(
        outcome=Outcome.TRANSIENT,
        scope=Scope.NETWORK,
        status=answer.status,
        error=f"status 409 in a server's own words, {error}",
        body=answer.text,
        resumed_at=resumed_at,
    )
