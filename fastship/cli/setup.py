"""``init`` and ``config``: making a spool and its settings file, and looking at what is set.

What always holds: nothing that exists is overwritten, and ``config show`` prints TOML that can be read back.

Imports ``settings``, ``spool``, ``errors``; only ``cli`` imports it.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fastship import durable
from fastship.cli.newfile import new_file, require_absent
from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import write_json, write_line
from fastship.errors import SettingsError, UsageError
from fastship.settings import LoadedSettings, Settings, format_duration, format_size

_TEMPLATE = """\
# fastship's settings for this spool. Everything else has a default: `fastship config show --origin`.
# Sizes: 8MiB, 500kB. Times: 500ms, 30s, 5min, 2h. Paths are relative to this file.

# profile = "throughput"   # or balanced, archive (smallest), lowmem

[spool]
# Holds episodes/ (recorders write there, done.marker last), outbox/, shipped/, quarantine/ and state/.
root = "."

[destination]
# Where `fastship receive` or another receiver answers.
{url}
# A file with the bearer token alone in it, if the receiver asks for one.
# token_file = "token"
# Own certificate authority, and a client certificate, for TLS.
# ca_file = "ca.pem"
# client_cert = "client.pem"
# client_key = "client.key"

[upload]
# Bytes a second over all uploads; 0 = no limit.
# bandwidth = "50MB"

[retention]
# Days that quarantined episodes are kept; 0 = for ever.
# quarantine_keep_days = 0
"""


@click.command(short_help="Make a spool and its settings file.")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", metavar="URL", default="", help="The receiver, e.g. https://receiver.example:8443.")
@shared_options
def init(invocation: Invocation, directory: Path, url: str) -> None:
    """Make a spool in DIR: its directories and a commented fastship.toml."""
    from fastship.spool import Spool

    target = directory / "fastship.toml"
    there = UsageError(f"{target} is there already", remedy=f"edit it, or remove it and run init again: {target}")
    try:
        require_absent(target)
    except FileExistsError:
        raise there from None
    Settings.load(values={"destination": {"url": url}})  # a wrong URL is told before anything is made
    url_line = f"url = {json.dumps(url)}" if url else '# url = "https://receiver.example:8443"'
    try:
        directory.mkdir(parents=True, exist_ok=True)
        Spool(directory.absolute()).create()
        with new_file(target, replace=False) as file:
            durable.write_all(file.fileno(), _TEMPLATE.format(url=url_line).encode())
    except FileExistsError:
        raise there from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UsageError(
            f"cannot make a spool in {directory}: {error.strerror}{where}", remedy="name a directory that you may write"
        ) from None
    if invocation.quiet:
        return
    file_argument = shlex.quote(str(target))
    write_line(f"made the spool {directory} and {target}")
    write_line("next:")
    if not url:
        write_line(f"  set destination.url in {target}")
    write_line(f"  recorders write {directory}/episodes/ID/ and, last of all, {directory}/episodes/ID/done.marker")
    write_line(f"  fastship config check -c {file_argument}")
    write_line(f"  fastship run -c {file_argument}")


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command()
@click.option("--origin", is_flag=True, help="Say where each value was set.")
@json_option
@settings_options
@shared_options
def show(invocation: Invocation, source: SettingsSource, origin: bool, as_json: bool) -> None:  # noqa: ARG001 - flags
    """Print every setting as it is in force, as TOML."""
    loaded = source.load()
    if as_json:
        document: dict[str, dict[str, Any]] = {}
        for section, key, value in _values(loaded):
            told = {"value": value, "origin": loaded.origins[f"{section}.{key}"]} if origin else value
            document.setdefault(section, {})[key] = told
        write_json(document)
        return
    if loaded.path:
        write_line(f"# from {loaded.path}")
    last = ""
    for section, key, value in _values(loaded):
        if section != last:
            write_line(f"\n[{section}]" if last or loaded.path else f"[{section}]")
            last = section
        line = f"{key} = {_toml(key, value)}"
        write_line(f"{line:<44}  # {loaded.origins[f'{section}.{key}']}" if origin else line)


@config.command(short_help="Check that they can work on this host.")
@json_option
@settings_options
@shared_options
def check(invocation: Invocation, source: SettingsSource, as_json: bool) -> None:
    """Check that the settings can work on this host: files, spool, file system. Changes nothing.

    What they ask for and this host cannot do, but nothing fails for, is told as a note.
    """
    loaded = source.load(need=("spool.root",))
    from fastship.supervisor import disk, host

    problems = list(_problems(loaded))
    try:
        host.most_threads(loaded.settings)
    except SettingsError as error:
        problems.append(f"{error.message} ({error.remedy})")
    notes = [*host.unavailable(loaded.settings), *disk.unavailable(loaded.settings)]
    if as_json:
        write_json({"ok": not problems, "problems": problems, "notes": notes})
    if problems:
        raise SettingsError(
            "; ".join(problems)
            if len(problems) == 1
            else "\n  ".join([f"{len(problems)} things are wrong:", *problems]),
            remedy="correct it" if len(problems) == 1 else "correct them",
        )
    if not as_json and not invocation.quiet:
        for note in notes:
            write_line(f"note: {note}")
        write_line(f"ok: {loaded.path or 'built-in settings'}, spool {loaded.settings.spool.root}")


def _values(loaded: LoadedSettings) -> Iterator[tuple[str, str, Any]]:
    for section in Settings.__struct_fields__:
        values = getattr(loaded.settings, section)
        for key in values.__struct_fields__:
            yield section, key, getattr(values, key)


def _toml(key: str, value: Any) -> str:
    """A value as TOML that reads back the same; the units follow the names' endings."""
    if isinstance(value, str):
        return json.dumps(value)  # a TOML basic string, too
    if key.endswith("_bytes") or key == "bandwidth":
        size = format_size(value)
        return size if size.isdigit() else f'"{size}"'
    if key.endswith("_s"):
        return f'"{format_duration(value)}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


