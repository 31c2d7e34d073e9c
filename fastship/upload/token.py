"""The bearer token: read from its file when a request needs it, and shown to nobody else.

Imports nothing of fastship; ``curl`` imports it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


class Token:
    """The bearer token of a file, read again when the file changes. Its repr does not show it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._value = ""

    def read(self) -> str:
        """The token, ``""`` when none is set. Raises ``ValueError`` (without the token) when it cannot be used."""
        if not self._path:
            return ""
        try:
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen != self._seen:
                value = Path(self._path).read_bytes().strip()
                if not re.fullmatch(rb"[\x21-\x7e]+", value):
                    raise ValueError(f"destination.token_file: {self._path} does not hold one token and nothing else")
                self._value = value.decode("ascii")
                self._seen = seen
        except OSError as error:
            raise ValueError(f"destination.token_file: {self._path}: {error.strerror}") from None
        return self._value
