"""The displays: fed snapshots, looked at as text."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest
from rich.console import Console

from fastship.cli import display as module
from fastship.cli.display import LiveDisplay, NewResults, PlainDisplay, packing_line, result_line, summary_line
from fastship.status import DestinationStatus, EpisodeProgress, EpisodeResult, HostStatus, PassResult, Snapshot

UP = DestinationStatus(url="http://127.0.0.1:1", state="up")


def snapshot(
    recent: list[EpisodeResult] | None = None,
    progress: list[EpisodeProgress] | None = None,
    destination: DestinationStatus = UP,
) -> Snapshot:
    return Snapshot(
        pid=1,
        started_at=1000.0,
        updated_at=1010.0,
        draining=False,
        ready=3,
        recording=1,
        held=0,
        totals=PassResult(scanned=5, shipped=2, bytes_in=8_000_000, bytes_out=2_000_000),
        destination=destination,
        progress=progress or [],
        recent=recent or [],
    )


def shipped(name: str) -> EpisodeResult:
    return EpisodeResult(episode=name, outcome="shipped", bytes_in=8_000_000, bytes_out=2_000_000, seconds=2.0)


def test_each_result_is_new_once_however_the_window_slides() -> None:
    every = [shipped(f"ep-{number}") for number in range(50)]
    new = NewResults()
    seen: list[EpisodeResult] = []
    for end in (0, 1, 1, 5, 20, 30, 49, 50, 50):
        seen += new.of(snapshot(recent=every[max(0, end - 20) : end]))
    assert seen == every


def test_the_same_result_twice_in_a_row_is_told_twice() -> None:
    new = NewResults()
    again = EpisodeResult(episode="ep", outcome="transient", error="busy")
    assert new.of(snapshot(recent=[again])) == [again]
    assert new.of(snapshot(recent=[again, again])) == [again]


def test_a_result_in_words() -> None:
    assert result_line(shipped("ep-1")) == "ep-1 shipped: 8.0 MB -> 2.0 MB (4.00x) in 2.00 s, 4.0 MB/s"
    bad = EpisodeResult(episode="ep-2", outcome="quarantined", error="413: too\nlarge \x1b[2J")
    assert result_line(bad) == "ep-2 quarantined: 413: too\\nlarge \\033[2J"


def test_plain_display_tells_each_result_and_each_change_of_the_destination(capsys: pytest.CaptureFixture[str]) -> None:
    paused = DestinationStatus(url="http://h", state="paused", reason="401 Unauthorized", retry_in_s=5)
    with PlainDisplay() as display:
        display(snapshot(recent=[shipped("ep-1")]))
        display(snapshot(recent=[shipped("ep-1")], destination=paused))
        display(snapshot(recent=[shipped("ep-1")], destination=paused))
        display(snapshot(recent=[shipped("ep-1"), shipped("ep-2")]))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["ep-1", "http://h", "ep-2", "http://127.0.0.1:1"]
    assert "401" in lines[1]
    assert lines[3].endswith("is back")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_live_picture_fits_any_width_and_shows_what_is_under_way(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=12, color_system=None)
    under_way = [
        EpisodeProgress(
            episode=f"ep-{number}-" + "n" * 60,
            stage="packing",
            worker=0,
            done_bytes=52_000_000,
            total_bytes=100_000_000,
            seconds=2.0,
        )
        for number in range(30)
    ]
    with LiveDisplay(console) as display:
        display(snapshot(progress=under_way))
        lines = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]|\r", "", stream.getvalue()).splitlines()
        display(snapshot(progress=under_way, recent=[shipped("ep-x")]))
    assert "ep-x" in stream.getvalue()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 12
    assert any(line.strip().startswith("ep-0-") for line in lines)
    if width >= 80:
        assert "2 shipped  30 under way  3 waiting" in lines[0]
        assert "52 %" in lines[1]
        assert "26.0 MB/s" in lines[1]
        assert "23 more" in lines[-1]


def test_a_terminal_of_another_encoding_is_given_what_it_has() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", errors="strict")
    console = Console(file=stream, force_terminal=True, width=80, height=12, color_system=None)
    one = EpisodeProgress(episode="ep-" + "n" * 60, stage="packing", worker=0, done_bytes=5, total_bytes=10)
    with LiveDisplay(console) as display:
        display(snapshot(progress=[one], recent=[shipped("ep-x")]))
    shown = raw.getvalue().decode("latin-1")
    assert "+ ep-x" in shown
    assert "nnn. " in shown
    assert "-----" in shown


@pytest.mark.parametrize("hangs_up", ["before", "while it is drawn on", "at the end"])
def test_a_terminal_that_hangs_up_stops_nobody_and_is_not_written_for(hangs_up: str) -> None:
    ours, theirs = os.openpty()
    before = sys.stderr
    with os.fdopen(theirs, "w") as terminal:
        console = Console(file=terminal, force_terminal=True, width=80, height=12)
        if hangs_up == "before":
            os.close(ours)
        with LiveDisplay(console) as display:
            if hangs_up == "while it is drawn on":
                display(snapshot())
                os.close(ours)
                for number in range(5):
                    display(snapshot(recent=[shipped(f"ep-{number}")]))
                kept = len(console._buffer)
                for number in range(5, 10):
                    display(snapshot(recent=[shipped(f"ep-{number}")]))
                    print("a line of the log", file=sys.stderr)
                assert len(console._buffer) == kept
                assert sys.stderr is before
            elif hangs_up == "at the end":
                os.close(ours)
        assert sys.stderr is before
        with pytest.raises(OSError, match="Input/output error"):
            terminal.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.fileno())  # to be closed without the same


def test_the_time_left_is_shown_whole_or_not_at_all() -> None:
    one = EpisodeProgress(episode="ep", stage="", worker=0, done_bytes=46, total_bytes=100, seconds=2.0)
    for width in range(30, 120):
        shown = module._progress_line(one, width).plain[:width].rstrip()
        assert shown.endswith(("2.35 s", "0.0 MB/s")) or width < 47


def test_summary_names_only_what_there_is() -> None:
    assert summary_line([("shipped", 5), ("held", 0), ("to retry", 1)]) == "5 shipped, 1 to retry"
    assert summary_line([("shipped", 0)]) == "nothing to ship"


def test_giving_way_in_words() -> None:
    assert packing_line(HostStatus(cores=4, budget=4)) == "all of 4 cores"
    some = HostStatus(cores=4, budget=1, why="others want 3.2 of 4 cores")
    assert packing_line(some) == "gives way, 1 of 4 cores: others want 3.2 of 4 cores"
    none = HostStatus(cores=4, budget=0, why="load of 9, limit 8")
    assert packing_line(none) == "paused: load of 9, limit 8"