_SPOOL_DIRECTORIES = ("episodes", "outbox", "shipped", "quarantine")


def _problems(loaded: LoadedSettings) -> Iterator[str]:
    """Every reason why these settings would not work here, each a sentence with the setting's name."""
    settings = loaded.settings
    if not settings.destination.url:
        yield "destination.url is not set: nothing can be shipped"
    for name in ("token_file", "ca_file", "client_cert", "client_key"):
        yield from _file_problems(f"destination.{name}", getattr(settings.destination, name))
    if settings.receiver.root:
        for name in ("token_file", "commits_file", "tls_cert", "tls_key", "client_ca"):
            yield from _file_problems(f"receiver.{name}", getattr(settings.receiver, name))
    yield from _spool_problems(Path(settings.spool.root))


def _file_problems(name: str, path: str) -> Iterator[str]:
    if not path:
        return
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            empty = not file.read(1)
    except OSError as error:
        yield f"{name} = {path}: {error.strerror}"
        return
    if empty:
        yield f"{name} = {path}: is empty"
    secret = name in {"destination.token_file", "destination.client_key", "receiver.token_file", "receiver.tls_key"}
    if secret and mode & (stat.S_IRGRP | stat.S_IROTH) & ~stat.S_IRGRP:
        yield f"{name} = {path}: everybody on this host may read it (chmod o-r)"


def _spool_problems(root: Path) -> Iterator[str]:
    devices: dict[int, str] = {}
    for path in (root, *(root / name for name in _SPOOL_DIRECTORIES)):
        try:
            found = path.stat()
        except OSError as error:
            yield f"spool.root: {path}: {error.strerror} (`fastship init {shlex.quote(str(root))}` makes it)"
            if path == root:
                return
            continue
        if not stat.S_ISDIR(found.st_mode):
            yield f"spool.root: {path} is not a directory"
        elif not os.access(path, os.W_OK | os.X_OK):
            yield f"spool.root: {path} cannot be written by this user"
        devices.setdefault(found.st_dev, str(path))
    if len(devices) > 1:
        yield f"spool.root: {' and '.join(devices.values())} are on different file systems, so nothing can be renamed"
