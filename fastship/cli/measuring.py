"""``bench`` and ``tune``: what this host can do, and the settings that make the most of it.

What always holds: episodes are only read, nothing is left behind, and a file that exists is not overwritten without
``--force``.

Imports ``tune`` when a command runs; only ``cli`` imports it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastship import durable
from fastship.cli.newfile import new_file, require_absent
from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import format_bytes, printable, write_json, write_line, write_table
from fastship.errors import UsageError
from fastship.settings import LoadedSettings, Settings, parse_size

if TYPE_CHECKING:
    from fastship.tune import BenchReport, Part, TuneReport

_LEAST_BYTES = 1_000_000
_CHART_WIDTH, _CHART_HEIGHT = 100, 12
_T = TypeVar("_T")


def _size(_context: click.Context, _option: click.Parameter, value: str) -> int:
    try:
        size = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a size like {error}") from None
    if size < _LEAST_BYTES:
        raise click.BadParameter(f"{value} is too little to measure on: at least {format_bytes(_LEAST_BYTES)}")
    return size


def _link(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    from fastship.tune import parse_link

    try:
        return None if value is None else parse_link(value)
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a rate like {error}") from None


def _measuring_options(seconds: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--from``, ``--seconds``, ``--size``, ``--link``."""

    def wrapped(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                "--link",
                metavar="RATE",
                callback=_link,
                help="The link's rate, e.g. 100Mbit/s: counts in place of the one that is measured.",
            ),
            click.option(
                "--size",
                metavar="SIZE",
                default="256MB",
                callback=_size,
                help="Of the episodes at most.  [default: 256MB]",
            ),
            click.option(
                "--seconds",
                metavar="N",
                type=click.FloatRange(1, 3600),
                default=seconds,
                help=f"About how long to measure.  [default: {seconds:g}]",
            ),
            click.option(
                "--from",
                "sources",
                metavar="DIR",
                multiple=True,
                type=click.Path(path_type=Path),
                help="Measure on an episode, or on those of a spool's episodes/ or shipped/. May be repeated.",
            ),
        ):
            command = option(command)
        return command

    return wrapped


@click.command(short_help="What this host can do, part by part.")
@_measuring_options(seconds=30)
@json_option
@settings_options
@shared_options
def bench(
    invocation: Invocation,
    source: SettingsSource,
    sources: tuple[Path, ...],
    seconds: float,
    size: int,
    link: float | None,
    as_json: bool,
) -> None:
    """Measure every part of an episode's way on this host, and say which one holds the others back.

    On your newest episodes (of the spool that is set, or --from DIR), else on generated ones. MB/s and CPU seconds are
    of raw data for every part. Nothing is left behind.
    """
    from fastship.tune import run_bench

    report = _run(run_bench, invocation, source.load().settings, sources, seconds, size, link)
    if as_json:
        write_json(report)
        return
    _write_heading(report)
    _write_parts(report.parts)
    write_line()
    _write_sentences("predicted", report.prediction.told)
    _write_notes(report.notes)


