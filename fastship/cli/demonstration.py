"""``demo``: the whole of fastship on this machine, shown.

Imports ``demo`` when the command runs; only ``cli`` imports it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastship.cli.interruption import terminated_like_interrupted
from fastship.cli.options import Invocation, json_option, shared_options
from fastship.cli.output import format_bytes, format_rate, format_ratio, write_json, write_line, write_table
from fastship.errors import EXIT_NOT_SHIPPED, EXIT_OK, UsageError

if TYPE_CHECKING:
    from fastship.demo import Compared


@click.command(short_help="See it all work on this machine.")
@click.option(
    "--dir", "directory", metavar="DIR", type=click.Path(path_type=Path), help="Work in DIR and keep it all there."
)
@click.option(
    "--from",
    "sources",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Ship copies of your own directories: each one in DIR, or DIR itself if there is none. May be repeated.",
)
@click.option(
    "--seconds", metavar="N", type=click.FloatRange(0.5, 3600), default=5.0, help="How long to record.  [default: 5]"
)
@json_option
@shared_options
def demo(
    invocation: Invocation, directory: Path | None, sources: tuple[Path, ...], seconds: float, as_json: bool
) -> int:
    """Record this host, ship it to a receiver on loopback, read it back and compare. Needs no set-up.

    Exit 0 only if every episode came back byte for byte as it was recorded.
    """
    from fastship import logs
    from fastship.cli.display import shipping_display
    from fastship.demo import Ended, run_demo
    from fastship.settings import LogSettings

    logs.configure(LogSettings(level="error", format="text"))

    def say(line: str) -> None:
        if not invocation.quiet:
            click.echo(line, err=True)

    display = shipping_display(quiet=invocation.quiet)
    with terminated_like_interrupted(), _workplace(directory) as place:
        try:
            compared = run_demo(
                place,
                sources=sources,
                seconds=seconds,
                keep=directory is not None,
                observer=display,
                say=say,
                shipping=lambda: display,
            )
        except Ended:
            raise KeyboardInterrupt from None
    if as_json:
        write_json(compared)
    else:
        _write_result(compared)
    if directory is not None:
        say(f"kept in {directory}: spool/shipped, receiver/episodes, readback, restored, receiver.log")
    return EXIT_OK if compared and all(one.equal for one in compared) else EXIT_NOT_SHIPPED


def _write_result(compared: list[Compared]) -> None:
    rows = [
        [
            one.episode,
            str(one.files),
            format_bytes(one.raw_bytes),
            format_bytes(one.artifact_bytes),
            format_ratio(one.raw_bytes, one.artifact_bytes),
            format_rate(one.raw_bytes, one.seconds),
            one.verdict,
        ]
        for one in compared
    ]
    headings = ["EPISODE", "FILES", "RAW", "ARTIFACT", "RATIO", "SPEED", "VERDICT"]
    write_table(headings, rows, right=frozenset({1, 2, 3, 4, 5}))
    equal = sum(one.equal for one in compared)
    write_line(f"{equal} of {len(compared)} episodes came back from the receiver equal, byte for byte")


@contextlib.contextmanager
def _workplace(directory: Path | None) -> Iterator[Path]:
    """The directory to work in: DIR, which must be new or empty and stays, or a temporary one. Raises `UsageError`."""
    if directory is None:
        place = Path(tempfile.mkdtemp(prefix="fastship-demo-"))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        empty = not any(directory.iterdir())
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}", remedy="--dir takes a new or an empty directory") from None
    if not empty:
        raise UsageError(f"{directory} is not empty", remedy="--dir takes a new or an empty directory")
    yield directory.absolute()
