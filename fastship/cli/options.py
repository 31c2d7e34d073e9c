"""The options that several commands share, and how settings are found for them.

What always holds: ``--quiet``, ``--debug`` and ``--json`` mean the same everywhere, and a command that needs a
setting which is not set says so before it touches anything.

Imports ``settings`` and ``errors``; only ``cli`` imports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec

from fastship.errors import SettingsError
from fastship.settings import SEARCH_PATH, LoadedSettings, find_settings_file, load_layers

Command = Callable[..., Any]

_FILE = f"Settings file.  [default: the first there is of {', '.join(SEARCH_PATH)}]"
_PROFILE = "Start from this profile: default, throughput, balanced, archive, lowmem, ci."


class Invocation(msgspec.Struct):
    """What the flags of this run ask for; click's ``ctx.obj``, read by the handler of errors in ``main``."""

    debug: bool = False  # show a traceback for an unexpected error
    quiet: bool = False  # no progress, no summary: results asked for, warnings and errors only


class SettingsSource(msgspec.Struct, frozen=True):
    """Where this command takes its settings from; `load` reads them."""

    path: str | None
    profile: str | None
    overrides: Sequence[str]

    def load(
        self, *, need: Sequence[str] = (), values: Mapping[str, Mapping[str, Any]] | None = None
    ) -> LoadedSettings:
        """The settings, in which each of ``need`` (``"spool.root"``) is not empty. Raises `SettingsError`."""
        path = self.path if self.path is not None else find_settings_file()
        loaded = load_layers(path, profile=self.profile, overrides=self.overrides, values=values)
        for name in need:
            section, _, key = name.partition(".")
            if not getattr(getattr(loaded.settings, section), key):
                looked = f"in {path}" if path else f"and no settings file was found ({', '.join(SEARCH_PATH)})"
                remedy = f"give -c FILE or --set {name}=VALUE; `fastship init DIR` makes a spool and its settings file"
                raise SettingsError(f"{name} is not set {looked}", remedy=remedy)
        return loaded


def settings_options(command: Command) -> Command:
    """``-c``, ``--profile``, ``--set``; the command gets them as ``source``, a `SettingsSource`."""

    @click.option("-c", "--config", metavar="FILE", help=_FILE)
    @click.option("--profile", metavar="NAME", help=_PROFILE)
    @click.option("--set", "overrides", metavar="SECTION.KEY=VALUE", multiple=True, help="Change one setting.")
    @functools.wraps(command)
    def wrapped(config: str | None, profile: str | None, overrides: tuple[str, ...], **others: Any) -> Any:
        return command(source=SettingsSource(config, profile, overrides), **others)

    return wrapped


def shared_options(command: Command) -> Command:
    """``--quiet`` and ``--debug``; the command gets the `Invocation` as ``invocation``."""

    @click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
    @click.pass_obj
    @functools.wraps(command)
    def wrapped(invocation: Invocation, /, *, quiet: bool, debug: bool, **others: Any) -> Any:
        invocation.quiet = quiet
        invocation.debug = invocation.debug or debug
        return command(invocation=invocation, **others)

    return wrapped


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
