"""fastship: gets finished episodes of telemetry off a lab host, and proves it.

The public face is ``Shipper``, ``Settings`` and ``PassResult``; importing the package alone loads none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastship.settings import Settings as Settings
    from fastship.shipper import Shipper as Shipper
    from fastship.status import PassResult as PassResult

__version__ = "0.1.0"

__all__ = ["PassResult", "Settings", "Shipper"]

_HOMES = {"PassResult": "fastship.status", "Settings": "fastship.settings", "Shipper": "fastship.shipper"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastship' has no attribute {name!r}")
