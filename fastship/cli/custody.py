"""``verify`` and ``scrub``: is what was shipped still there, asked from the host and looked at on the receiver.

What always holds: one line on standard output for each episode that is not as it should be, and a summary; exit 0 only
when every one was read and is right, 1 when one is not.

Imports ``custody``, ``shipper`` and ``receiver`` when a command runs; only ``cli`` imports it.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import click
import msgspec

from fastship.cli.interruption import terminated_like_interrupted
from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import format_bytes, format_rate, format_seconds, printable, write_json, write_line
from fastship.errors import EXIT_DIFFERS, EXIT_OK, FastshipError, UsageError


@click.command(short_help="Ask the receiver to read again what was shipped.")
@click.argument("episodes", metavar="[EPISODE]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every episode that has a receipt in this spool.")
@click.option("--download", is_flag=True, help="Fetch it and look at it here, from servers that cannot read again.")
@click.option("--local", is_flag=True, help="Read the copies in shipped/, too.")
@click.option("--reship", is_flag=True, help="Ship again, from shipped/, what the receiver has lost.")
@json_option
@settings_options
@shared_options
def verify(
    invocation: Invocation,
    source: SettingsSource,
    episodes: tuple[str, ...],
    everything: bool,
    download: bool,
    local: bool,
    reship: bool,
    as_json: bool,
) -> int:
    """Have the receiver read EPISODE again, and compare with its receipt. Exit 1 when one is missing or not the same.

    What has rotted at the receiver it sets aside; --reship puts the copy in shipped/ back, to be shipped again.

    A server that is not fastship's receiver cannot read again: with --download what it has is fetched and digested
    here, within upload.bandwidth, and not kept.
    """
    if everything == bool(episodes):
        raise UsageError("name some episodes, or --all", remedy="fastship verify --all")
    settings = source.load(need=("spool.root", "destination.url")).settings

    from fastship import logs
    from fastship.custody import Ledger
    from fastship.shipper import operate

    logs.configure(msgspec.structs.replace(settings.log, level="error"))
    ledger = Ledger(settings)
    ledger.require(episodes)
    counts = {"equal": 0, "not_equal": 0, "reshipped": 0, "read_from_disk": 0, "downloaded_bytes": 0}
    told = []
    asked = ledger.episodes() if everything else dict.fromkeys(episodes)
    with contextlib.closing(ledger.check(asked, local=local, fetch=download)) as checked:
        for one in checked:
            counts["read_from_disk"] += one.found.read_from == "disk"
            counts["downloaded_bytes"] += one.found.artifact_bytes if download else 0
            if one.state == "equal":
                counts["equal"] += 1
                if as_json and not everything:
                    told.append({"checked": one, "reship": ""})
                continue
            counts["not_equal"] += 1
            again = ""
            if reship and one.state in ("missing", "rotted"):
                if one.copy is not None:
                    try:
                        again = operate(settings, "reship", one.copy)
                        counts["reshipped"] += 1
                    except FastshipError as error:
                        again = f"it cannot be shipped again: {error.message}"
                else:
                    again = f"it cannot be shipped again: {one.copy_error}"
            if as_json:
                told.append({"checked": one, "reship": again})
            else:
                write_line(printable(f"{one.episode}: {one.error}" + (f"; {again}" if again else "")))
    for line in ledger.spoilt:
        click.echo(f"fastship: receipts/{printable(line)}, cannot be read: of what it told, nothing is known", err=True)
    if as_json:
        write_json({**counts, "spoilt_receipts": ledger.spoilt, "episodes": told})
    elif not invocation.quiet:
        by_disk, by_line = counts["read_from_disk"], format_bytes(counts["downloaded_bytes"])
        how = f"{by_line} downloaded" if download else f"{by_disk} read from the disk"
        summary = f"{counts['equal']} equal, {counts['not_equal']} not; {how}"
        write_line(summary + (f", {counts['reshipped']} to be shipped again" if reship else ""))
    return EXIT_DIFFERS if counts["not_equal"] or ledger.spoilt else EXIT_OK


@click.command(short_help="Read a receiver's store again, on its host.")
@click.option("--root", metavar="DIR", type=click.Path(file_okay=False), help="The receiver's root.")
@click.option("--rate", metavar="BYTES", help="Read at most so much a second: 50MB.  [default: no limit]")
@click.option("--keep", is_flag=True, help="Say what rotted, and leave it where it is.")
@json_option
@settings_options
@shared_options
def scrub(
    invocation: Invocation,
    source: SettingsSource,
    root: str | None,
    rate: str | None,
    keep: bool,
    as_json: bool,
) -> int:
    """Read every stored artifact again, the longest unread first, and set aside what rotted. Exit 1 when one did.

    A receiver may run meanwhile. Interrupted, the next one goes on where this one was.
    """
    from fastship.settings.units import parse_size

    values: dict[str, Any] = {"receiver": {"root": root} if root else {}}
    settings = source.load(values=values).settings
    if not settings.receiver.root:
        raise UsageError("no store is given", remedy="--root DIR, or [receiver] root in the settings")
    try:
        bytes_per_s = parse_size(rate) if rate else 0
    except ValueError as error:
        raise UsageError(f"--rate {rate} is not an amount of bytes", remedy=f"write it as {error}") from None

    from fastship import logs
    from fastship.receiver.store.scrub import Scrub, Unchecked

    logs.configure(msgspec.structs.replace(settings.log, level="critical" if as_json else "error"))
    work = Scrub(settings.receiver, bytes_per_s=bytes_per_s, keep=keep)
    counts = {"sound": 0, "mended": 0, "rotted": 0, "unchecked": 0}
    told = []
    began = time.monotonic()
    with terminated_like_interrupted():
        for found in work.run():
            name = "unchecked" if isinstance(found, Unchecked) else found.verdict
            counts[name] += 1
            if name == "sound":
                continue
            if as_json:
                told.append(found)
            else:
                aside = "" if isinstance(found, Unchecked) or not found.set_aside else f"; set aside: {found.set_aside}"
                write_line(printable(f"{found.episode}: {name}: {found.error}{aside}"))
    seconds = time.monotonic() - began
    if as_json:
        write_json({**counts, "read_bytes": work.read_bytes, "seconds": seconds, "artifacts": told})
    elif not invocation.quiet:
        amounts = f"{format_bytes(work.read_bytes)} read in {format_seconds(seconds)}"
        counted = ", ".join(f"{count} {name}" for name, count in counts.items())
        write_line(f"{counted}; {amounts}, {format_rate(work.read_bytes, seconds)}")
    return EXIT_DIFFERS if counts["rotted"] or counts["unchecked"] else EXIT_OK
