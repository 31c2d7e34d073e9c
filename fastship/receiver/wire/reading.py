"""Stored artifacts, read over HTTP: whole or by range, with their digests (RFC 9110, sections 13 and 14).

What always holds: the file is read in threads, a piece at a time; who does not take a piece in `_STALL_S` is cut; the
entity tag is the artifact digest, so a range that goes on with ``If-Range`` is of the same bytes.

Imported by ``app``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

from fastship.episode import Receipt
from fastship.receiver.policy import answers, decisions
from fastship.receiver.policy.answers import Answer
from fastship.receiver.wire.request import Request

_PIECE_BYTES = 256 << 10  # who reads slowly keeps one in memory
_STALL_S = 60.0  # 4 kB/s


async def send_artifact(request: Request, path: Path, receipt: Receipt, executor: Executor) -> None:
    """Answer a GET or HEAD of a stored artifact."""
    loop = asyncio.get_running_loop()
    etag = f'"{receipt.artifact.sha256}"'
    size = receipt.artifact.bytes
    headers = [("ETag", etag), ("Accept-Ranges", "bytes"), *answers.digests_of(receipt)]
    if _matches(request.headers.get("if-none-match"), etag):
        await request.start(304, headers)
        await request.send_body(b"")
        return
    part = _wanted(request.headers, etag, size) if request.method == "GET" else None  # RFC 9110, 14.2
    if isinstance(part, Answer):
        await request.answer(part)
        return
    first, end = part or (0, size)
    headers += [("Content-Type", "application/zstd"), ("Content-Length", str(end - first))]
    if part is not None:
        headers.append(("Content-Range", f"bytes {first}-{end - 1}/{size}"))
    fd = await loop.run_in_executor(executor, os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    gone: asyncio.Task[None] | None = None
    try:
        await request.start(206 if part is not None else 200, headers)
        if request.method == "HEAD":
            await request.send_body(b"")
            return
        gone = asyncio.create_task(request.left())
        while first < end and not gone.done():
            piece = await loop.run_in_executor(executor, os.pread, fd, min(_PIECE_BYTES, end - first), first)
            if not piece:
                raise OSError(f"{path} is shorter than its receipt says")
            first += len(piece)
            async with asyncio.timeout(_STALL_S):
                await request.send_body(piece, more=True)
        await request.send_body(b"")
    except TimeoutError:
        request.cut("it does not read what it asked for")
    finally:
        if gone is not None:
            gone.cancel()
        os.close(fd)


def _wanted(headers: Mapping[str, str], etag: str, size: int) -> tuple[int, int] | Answer | None:
    if "if-range" in headers and headers["if-range"] != etag:
        return None
    return decisions.parse_range(headers.get("range"), size)


def _matches(value: str | None, etag: str) -> bool:
    if value is None:
        return False
    known = [tag.strip().removeprefix("W/") for tag in value.split(",")]
    return etag in known or "*" in known
