"""The receiver that the demo and the measuring start."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from lab import wait_until

PROGRAM = """
import sys
from pathlib import Path
from fastship.loopback import LoopbackReceiver
with LoopbackReceiver(Path("store"), Path("log"), "the test's") as receiver:
    print(receiver.url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_it_is_gone_when_who_started_it_is(tmp_path: Path, number: signal.Signals | None) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline().startswith(b"http://127.0.0.1:")
        (receiver,) = psutil.Process(process.pid).children()
        if number is not None:
            process.send_signal(number)
    wait_until(lambda: is_gone(receiver), "its end")


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
