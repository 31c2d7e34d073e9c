"""The page cache: what of a file is in it, and letting go of that.

A host that records needs it for other things than an episode that is read once (``pack.stream``); a receiver that
asks whether its *disk* still has an artifact must not be answered by it (``receiver``).

What always holds: pages that are dirty, mapped by somebody or (``as-found``) were there before are left alone; nothing
here can fail a pack, and where the kernel cannot say what is cached, nothing is given back.

Artifacts need no such care: an artifact is unlinked when its receipt is durable, and its pages go with it, most of them
before they were ever written to the disk. Imports nothing of fastship.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Literal

Care = Literal["as-found", "keep", "drop"]

LARGE_BYTES = 1 << 20
"""Smaller files are not asked about: two system calls would be a fifth of what it takes to read one of 16 kB."""

_CACHESTAT = 451  # cachestat(2), the same number on every architecture; Linux 6.5 and later


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))  # length 0: to the end


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


_syscall = ctypes.CDLL(None).syscall
_WHOLE_FILE = _Range(0, 0)


def cached_bytes(fd: int) -> int | None:
    """How much of an open file is in the page cache, in whole pages; None where the kernel does not say."""
    pages = _Pages()
    if _syscall(_CACHESTAT, fd, ctypes.byref(_WHOLE_FILE), ctypes.byref(pages), 0):
        return None
    return int(pages.cached) * mmap.PAGESIZE


def to_be_given_back(fd: int, size: int, care: Care) -> bool:
    """Whether the pages of a file about to be read are to go when it was: decided before the first is read.

    A file of which less than half is cached counts as not cached at all.
    """
    if size < LARGE_BYTES or care == "keep":
        return False
    if care == "drop":
        return True
    before = cached_bytes(fd)
    return before is not None and before < size // 2


def give_back(fd: int, start: int, end: int) -> None:
    """Let the kernel forget what it can of these bytes; ``end`` 0 is the end of the file. Does not block."""
    with contextlib.suppress(OSError):  # a file system without a page cache
        os.posix_fadvise(fd, start, end - start if end else 0, os.POSIX_FADV_DONTNEED)
