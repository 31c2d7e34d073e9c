"""The README's commands, run as they stand there: only addresses and directories are others."""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LIMIT_S = 60.0


def commands(start: str) -> list[str]:
    """The indented lines of the README that begin so."""
    return [line.strip() for line in README.splitlines() if line.startswith(f"    {start}")]


class Reader:
    """Somebody who types what the README says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.instead = {"/srv/telemetry": f"{directory}/telemetry", "/data/spool": f"{directory}/spool"}
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def adapt(self, text: str) -> str:
        for theirs, ours in self.instead.items():
            text = text.replace(theirs, ours)
        return text

    def types(self, command: str) -> str:
        ran = subprocess.run(
            ["sh", "-c", self.adapt(command)],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
        return ran.stdout


def make_episode(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "data").write_bytes(os.urandom(50_000))
    (path / "done.marker").touch()


@pytest.mark.timeout(180)
def test_use_it(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    (receive,) = commands("fastship receive")
    receive = reader.adapt(receive).replace("0.0.0.0:8490", "127.0.0.1:0")
    receiver = subprocess.Popen(
        shlex.split(receive), env=reader.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert receiver.stdout is not None
    try:
        assert select.select([receiver.stdout], [], [], LIMIT_S)[0], "the receiver did not say its URL"
        url = receiver.stdout.readline().decode().strip()
        reader.instead["http://receiver.example:8490"] = url
        for command in commands("fastship init") + commands("fastship config check"):
            reader.types(command)
        make_episode(tmp_path / "spool" / "episodes" / "run-16")
        (run,) = commands("fastship run")
        reader.types(run.replace("fastship run", "fastship once"))
        assert (tmp_path / "spool" / "shipped" / "run-16").is_dir()

        make_episode(tmp_path / "run-17")
        for command in commands("fastship pack") + commands("curl"):
            reader.types(command)
        stored = tmp_path / "telemetry" / "episodes" / "run-17.tar.zst"
        assert stored.read_bytes() == (tmp_path / "run-17.tar.zst").read_bytes()
        (unpack,) = re.findall(r"`(zstd -d < run-17\.tar\.zst \| tar x)`", README)
        (tmp_path / "run-17").rename(tmp_path / "before")
        reader.types(unpack)
        assert (tmp_path / "run-17" / "data").read_bytes() == (tmp_path / "before" / "data").read_bytes()

        make_episode(tmp_path / "spool" / "episodes" / "run-18")
        (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        (tmp_path / "program.py").write_text(reader.adapt(program))
        assert reader.types(f"{shlex.quote(sys.executable)} program.py").split() == ["1", "0", "0", "0"]
    finally:
        receiver.terminate()
        receiver.wait(LIMIT_S)
        receiver.stdout.close()
