"""``quarantine`` and ``holds``: what waits for an operator, and the operator's word on it.

What always holds: looking changes nothing; every change goes through `shipper.operate`, which does it under the
spool's lock or asks the daemon that has it; what removes data for good asks first.

Imports ``spool`` (to look) and ``shipper`` (to act) when a command runs; only ``cli`` imports it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import printable, printable_lines, write_json, write_line, write_table
from fastship.errors import UsageError

if TYPE_CHECKING:
    from fastship.settings import Settings
    from fastship.spool import Spool

_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.group(short_help="Episodes the receiver refused.")
def quarantine() -> None:
    """Episodes that the receiver will never take as they are. Their data is kept."""


@quarantine.command("list")
@json_option
@settings_options
@shared_options
def list_quarantined(invocation: Invocation, source: SettingsSource, as_json: bool) -> None:
    """List the quarantined episodes with the reason of each."""
    entries = _spool(source).quarantined()
    if as_json:
        write_json(entries)
    elif entries:
        rows = []
        for one in entries:
            reason = one.reason
            if reason is None:
                rows.append([one.name, "", "", "its reason cannot be read"])
            else:
                status = "" if reason.status_code is None else str(reason.status_code)
                rows.append([one.name, status, reason.quarantined_at_wall, reason.error])
        write_table(["EPISODE", "STATUS", "SINCE", "ERROR"], rows, right=frozenset({1}))
    elif not invocation.quiet:
        write_line("nothing is in quarantine")


@quarantine.command("show")
@click.argument("episode")
@json_option
@settings_options
@shared_options
def show_quarantined(invocation: Invocation, source: SettingsSource, episode: str, as_json: bool) -> None:  # noqa: ARG001
    """Show why EPISODE is in quarantine, with the receiver's answer."""
    spool = _spool(source)
    found = next((one for one in spool.quarantined() if one.name == episode), None)
    if found is None:
        raise UsageError(f"{episode} is not in quarantine", remedy="see: fastship quarantine list")
    directory = spool.paths.quarantine / found.name
    if as_json:
        write_json({"quarantined": found, "directory": str(directory)})
        return
    write_line(f"episode    {printable(found.name)}")
    write_line(f"directory  {printable(str(directory))}")
    if found.reason is None:
        write_line("reason     cannot be read")
        return
    write_line(f"since      {printable(found.reason.quarantined_at_wall)}")
    write_line(f"status     {'-' if found.reason.status_code is None else found.reason.status_code}")
    write_line(f"error      {printable(found.reason.error)}")
    if found.reason.body:
        write_line("body")
        write_line("  " + printable_lines(found.reason.body).replace("\n", "\n  "))


@quarantine.command("retry")
@click.argument("episodes", metavar="EPISODE...", nargs=-1, required=True)
@click.option("--as", "new_id", metavar="NEWID", help="Ship it under another id (one EPISODE only).")
@settings_options
@shared_options
def retry(invocation: Invocation, source: SettingsSource, episodes: tuple[str, ...], new_id: str | None) -> None:
    """Put EPISODE back into the spool, to be shipped again."""
    if new_id is not None and len(episodes) > 1:
        raise UsageError("--as takes one episode", remedy="retry the others by themselves")
    _operate(invocation, source, "retry", episodes, new_id=new_id)


@quarantine.command("drop")
@click.argument("episodes", metavar="EPISODE...", nargs=-1, required=True)
@_yes
@settings_options
@shared_options
def drop(invocation: Invocation, source: SettingsSource, episodes: tuple[str, ...], yes: bool) -> None:
    """Remove EPISODE for good."""
    _confirm(f"remove {', '.join(map(printable, episodes))} for good?", yes)
    _operate(invocation, source, "drop", episodes)


@click.group(short_help="Episodes whose id is taken at the receiver.")
def holds() -> None:
    """Episodes left in place because the receiver has another content under their id."""


@holds.command("list")
@json_option
@settings_options
@shared_options
def list_holds(invocation: Invocation, source: SettingsSource, as_json: bool) -> None:
    """List the holds with the reason of each."""
    records = _spool(source).holds()
    if as_json:
        write_json(records)
    elif records:
        rows = [
            [one.episode, one.reason, "" if one.status is None else str(one.status), one.held_at, one.error]
            for one in records
        ]
        write_table(["EPISODE", "REASON", "STATUS", "SINCE", "ERROR"], rows, right=frozenset({2}))
    elif not invocation.quiet:
        write_line("nothing is held")


@holds.command("keep-local", short_help="The local episode is right: offer it again.")
@click.argument("episode")
@click.option("--as", "new_id", metavar="NEWID", help="Ship it under another id; both contents are then kept.")
@settings_options
@shared_options
def keep_local(invocation: Invocation, source: SettingsSource, episode: str, new_id: str | None) -> None:
    """The local EPISODE is right: offer it again, under NEWID where given."""
    _operate(invocation, source, "keep-local", (episode,), new_id=new_id)


@holds.command("drop-local", short_help="The receiver's copy is right: quarantine the local one.")
@click.argument("episode")
@_yes
@settings_options
@shared_options
def drop_local(invocation: Invocation, source: SettingsSource, episode: str, yes: bool) -> None:
    """The receiver's copy is right: the local EPISODE goes to quarantine, where its data is kept."""
    _confirm(f"move the local {printable(episode)} to quarantine?", yes)
    _operate(invocation, source, "drop-local", (episode,))


def _settings(source: SettingsSource) -> Settings:
    return source.load(need=("spool.root",)).settings


def _spool(source: SettingsSource) -> Spool:
    """The spool to look at; nothing is made."""
    from fastship.spool import Spool

    spool = Spool(_settings(source).spool.root)
    spool.paths.require()
    return spool


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} cannot be asked here, as there is no terminal", remedy="--yes")
    click.confirm(question, abort=True, err=True)


def _operate(
    invocation: Invocation,
    source: SettingsSource,
    action: Literal["retry", "drop", "keep-local", "drop-local"],
    episodes: tuple[str, ...],
    *,
    new_id: str | None = None,
) -> None:
    from fastship import logs
    from fastship.shipper import operate

    settings = _settings(source)
    logs.configure(msgspec.structs.replace(settings.log, level="warning"))
    for episode in episodes:
        sentence = operate(settings, action, episode, new_id=new_id)
        if not invocation.quiet:
            write_line(printable(sentence))
