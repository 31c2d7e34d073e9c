"""A receiver on loopback in a process of its own: what the demo ships to and what `tune` measures uploads with.

What always holds: it is spoken to over HTTP only, and is gone when its ``with`` block ends, however that is, or the
thread that is in it (``prctl(2)``, PR_SET_PDEATHSIG).

Imports ``errors``; ``demo`` and ``tune`` import it. It starts ``fastship receive`` as a command and imports none of it,
so it is there without the extra ``receiver`` too, and then says what that command says.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from fastship.errors import ReceiverError

_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("who started it is gone")
from fastship.cli import main
main()
"""
_START_LIMIT_S = 60.0  # a receiver starts in under a second; a loaded machine may take long


class LoopbackReceiver:
    """A receiver in a process of its own, from ``with`` to its end. Raises `ReceiverError` when it does not start."""

    def __init__(self, store: Path, log: Path, whose: str) -> None:
        """``whose`` receiver it is, for messages: ``"the demo's"``."""
        self._log = log
        self._whose = whose
        # -c: not by the reader's own settings. The reserve: the room was looked at already.
        self._arguments = ["receive", "-c", os.devnull, "--set", "receiver.reserve_bytes=0"]
        self._arguments += ["--root", str(store), "--listen", "127.0.0.1:0"]
        self.url = ""

    def __enter__(self) -> LoopbackReceiver:
        with open(self._log, "wb") as errors:
            # In a session of its own: Ctrl-C reaches the shipper, which drains; the receiver must outlive that.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, str(os.getpid()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        try:
            self.url = _first_line(self._process.stdout, self._process)
            if not self.url.startswith("http"):
                raise self.error("did not start")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def error(self, what: str) -> ReceiverError:
        """An error with the last that the receiver said."""
        code = self._process.poll()
        self._end()
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        told = f"exit status {code}: {'; '.join(said[-4:]) or 'it said nothing'}"
        return ReceiverError(f"{self._whose} receiver {what}: {told}", remedy=" ".join(["fastship", *self._arguments]))

    def _end(self) -> None:
        """Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _first_line(stream: IO[bytes], process: subprocess.Popen[bytes]) -> str:
    """The first line of the process's output, or "" when it ended or said nothing in time."""
    deadline = time.monotonic() + _START_LIMIT_S
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(0.2):
                return stream.readline().decode(errors="replace").strip()
            if process.poll() is not None:
                return ""
    return ""
