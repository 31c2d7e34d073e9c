"""``run``, ``once``, ``receive`` and ``status``: the daemon, one pass of it, the other end, and a look at it.

What always holds: `once` and `run` are the Python API (`shipper.Shipper`) with a display; what they log goes to
standard error; ``once --json`` and ``status --json`` print one document.

Imports ``shipper``, ``receiver``, ``spool`` when a command runs, and ``status``; only ``cli`` imports it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from fastship import status as status_file
from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import (
    format_bytes,
    format_rate,
    format_ratio,
    format_seconds,
    printable,
    write_json,
    write_line,
    write_table,
)
from fastship.errors import EXIT_NOT_SHIPPED, EXIT_OK, OutputError, UsageError

if TYPE_CHECKING:
    from fastship.settings import LoadedSettings, Settings

_TO_SHIP = ("spool.root", "destination.url")
_STILL_S = 10.0  # shown from then on


@click.command(short_help="Ship episodes as they appear: the daemon.")
@settings_options
@shared_options
def run(invocation: Invocation, source: SettingsSource) -> None:
    """Ship finished episodes as they appear, until told to stop. The daemon.

    SIGTERM finishes what is under way, a second one stops at once; SIGHUP reads the settings again.
    """
    from fastship.cli.display import NoDisplay, shipping_display
    from fastship.shipper import Shipper

    loaded = source.load(need=_TO_SHIP)
    live = sys.stderr.isatty() and not invocation.quiet
    settings = _hush(loaded, live or invocation.quiet)
    # Off a terminal the log is the record; a second line for each episode would only double it.
    with shipping_display(quiet=invocation.quiet) if live else NoDisplay() as display:
        shipper = Shipper(
            settings,
            observer=display if live else None,
            reload=lambda: _hush(source.load(need=_TO_SHIP), live or invocation.quiet),
        )
        shipper.run_forever()


@click.command(short_help="Ship what is ready, then end.")
@json_option
@settings_options
@shared_options
def once(invocation: Invocation, source: SettingsSource, as_json: bool) -> int:
    """Ship every finished episode there is, then end. Exit 4 when some episode was not shipped."""
    from fastship.cli.display import shipping_display, summary_line
    from fastship.shipper import Shipper

    loaded = source.load(need=_TO_SHIP)
    settings = _hush(loaded, True)
    with shipping_display(quiet=invocation.quiet) as display:
        result = Shipper(settings, observer=display, reload=lambda: settings).run_once()
    if as_json:
        write_json(result)
    elif not invocation.quiet:
        told = summary_line(
            [
                ("shipped", result.shipped),
                ("to retry", result.transient_failures),
                ("held (see: fastship holds list)", result.conflicts),
                ("quarantined (see: fastship quarantine list)", result.fatal),
            ]
        )
        if result.bytes_out:
            ratio = format_ratio(result.bytes_in, result.bytes_out)
            told += f": {format_bytes(result.bytes_in)} -> {format_bytes(result.bytes_out)} ({ratio}x)"
            told += f" in {format_seconds(result.seconds)}, {format_rate(result.bytes_in, result.seconds)}"
        write_line(told)
    left = result.transient_failures + result.conflicts + result.fatal
    # A signal may have ended the pass early: then some were scanned and have no verdict.
    return EXIT_NOT_SHIPPED if left or result.shipped < result.scanned else EXIT_OK


@click.command(short_help="Receive episodes into a directory.")
@click.option(
    "--root", metavar="DIR", type=click.Path(file_okay=False), help="Where to store: DIR/episodes/ID.tar.zst."
)
@click.option("--listen", metavar="HOST:PORT", help="Address; port 0 takes a free one.  [default: 127.0.0.1:8490]")
@click.option("--workers", metavar="N", type=click.IntRange(1, 256), help="Processes that serve.  [default: 1]")
@click.option("--token-file", metavar="FILE", type=click.Path(), help="Accepted bearer tokens, one a line.")
@click.option("--commits", "commits_file", metavar="FILE", type=click.Path(), help="Accepted commits, one a line.")
@settings_options
@shared_options
def receive(invocation: Invocation, source: SettingsSource, **flags: str | int | None) -> int:
    """Receive episodes over HTTP into a directory. Prints its URL when it is ready."""
    values: dict[str, Any] = {"receiver": {key: value for key, value in flags.items() if value is not None}}
    loaded = source.load(values=values)
    if not loaded.settings.receiver.root:
        raise UsageError("no place to store is given", remedy="--root DIR, or [receiver] root in the settings")
    for name in ("token_file", "commits_file"):
        path = getattr(loaded.settings.receiver, name)
        if path and not os.access(path, os.R_OK):
            raise UsageError(f"{path}: {'no permission' if os.path.exists(path) else 'no such file'}")
    settings = _hush(loaded, invocation.quiet)

    from fastship.receiver import serve

    def announce(url: str) -> None:
        try:
            write_line(url)
            sys.stdout.flush()
        except (OSError, OutputError) as error:  # whoever started us may not learn the port: clients are served
            logging.getLogger(__name__).error("%s cannot be printed, it is served: %s", url, error)

    return serve(settings.receiver, announce=announce)


@click.command(short_help="What the daemon is doing.")
@json_option
@settings_options
@shared_options
def status(invocation: Invocation, source: SettingsSource, as_json: bool) -> None:  # noqa: ARG001 - same flags everywhere
    """Show what the daemon of this spool is doing, or what waits when there is none."""
    from fastship.spool import Spool

    root = Path(source.load(need=("spool.root",)).settings.spool.root)
    spool = Spool(root)
    spool.paths.require()
    snapshot = status_file.read(spool.paths.state)
    running = snapshot is not None and _is_locked(spool.paths.lock)
    if running and snapshot is not None:
        ready, recording, held = snapshot.ready, snapshot.recording, snapshot.held
    else:
        found = spool.look()
        ready, recording, held = len(found.ready), len(found.recording), len(found.held)
    counts = {"ready": ready, "recording": recording, "held": held, "quarantined": len(spool.quarantined())}
    if as_json:
        write_json({"spool": str(root), "running": running, **counts, "snapshot": snapshot})
        return
    write_line(f"spool        {printable(str(root))}")
    if snapshot is None:
        write_line("daemon       not running")
    else:
        age = format_seconds(max(0.0, time.time() - snapshot.updated_at))
        doing = "draining" if snapshot.draining else "running"
        state = f"{doing}, process {snapshot.pid}, as of {age} ago" if running else f"not running, last seen {age} ago"
        write_line(f"daemon       {state}")
    write_line("episodes     " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if snapshot is not None:
        _write_snapshot(snapshot, running=running)


def _write_snapshot(snapshot: status_file.Snapshot, *, running: bool) -> None:
    from fastship.cli.display import copies_line, disk_line, packing_line

    totals, target = snapshot.totals, snapshot.destination
    volume = f", {format_bytes(totals.bytes_in)} -> {format_bytes(totals.bytes_out)}" if totals.bytes_out else ""
    write_line(f"since start  {totals.shipped} shipped{volume}")
    if running:
        reason = f": {printable(target.reason)}" if target.reason and target.state != "up" else ""
        again = f", next try in {format_seconds(target.retry_in_s)}" if target.retry_in_s > 0 else ""
        write_line(f"destination  {printable(target.url)} {target.state}{again}{reason}")
        if snapshot.host is not None:
            write_line(f"packing      {packing_line(snapshot.host)}")
        if snapshot.disk is not None:
            write_line(f"disk         {disk_line(snapshot.disk)}")
        if snapshot.retention is not None:
            write_line(f"copies       {printable(copies_line(snapshot.retention))}")
    if running and snapshot.progress:
        write_line()
        rows = [
            [
                one.episode,
                f"{one.stage}, still for {format_seconds(one.still_s)}" if one.still_s >= _STILL_S else one.stage,
                f"{100 * one.done_bytes / one.total_bytes:.0f} %" if one.total_bytes else "",
                format_bytes(one.done_bytes),
                format_rate(one.done_bytes, one.seconds),
            ]
            for one in snapshot.progress
        ]
        write_table(["UNDER WAY", "STAGE", "", "DONE", "RATE"], rows, right=frozenset({2, 3, 4}))
    if running and snapshot.waiting:
        write_line()
        rows = [[one.episode, str(one.attempts), format_seconds(one.retry_in_s), one.error] for one in snapshot.waiting]
        write_table(["WAITING", "TRIED", "AGAIN IN", "ERROR"], rows, right=frozenset({1, 2}))
    if snapshot.recent:
        write_line()
        rows = [
            [one.episode, one.outcome, format_bytes(one.bytes_in), format_bytes(one.bytes_out), one.error]
            for one in reversed(snapshot.recent)
        ]
        write_table(["RECENT", "OUTCOME", "RAW", "ARTIFACT", "ERROR"], rows, right=frozenset({2, 3}))


def _is_locked(lock: Path) -> bool:
    """Whether some process holds the spool lock, as ``/proc/locks`` says: trying it would hinder a starting daemon."""
    try:
        mark = f":{lock.stat().st_ino}"
        with open("/proc/locks", encoding="ascii") as table:
            held = (line.split() for line in table)
            return any("FLOCK" in fields and any(field.endswith(mark) for field in fields) for fields in held)
    except OSError:
        return False


def _hush(loaded: LoadedSettings, hushed: bool) -> Settings:
    """Configure the logs. ``hushed``: what a display tells already is not logged, unless the settings ask for it.

    Returned with that log level, because the processes that these settings start log by them.
    """
    from fastship import logs

    settings = loaded.settings
    if hushed and loaded.origins["log.level"] == "profile default":
        settings = msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, level="error"))
    logs.configure(settings.log)
    return settings
