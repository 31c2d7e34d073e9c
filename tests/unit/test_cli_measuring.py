"""`bench` and `tune` as they are typed: what they print, write and leave, and what they say to mistakes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from lab import Destination, fastship, tree, wait_until

from fastship.settings import Settings

QUICK = ("--seconds", "1", "--size", "2MB")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    root = tmp_path / "spool"
    subprocess.run(fastship("init", root, "-q"), check=True)
    for number in range(3):
        episode = root / "shipped" / f"ep-{number}"
        episode.mkdir()
        (episode / "log.txt").write_text("".join(f"{number} {line} {line * 7919 % 1000}\n" for line in range(30_000)))
        (episode / "done.marker").touch()
    return root


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(cwd), "COLUMNS": "100"}
    environment.pop("FASTSHIP_CONFIG", None)
    return subprocess.run(fastship(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def told(*arguments: str | Path, cwd: Path) -> Any:
    ran = run(*arguments, "--json", cwd=cwd)
    assert (ran.returncode, ran.stderr) == (0, "")
    return json.loads(ran.stdout)


def test_bench_measures_every_part_of_ones_own_episodes_and_leaves_nothing(spool: Path) -> None:
    before = tree(spool)
    report = told("bench", "-c", spool / "fastship.toml", "--set", "pack.level=2", *QUICK, cwd=spool.parent)
    assert tree(spool) == before
    assert os.listdir(spool.parent) == ["spool"]
    assert (report["episodes"]["episodes"], report["episodes"]["generated"]) == (3, False)
    names = [part["name"] for part in report["parts"]]
    for name in ("read, warm", "BLAKE3", "SHA-256", "zstd 2, 1 thread", "write", "write and fsync", "pack"):
        part = report["parts"][names.index(name)]
        assert part["mb_per_s"] > 0
        assert part["how"]
    assert report["parts"][names.index("upload, loopback")]["mb_per_s"] > 0
    link = report["parts"][names.index("link")]
    assert (link["mb_per_s"], "no destination" in link["how"]) == (None, True)
    prediction = report["prediction"]
    assert prediction["level"] == 2
    assert prediction["mb_per_s"] == min(prediction["limits_mb_per_s"].values())
    assert "if the link takes" in prediction["told"]
    assert str(spool / "outbox") in report["host"]["outbox"]


def test_bench_generates_where_there_is_nothing_and_prints_a_table(tmp_path: Path) -> None:
    ran = run("bench", "--set", "pack.level=3", *QUICK, "--link", "100kbit/s", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "generated telemetry" in ran.stdout
    assert "predicted: level 3" in ran.stdout
    assert "the link to the destination" in ran.stdout
    assert "\x1b" not in ran.stdout
    assert os.listdir(tmp_path) == []


def test_tune_writes_settings_that_the_check_accepts_and_overwrites_nothing(spool: Path) -> None:
    target = spool.parent / "tuned.toml"
    url = "destination.url=http://127.0.0.1:9"
    common = ("tune", "-c", spool / "fastship.toml", "--set", url, *QUICK, "--write", target)
    report = told(*common, "--link", "100kbit/s", cwd=spool.parent)
    values = tomllib.loads(target.read_text())
    assert values["spool"]["root"] == str(spool)
    assert values["pack"]["level"] == report["chosen"]["level"] > 3  # on a link of 12.5 kB/s
    assert set(values["pack"]) == {"level", "threads", "frame_bytes"}
    settings = Settings.load(target)
    assert settings.workers.count == report["settings"]["workers"]["count"]
    assert settings.upload.connections == report["settings"]["upload"]["connections"]
    assert run("config", "check", "-c", target, cwd=spool.parent).returncode == 0

    target.write_text("mine")
    ran = run(*common, cwd=spool.parent)
    assert (ran.returncode, target.read_text()) == (2, "mine")
    assert "is there already" in ran.stderr
    assert "--force" in ran.stderr


def test_tune_prints_levels_a_chart_and_why(spool: Path) -> None:
    ran = run("tune", "--from", spool / "shipped", *QUICK, cwd=spool.parent)
    assert (ran.returncode, ran.stderr) == (0, "")
    for level in (1, 2, 3, 4, 6, 9, 12, 15, 19):
        assert f"{level}" in ran.stdout
    assert "<- chosen" in ran.stdout
    assert "MB/s packed" in ran.stdout
    assert "link:      not measured: no destination is set; give it with --link" in ran.stdout
    assert "settings:  pack.level=" in ran.stdout
    assert os.listdir(spool.parent) == ["spool"]


def test_a_destination_that_would_store_what_is_sent_is_not_measured(spool: Path) -> None:
    server = Destination()
    try:
        url = f"destination.url={server.url}"
        report = told("bench", "--from", spool / "shipped", "--set", url, *QUICK, cwd=spool.parent)
        assert "would be stored" in report["parts"][-1]["how"]
        assert server.offers() == []
    finally:
        server.close()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("bench", "--from", "gone"), 2, "gone: No such file"),
        (("tune", "--from", "."), 2, "is empty"),
        (("bench", "--size", "much"), 2, "not a size"),
        (("bench", "--size", "10kB"), 2, "too little"),
        (("tune", "--link", "fast"), 2, "100Mbit/s"),
        (("tune", "--seconds", "0"), 2, "--seconds"),
        (("bench", "--profile", "fastest"), 3, "unknown profile fastest"),
        (("tune", "-c", "gone.toml"), 3, "gone.toml"),
        (("tune", "--write", "."), 2, "is there already"),
        (("tune", "--write", "none/x.toml"), 2, "no directory that can be written to"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    ran = run(*arguments, cwd=tmp_path)
    assert ran.returncode == code
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(fastship("bench"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(tmp_path.glob(".tmp-measuring-*/*")), "its first files")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (130, "fastship: error: interrupted")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_one_left_goes_with_the_next_but_not_what_is_in_use(spool: Path) -> None:
    left, used = (spool / f".tmp-measuring-{name}" for name in ("left", "used"))
    for path in (left, used):
        path.mkdir()
        (path / "generated").write_bytes(b"telemetry")
    lock = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("bench", "-c", spool / "fastship.toml", *QUICK, cwd=spool.parent).returncode == 0
    finally:
        os.close(lock)
    assert not left.exists()
    assert (used / "generated").exists()