@click.command(short_help="Choose level and settings for this host.")
@_measuring_options(seconds=40)
@click.option("--write", "target", metavar="FILE", type=click.Path(path_type=Path), help="Write the settings to FILE.")
@click.option("-f", "--force", is_flag=True, help="Replace FILE.")
@json_option
@settings_options
@shared_options
def tune(
    invocation: Invocation,
    source: SettingsSource,
    sources: tuple[Path, ...],
    seconds: float,
    size: int,
    link: float | None,
    target: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure this host, its link and your episodes, and choose the level that delivers most.

    Of levels that deliver about as much, the one with the smallest artifacts. --write FILE makes a settings file of the
    settings in force and what was chosen.
    """
    from fastship.tune import run_tune

    loaded = source.load()
    if target is not None:
        _check_target(target, force)
    report = _run(run_tune, invocation, loaded.settings, sources, seconds, size, link)
    if target is not None:
        _write_settings(target, loaded, report, force)
    if as_json:
        write_json(report)
        return
    _write_heading(report)
    _write_parts(report.parts)
    write_line()
    _write_levels(report)
    _write_chart(report)
    write_line()
    _write_sentences("link", report.link)
    _write_sentences("chosen", report.why)
    _write_sentences("predicted", report.chosen.told)
    _write_notes(report.notes)
    if target is None:
        _write_sentences("settings", "  ".join(f"{name}={value}" for name, value in _flat(report.settings)))
    elif not invocation.quiet:
        file = shlex.quote(str(target))
        write_line(f"wrote {printable(str(target))}; next: fastship config check -c {file}")


def _run(
    measure: Callable[..., _T],
    invocation: Invocation,
    settings: Settings,
    sources: Sequence[Path],
    seconds: float,
    size: int,
    link: float | None,
) -> _T:
    from fastship.cli.display import step_progress
    from fastship.cli.interruption import terminated_like_interrupted

    with terminated_like_interrupted(), step_progress(quiet=invocation.quiet) as say:
        return measure(settings, sources, size_bytes=size, seconds=seconds, link_bytes_per_s=link, say=say)


def _write_heading(report: BenchReport | TuneReport) -> None:
    host, episodes = report.host, report.episodes
    memory = format_bytes(host.memory_available_bytes)
    _write_sentences("host", f"{host.cores} cores ({host.cpu}), {memory} of memory free, Linux {host.kernel}")
    _write_sentences("outbox", host.outbox)
    _write_sentences("episodes", f"{episodes.told}, {format_bytes(episodes.bytes)} in {episodes.files} files")
    write_line()


def _write_parts(parts: Sequence[Part]) -> None:
    rows = [
        [
            part.name,
            "-" if part.mb_per_s is None else f"{part.mb_per_s:.3g}" if part.mb_per_s < 100 else f"{part.mb_per_s:.0f}",
            "-" if part.cpu_s_per_gb is None else f"{part.cpu_s_per_gb:.2f}",
            part.how,
        ]
        for part in parts
    ]
    write_table(["PART", "MB/s", "CPU-s/GB", "HOW"], rows, right=frozenset({1, 2}))


def _write_levels(report: TuneReport) -> None:
    limits = list(report.levels[0].limits)
    rows = []
    for one in report.levels:
        mark = "<- chosen" if one.level == report.chosen.level else ""
        rates = [_rate(one.limits[name]) for name in limits]
        rows.append([str(one.level), f"{one.ratio:.2f}", *rates, _rate(one.bytes_per_s), mark])
    headings = ["LEVEL", "RATIO", *(name.upper() for name in limits), "DELIVERED", ""]
    write_table(headings, rows, right=frozenset(range(len(headings) - 1)))
    write_line()


def _rate(bytes_per_s: float) -> str:
    rate = bytes_per_s / 1e6
    return f"{rate:.0f}" if rate >= 99.5 else f"{rate:.3g}"


def _write_chart(report: TuneReport) -> None:
    from fastship.cli.chart import ASCII, UNICODE, Point, chart

    chosen = report.chosen.level
    packed = [(one, one.limits["cores"] / 1e6) for one in report.levels]
    points = [Point(rate, one.ratio, str(one.level), one.level == chosen) for one, rate in packed]
    lines = chart(
        points,
        width=max(40, min(_CHART_WIDTH, shutil.get_terminal_size().columns - 1)),
        height=_CHART_HEIGHT,
        signs=UNICODE if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII,
        x_title="MB/s packed",
        y_title="RATIO",
    )
    if not sys.stdout.isatty():
        for line in lines:
            write_line(line)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    for line in lines:
        text = Text(line, no_wrap=True)
        text.highlight_regex(r"[●*]\d+", "bold green")
        text.highlight_regex(r"[○o]\d+", "cyan")
        console.print(text, overflow="crop")


def _write_sentences(title: str, text: str) -> None:
    """``title:  text``, folded where it goes to a terminal."""
    import textwrap

    line = f"{title + ':':<11}{printable(text)}"
    width = shutil.get_terminal_size().columns - 1
    for piece in textwrap.wrap(line, width, subsequent_indent=" " * 11) if sys.stdout.isatty() else [line]:
        write_line(piece)


def _write_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _write_sentences("note", note)


def _flat(settings: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    from fastship.settings import format_size

    return [
        (f"{section}.{key}", format_size(value) if key.endswith("_bytes") else str(value))
        for section, keys in settings.items()
        for key, value in keys.items()
    ]


def _check_target(target: Path, force: bool) -> None:
    """Before minutes of measuring. Raises `UsageError`."""
    try:
        if not force:
            require_absent(target)
    except FileExistsError:
        raise UsageError(f"{target} is there already", remedy="--force to replace it") from None
    if target.exists() and not target.is_file():
        what = "a directory" if target.is_dir() else "not a file"
        raise UsageError(f"{target} is {what}", remedy="--write takes a FILE")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{target}: {target.parent} is no directory that can be written to", remedy="another FILE")


def _write_settings(target: Path, loaded: LoadedSettings, report: TuneReport, force: bool) -> None:
    """The settings in force that are not defaults, and the chosen ones. Raises `UsageError`."""
    from fastship.tune import settings_toml

    values: dict[str, dict[str, Any]] = {}
    for name, origin in loaded.origins.items():
        section, key = name.split(".")
        if origin not in ("built in", "profile default"):
            values.setdefault(section, {})[key] = getattr(getattr(loaded.settings, section), key)
    for section, keys in report.settings.items():
        values.setdefault(section, {}).update(keys)
    comments = [
        f"Written by fastship tune, {time.strftime('%Y-%m-%d %H:%M:%S')}, measured on {report.episodes.told}.",
        f"Host: {report.host.cores} cores, {report.host.cpu}. Link: {report.link}.",
        f"{report.why}",
        f"Predicted: {report.chosen.told}.",
    ]
    text = settings_toml([printable(line) for line in comments], values)
    try:
        # A link stays, what it leads to is replaced.
        with new_file(Path(os.path.realpath(target)) if force else target, replace=force) as file:
            durable.write_all(file.fileno(), text.encode())
    except FileExistsError:
        raise UsageError(f"{target} appeared meanwhile", remedy="--force to replace it") from None
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror}", remedy="--write a FILE elsewhere") from None
