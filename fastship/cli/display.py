"""Progress on standard error: a live picture on a terminal, plain lines elsewhere, nothing with ``--quiet``.

What always holds: a display only shows; nothing waits for it but the terminal's own writing, and leaving one
(also by an exception) gives the terminal back. It is fed `status.Snapshot` values or byte counts by whoever works.

Imports ``status``; only ``cli`` imports it. rich is loaded only for a terminal.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastship.cli.output import format_bytes, format_rate, format_ratio, format_seconds, printable
from fastship.status import DiskStatus, EpisodeProgress, EpisodeResult, HostStatus, RetentionStatus, Snapshot

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STYLES = {"shipped": "green", "conflict": "yellow", "quarantined": "red", "transient": "yellow"}
_ASCII = str.maketrans(
    {"\N{BOX DRAWINGS HEAVY HORIZONTAL}": "-", "\N{HORIZONTAL ELLIPSIS}": ".", "\N{CHECK MARK}": "+"}
)
_REDRAW_S = 0.1  # ten pictures a second look smooth; each costs about 2 ms here


def result_line(result: EpisodeResult) -> str:
    """One episode's end in words: ``ep-1 shipped: 12.0 MB -> 3.0 MB (4.00x) in 0.31 s, 38.7 MB/s``."""
    text = f"{printable(result.episode)} {result.outcome}"
    if result.bytes_out and result.outcome == "shipped":
        sizes = f"{format_bytes(result.bytes_in)} -> {format_bytes(result.bytes_out)}"
        text += f": {sizes} ({format_ratio(result.bytes_in, result.bytes_out)}x) in {format_seconds(result.seconds)}"
        text += f", {format_rate(result.bytes_in, result.seconds)}"
    if result.resumed_at:
        text += f", resumed at {format_bytes(result.resumed_at)}"
    if result.error:
        text += f": {printable(result.error)}"
    return text


class NewResults:
    """Which results of a snapshot were not in the one before: ``recent`` is a window that slides."""

    def __init__(self) -> None:
        self._seen: list[EpisodeResult] = []

    def of(self, snapshot: Snapshot) -> list[EpisodeResult]:
        """The new ones, oldest first; those that slid out of the window between two snapshots are not known."""
        recent = list(snapshot.recent)
        overlap = next(
            (size for size in range(min(len(self._seen), len(recent)), 0, -1) if self._seen[-size:] == recent[:size]), 0
        )
        self._seen = recent
        return recent[overlap:]


class PlainDisplay:
    """A line for each episode that came to an end; as context manager and observer, like `LiveDisplay`."""

    def __init__(self) -> None:
        self._new = NewResults()
        self._destination = "up"

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, snapshot: Snapshot) -> None:
        for result in self._new.of(snapshot):
            print(result_line(result), file=sys.stderr, flush=True)
        if snapshot.destination.state != self._destination:
            self._destination = snapshot.destination.state
            print(_destination_line(snapshot), file=sys.stderr, flush=True)


class NoDisplay:
    """Shows nothing."""

    def __enter__(self) -> NoDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, snapshot: Snapshot) -> None:
        pass


class _Picture:
    """What is drawn in place on the terminal behind standard error. That may hang up: then nothing more is drawn, and
    whoever works goes on. It is not tried again: rich keeps what it could not write, and all that comes after it.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(stderr=True, highlight=False)
        self._live: Live = Live(console=self.console, auto_refresh=False, transient=True)
        self._drawing = False

    def __enter__(self) -> _Picture:
        with contextlib.suppress(OSError):
            self._live.start()
            self._drawing = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawing:
            self._drawing = False
            with contextlib.suppress(OSError):
                self._live.stop()  # which also gives back ``sys.stderr``

    def draw(self, lines: Sequence[Text]) -> None:
        """In place of what was drawn last, each cut to the terminal's width."""
        from rich.console import Group

        for line in lines:
            line.truncate(self.console.width, overflow="ellipsis")
        picture = Group(*map(self._as_encoded, lines))
        self._try(lambda: self._live.update(picture, refresh=True))

    def say(self, line: Text) -> None:
        """Above it, to stay."""
        self._try(lambda: self.console.print(self._as_encoded(line), overflow="fold"))

    def _as_encoded(self, line: Text) -> Text:
        """Without what the terminal's encoding may not have: an escape of it would be wider."""
        if not self.console.encoding.startswith("utf"):
            line.plain = line.plain.translate(_ASCII)
        return line

    def _try(self, step: Callable[[], None]) -> None:
        if self._drawing:
            try:
                step()
            except OSError:
                self.__exit__()


