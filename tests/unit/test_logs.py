"""Logs: standard error only, in the form and from the level that the settings say, without local variables."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog
from kept_logging import logging_kept

from fastship import logs
from fastship.settings import LogSettings


@pytest.fixture(autouse=True)
def _logging_kept() -> Iterator[None]:
    with logging_kept():
        yield


def speak() -> None:
    token = "geheim"  # a local variable of the frame that fails
    log = structlog.get_logger("fastship.test")
    log.debug("too-small")
    log.info("hello", episode="ep1")
    logging.getLogger("fastship.receiver").info("by logging")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("of note")
    try:
        raise ValueError(f"length {len(token)}")
    except ValueError:
        log.exception("went-wrong")
        logging.getLogger("fastship.receiver").exception("went wrong too")


@pytest.mark.parametrize("form", ["text", "json", "auto"])
def test_what_is_said_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str], form: Literal["text", "json", "auto"]
) -> None:
    logs.configure(LogSettings(level="info", format=form))
    speak()
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("hello", "ep1", "by logging", "of note", "went-wrong", "went wrong too", "ValueError: length 6"):
        assert part in err
    for part in ("too-small", "chatter", "geheim"):
        assert part not in err
    if form != "text":  # "auto" off a terminal is JSON lines
        documents = [json.loads(line) for line in err.splitlines()]
        assert documents[0]["event"] == "hello"
        assert {one["level"] for one in documents} == {"info", "warning", "error"}


FIRST_WORDS = """
import logging, sys
from fastship import logs
from fastship.settings import LogSettings

logs.configure(LogSettings(level="warning", format="json"))
ours, library = logs.Logger("fastship.test"), logging.getLogger("some.library")
ours.info("too-small")
library.info("chatter")
assert "structlog" not in sys.modules
{first}.warning("first")
assert "structlog" in sys.modules
ours.info("too-small")
ours.warning("second", episode="ep1")
library.warning("third")
"""


@pytest.mark.parametrize("first", ["ours", "library"])
def test_structlog_is_loaded_by_the_first_line(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_WORDS.format(first=first)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    documents = [json.loads(line) for line in done.stderr.splitlines()]
    assert [one["event"] for one in documents] == ["first", "second", "third"]
    assert {one["level"] for one in documents} == {"warning"}
    assert documents[1]["episode"] == "ep1"


def test_the_level_hushes_what_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(level="error", format="json"))
    speak()
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["went-wrong", "went wrong too"]


def test_text_is_harmless_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(level="info", format="text"))
    hostile = "a\x1b[2J\nb\x9b31m\u202ec\udce9"
    log, library = structlog.get_logger("fastship.test"), logging.getLogger("fastship.receiver")
    log.warning("first", episode=hostile, error=f"{hostile} and more", count=3)
    library.warning("second %s", hostile)
    try:
        raise ValueError(hostile)
    except ValueError:
        log.exception("third")
        library.exception("fourth")
    err = capsys.readouterr().err
    assert all(line.isprintable() for line in err.splitlines())
    assert err.count("\\x9b31m\\u202ec\\udce9") == 4
    assert err.count("Traceback") == 2
    assert "count=3" in err


def test_a_full_disk_under_the_log_stops_nobody() -> None:
    code = (
        "import logging\nfrom fastship import logs\nfrom fastship.settings import LogSettings\n"
        "logs.configure(LogSettings(level='info'))\n"
        "logs.Logger('fastship.test').error('held')\nlogging.getLogger('fastship.receiver').error('by logging')\n"
        "print('and did it')"
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "and did it\n"
