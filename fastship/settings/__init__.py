"""Settings: what can be set, where each value came from, and what is said when one is wrong.

Layers, later ones win: the built-in ``default`` profile, the profile asked for (and what it ``inherits``),
the settings file, ``--set section.key=value``. Sizes read as ``8MiB``, ``64kB`` or a number of bytes, times
as ``30s``, ``500ms``, ``5min``, ``2h``, ``7d`` or a number of seconds; fields of these kinds end in
``_bytes`` and ``_s`` (and ``bandwidth``, bytes a second).

What always holds: a `Settings` value is complete and valid, every section is frozen, and an unknown key, a
wrong type or an impossible value is a `SettingsError` that names the key, the value, what would be right, and
where it was set; for an unknown key the nearest one that exists. What a setting means stands in
``conf/default.toml``, which a test holds equal to the defaults here. Imports only ``errors``; everything above
may import it.
"""

from fastship.settings.layers import SEARCH_PATH, LoadedSettings, find_settings_file, load_layers, profile_names
from fastship.settings.sections import (
    DestinationSettings,
    HostSettings,
    LogSettings,
    PackSettings,
    ReceiverSettings,
    Settings,
    SpoolSettings,
    UploadSettings,
    WorkersSettings,
)
from fastship.settings.units import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "SEARCH_PATH",
    "DestinationSettings",
    "HostSettings",
    "LoadedSettings",
    "LogSettings",
    "PackSettings",
    "ReceiverSettings",
    "Settings",
    "SpoolSettings",
    "UploadSettings",
    "WorkersSettings",
    "find_settings_file",
    "format_duration",
    "format_size",
    "load_layers",
    "parse_duration",
    "parse_size",
    "profile_names",
]