class LiveDisplay:
    """The picture for a terminal: results scroll above, a header and one line for each episode under way below."""

    def __init__(self, console: Console | None = None) -> None:
        self._shown = _Picture(console)
        self._new = NewResults()
        self._drawn_at = 0.0

    def __enter__(self) -> LiveDisplay:
        self._shown.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__()

    def __call__(self, snapshot: Snapshot) -> None:
        from rich.text import Text

        results = self._new.of(snapshot)
        for result in results:
            mark = "\N{CHECK MARK}" if result.outcome == "shipped" else "!"
            self._shown.say(Text.assemble((f"{mark} ", _STYLES.get(result.outcome, "")), result_line(result)))
        now = time.monotonic()
        if results or now - self._drawn_at >= _REDRAW_S:
            self._drawn_at = now
            self._shown.draw(self._picture(snapshot))

    def _picture(self, snapshot: Snapshot) -> list[Text]:
        width = self._shown.console.width
        room = max(3, self._shown.console.height - 5)
        lines = [_header(snapshot, width), *(_progress_line(one, width) for one in snapshot.progress[:room])]
        if len(snapshot.progress) > room:
            lines.append(_line(f"  and {len(snapshot.progress) - room} more", "dim"))
        if snapshot.destination.state != "up":
            lines.append(_line(_destination_line(snapshot), "yellow"))
        if snapshot.host is not None and snapshot.host.why:
            lines.append(_line(f"packing: {packing_line(snapshot.host)}", "yellow"))
        return lines


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style, no_wrap=True)


def _header(snapshot: Snapshot, width: int) -> Text:
    totals = snapshot.totals
    parts = [f"{totals.shipped} shipped", f"{len(snapshot.progress)} under way", f"{snapshot.ready} waiting"]
    if snapshot.held:
        parts.append(f"{snapshot.held} held")
    if totals.fatal:
        parts.append(f"{totals.fatal} quarantined")
    if totals.transient_failures:
        parts.append(f"{totals.transient_failures} to retry")
    if snapshot.recording and width >= 100:
        parts.append(f"{snapshot.recording} recording")
    if totals.bytes_out:
        parts.append(f"{format_bytes(totals.bytes_in)} -> {format_bytes(totals.bytes_out)}")
        parts.append(format_rate(totals.bytes_in, snapshot.updated_at - snapshot.started_at))
    return _line(("draining: " if snapshot.draining else "") + "  ".join(parts), "bold")


def _progress_line(one: EpisodeProgress, width: int) -> Text:
    """``  ep-1   packing  ━━━━━━      52 %  210.3 MB/s  0:12``: what does not fit a narrow terminal is left out."""
    from rich.text import Text

    name = printable(one.episode)
    name_width = min(32, max(12, width - 56))
    name = name if len(name) <= name_width else name[: name_width - 1] + "…"
    fraction = min(1.0, one.done_bytes / one.total_bytes) if one.total_bytes else 0.0
    bar_width = min(30, max(0, width - name_width - 46))
    full = int(bar_width * fraction)
    rest = "━" if one.total_bytes else " "
    bar = Text.assemble(("━" * full, "cyan"), (rest * (bar_width - full), "bright_black"))
    rate = format_rate(one.done_bytes, one.seconds)
    left = format_seconds(one.seconds * (1 - fraction) / fraction) if 0 < fraction < 1 and one.seconds > 0.5 else ""
    percent = f"{100 * fraction:3.0f} %" if one.total_bytes else format_bytes(one.done_bytes)
    numbers = f" {percent:>8}  {rate:>11}  "
    if 2 + name_width + 1 + 9 + bar_width + len(numbers) + len(left) > width:
        left = ""  # whole or not at all: half of a time is another time
    return Text.assemble(f"  {name:<{name_width}} ", (f"{one.stage:<8} ", "dim"), bar, numbers + left, no_wrap=True)


