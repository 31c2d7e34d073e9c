"""fastship: gets finished episodes of telemetry off a lab host, and proves it.

The public face is ``Shipper``, ``Settings`` and ``PassResult``; importing the package alone loads none of them.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastship.settings import Settings as Settings
    from fastship.shipper import Shipper as Shipper
    from fastship.status import PassResult as PassResult

__version__ = "0.1.0"

__all__ = ["PassResult", "Settings", "Shipper"]

_HOMES = {"PassResult": "fastship.status", "Settings": "fastship.settings", "Shipper": "fastship.shipper"}

_BYTECODE_BYTES = 64 << 20  # about four times what fastship and all that it imports have


def _spare_a_full_disk(directory: str) -> None:
    """Write no bytecode where there is little room for it: of a file that a full disk cuts short Python knows nothing
    until it is read, and then no start succeeds any more (python/cpython#126606, in 3.11, 3.12 and 3.13.0)."""
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize < _BYTECODE_BYTES:
        sys.dont_write_bytecode = True


_spare_a_full_disk(os.path.dirname(__file__))  # now: every process of ours imports this first


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastship' has no attribute {name!r}")