def packing_line(host: HostStatus) -> str:
    """``gives way, 1 of 2 cores: others want 1.2 of 2 cores``."""
    if not host.why:
        return f"all of {host.cores} cores"
    what = f"gives way, {host.budget} of {host.cores} cores" if host.budget else "paused"
    return f"{what}: {host.why}"


def disk_line(disk: DiskStatus) -> str:
    """``low, 1.2 GB of 40.0 GB free, 2.0 GB kept free, full in about 12 min: one artifact at a time is packed``."""
    text = f"{disk.level}, {format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} free"
    if disk.reserve_bytes:
        text += f", {format_bytes(disk.reserve_bytes)} kept free"
    if disk.seconds_to_full is not None:
        text += f", full in about {format_seconds(disk.seconds_to_full)}"
    if disk.short:
        full = disk.outbox_limit_bytes and disk.outbox_bytes >= disk.outbox_limit_bytes
        why = "the outbox has all that it may have" if full else "what is packed is shipped first"
        text += f": {why}, one artifact at a time is packed"
    return text


def copies_line(retention: RetentionStatus) -> str:
    """``12 in shipped/ (3.2 GB), 4 removed, 1 kept: ep-1: the receiver does not have it``."""
    text = f"{retention.copies} in shipped/ ({format_bytes(retention.bytes)}), {retention.removed} removed"
    if retention.kept:
        text += f", {retention.kept} kept that should go: {retention.why}"
    if retention.waits:
        text += f"; nobody can be asked: {retention.waits}"
    return text


def _destination_line(snapshot: Snapshot) -> str:
    one = snapshot.destination
    if one.state == "up":
        return f"{printable(one.url)} is back"
    again = f", next try in {format_seconds(one.retry_in_s)}" if one.retry_in_s > 0 else ""
    return f"{printable(one.url)} is {one.state}{again}: {printable(one.reason)}"


Display = LiveDisplay | PlainDisplay | NoDisplay


def shipping_display(*, quiet: bool) -> Display:
    """The display that suits standard error."""
    if quiet:
        return NoDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


@contextlib.contextmanager
def byte_progress(title: str, total_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar for one stream of bytes; the body calls what it gets with the bytes done so far (not the difference).

    Off a terminal and with ``quiet`` it shows nothing: the command's last line says it all.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _done: None
        return
    started = time.monotonic()
    drawn = started
    with _Picture() as picture:

        def show(done_bytes: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < _REDRAW_S:
                return
            drawn = now
            line = _progress_line(
                EpisodeProgress(
                    episode=title,
                    stage="",
                    worker=0,
                    done_bytes=done_bytes,
                    total_bytes=total_bytes,
                    seconds=now - started,
                ),
                picture.console.width,
            )
            picture.draw([line])

        yield show


@contextlib.contextmanager
def step_progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; the body calls what it gets at each step. A terminal only, as above.

    Drawn at the steps and not in between: it shall not disturb what is measured meanwhile.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _step: None
        return
    started = time.monotonic()
    with _Picture() as picture:

        def show(step: str) -> None:
            picture.draw([_line(f"measuring, {time.monotonic() - started:.0f} s: {printable(step)}", "dim")])

        yield show


def summary_line(results: Sequence[tuple[str, int]]) -> str:
    """``5 shipped, 1 to retry``: only what is not zero, ``nothing to ship`` when all is."""
    told = [f"{count} {name}" for name, count in results if count]
    return ", ".join(told) if told else "nothing to ship"
