"""Settings: what can be set, where each value came from, and what is said when one is wrong.

Layers, later ones win: the built-in ``default`` profile, the profile asked for (and what it ``inherits``),
the settings file, ``--set section.key=value``. Sizes read as ``8MiB``, ``64kB`` or a number of bytes, times
as ``30s``, ``500ms``, ``5min``, ``2h``, ``7d`` or a number of seconds; fields of these kinds end in
``_bytes`` and ``_s`` (and ``bandwidth``, bytes a second).

What always holds: a `Settings` value is complete and valid, every section is frozen, and an unknown key, a
wrong type or an impossible value is a `SettingsError` that names the key, where it was set, and the nearest
key that exists. Imports only ``errors``; everything above may import it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from fastship.errors import SettingsError

Size = Annotated[int, msgspec.Meta(ge=0, extra={"kind": "size"})]
"""Bytes."""
Duration = Annotated[float, msgspec.Meta(ge=0, extra={"kind": "duration"})]
"""Seconds."""
Count = Annotated[int, msgspec.Meta(ge=0)]
File = Annotated[str, msgspec.Meta(extra={"kind": "path"})]
"""A path; ``~`` is the home directory, a relative one is relative to the settings file. ``""``: not set."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class SpoolSettings(Section):
    root: File = ""  # must be set; holds episodes/ outbox/ shipped/ quarantine/ on one file system
    scan_interval_s: Duration = 10.0
    order: Literal["name", "oldest", "newest"] = "name"


class DestinationSettings(Section):
    url: str = ""  # must be set to ship, e.g. https://receiver.example:8443
    token_file: File = ""
    commit_field: str = "X-Cis490-Code-Commit"
    ca_file: File = ""
    client_cert: File = ""
    client_key: File = ""
    proof: Literal["receipt", "status"] = "receipt"
    pause_min_s: Duration = 5.0
    pause_max_s: Duration = 300.0
    pause_after: Annotated[int, msgspec.Meta(ge=1)] = 3


class PackSettings(Section):
    level: Annotated[int, msgspec.Meta(ge=-7, le=22)] = 3
    frame_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30, extra={"kind": "size"})] = 8 << 20
    threads: Count = 0
    owner: Literal["keep", "zero"] = "keep"


class WorkersSettings(Section):
    count: Count = 0
    heartbeat_timeout_s: Duration = 30.0
    drain_timeout_s: Duration = 60.0
    poison_after: Annotated[int, msgspec.Meta(ge=1)] = 3


class UploadSettings(Section):
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    bandwidth: Size = 0
    one_shot_bytes: Size = 4 << 20
    connect_timeout_s: Duration = 10.0
    stall_timeout_s: Duration = 30.0
    answer_timeout_s: Duration = 120.0
    retries: Count = 5
    retry_min_s: Duration = 0.5
    retry_max_s: Duration = 30.0


class RetentionSettings(Section):
    quarantine_keep_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    quarantine_cleanup_interval_s: Duration = 3600.0


class ReceiverSettings(Section):
    root: File = ""
    listen: str = "127.0.0.1:8490"
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    token_file: File = ""
    commits_file: File = ""
    commit_field: str = "X-Cis490-Code-Commit"
    tls_cert: File = ""
    tls_key: File = ""
    client_ca: File = ""
    verify: Literal["content", "artifact"] = "content"
    max_bytes: Size = 0
    reserve_bytes: Size = 512 << 20
    sync_bytes: Annotated[int, msgspec.Meta(ge=1 << 16, extra={"kind": "size"})] = 32 << 20
    upload_max_age_s: Duration = 7 * 86400.0
    max_requests: Annotated[int, msgspec.Meta(ge=1)] = 256


class LogSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Settings(Section):
    """All sections. ``Settings.load()`` is how one is made; ``Settings()`` alone has no spool and no destination."""

    spool: SpoolSettings = SpoolSettings()
    destination: DestinationSettings = DestinationSettings()
    pack: PackSettings = PackSettings()
    workers: WorkersSettings = WorkersSettings()
    upload: UploadSettings = UploadSettings()
    retention: RetentionSettings = RetentionSettings()
    receiver: ReceiverSettings = ReceiverSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def load(
        cls,
        path: Path | str | None = None,
        *,
        profile: str | None = None,
        overrides: Iterable[str] = (),
        values: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Settings:
        """Settings from a file (None: from none), a profile's name, ``section.key=value`` texts and plain values.

        Raises `SettingsError`. ``values`` is for programs: ``{"spool": {"root": "/data"}}``, the last layer.
        """
        return load_layers(path, profile=profile, overrides=overrides, values=values).settings


class LoadedSettings(msgspec.Struct, frozen=True):
    """Settings with the place each value came from: ``origins["pack.level"] == "profile archive"``."""

    settings: Settings
    origins: dict[str, str]
    path: Path | None


SEARCH_PATH = ("./fastship.toml", "$FASTSHIP_CONFIG", "/etc/fastship/fastship.toml")


def find_settings_file() -> Path | None:
    """The first of `SEARCH_PATH` that exists; a set ``$FASTSHIP_CONFIG`` that does not is a `SettingsError`."""
    if Path("fastship.toml").is_file():
        return Path("fastship.toml")
    named = os.environ.get("FASTSHIP_CONFIG", "")
    if named:
        if not Path(named).is_file():
            raise SettingsError(f"$FASTSHIP_CONFIG names {named}, which is not a file", remedy="correct or unset it")
        return Path(named)
    system = Path("/etc/fastship/fastship.toml")
    return system if system.is_file() else None


def load_layers(
    path: Path | str | None,
    *,
    profile: str | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Mapping[str, Any]] | None = None,
) -> LoadedSettings:
    """As `Settings.load`, with the origins."""
    file_layer: dict[str, Any] = {}
    file_path = Path(path) if path is not None else None
    if file_path is not None:
        file_layer = _read_toml(file_path)
    named = file_layer.pop("profile", None)
    if named is not None and not isinstance(named, str):
        raise SettingsError(f"{file_path}: profile must be a name in quotes", remedy=f"one of {profile_names()}")
    layers = [(f"profile {name}", layer, None) for name, layer in _profile_chain(profile or named or "default")]
    if file_path is not None:
        layers.append((str(file_path), file_layer, file_path.absolute().parent))
    for text in overrides:
        layers.append((f"--set {text}", _parse_override(text), None))
    if values:
        layers.append(("the caller", {name: dict(section) for name, section in values.items()}, None))

    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for origin, layer, base in layers:
        for section, keys in layer.items():
            kinds = _section_kinds(section, origin)
            if not isinstance(keys, dict):
                raise SettingsError(f"{origin}: {section} must be a section: [{section}]")
            for key, raw in keys.items():
                if key not in kinds:
                    raise _unknown(f"{section}.{key}", origin, [f"{section}.{known}" for known in kinds])
                merged.setdefault(section, {})[key] = _read_value(raw, kinds[key], f"{section}.{key}", origin, base)
                origins[f"{section}.{key}"] = origin
    try:
        settings = msgspec.convert(merged, Settings)
    except msgspec.ValidationError as error:
        raise _invalid(error, origins) from None
    for section in Settings.__struct_fields__:
        for key in _section_kinds(section, ""):
            origins.setdefault(f"{section}.{key}", "built in")
    _check(settings, origins)
    return LoadedSettings(settings, origins, file_path)


def profile_names() -> list[str]:
    """The names ``--profile`` takes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _conf().iterdir() if entry.name.endswith(".toml"))


def format_size(size: int) -> str:
    """``8388608`` -> ``8MiB``: the shortest exact form that `Settings.load` reads back."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def parse_size(text: str) -> int:
    """``8MiB`` -> 8388608; decimal units are powers of 1000. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)(B?)(?:/s)?\s*", text)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size; write for example 8MiB, 500kB or a number of bytes")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


_TIME_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """``30s`` -> 30.0. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|h|d)?\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a time; write for example 30s, 500ms, 5min, 2h or 7d")
    return float(match[1]) * _TIME_UNITS[match[2] or "s"]


def _conf() -> Any:
    """The folder of profiles: inside the package in a wheel, ``conf/`` beside it in a checkout."""
    packaged = resources.files("fastship") / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file", remedy="make one with: fastship init DIR") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


def _profile_chain(name: str) -> Sequence[tuple[str, dict[str, Any]]]:
    """The profile and all it inherits, the deepest first; every chain ends in ``default``."""
    chain: list[tuple[str, dict[str, Any]]] = []
    while True:
        if any(name == seen for seen, _ in chain):
            raise SettingsError(f"profile {name} inherits itself")
        if name not in profile_names():
            raise _unknown(name, "--profile", profile_names(), what="profile")
        layer = tomllib.loads((_conf() / f"{name}.toml").read_text(encoding="utf-8"))
        parent = layer.pop("inherits", "default")
        chain.insert(0, (name, layer))
        if name == "default":
            return chain
        name = parent


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise SettingsError(f"--set {text}: not of the form section.key=value", remedy="e.g. --set pack.level=6")
    try:
        value: Any = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word: --set spool.root=/data
    return {section: {name: value}}


def _section_kinds(section: str, origin: str) -> dict[str, str]:
    """The keys of a section, each with its kind: ``size``, ``duration``, ``path`` or ``""``."""
    hints = get_type_hints(Settings)
    if section not in hints:
        raise _unknown(section, origin, list(hints), what="section")
    kinds = {}
    for key, hint in get_type_hints(hints[section], include_extras=True).items():
        metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
        kinds[key] = next((str(meta.extra["kind"]) for meta in metas if meta.extra), "")
    return kinds


def _read_value(raw: Any, kind: str, key: str, origin: str, base: Path | None) -> Any:
    try:
        if kind == "size" and isinstance(raw, str):
            return parse_size(raw)
        if kind == "duration" and isinstance(raw, str):
            return parse_duration(raw)
    except ValueError as error:
        raise SettingsError(f"{key}: {error} ({origin})") from None
    if kind == "path" and isinstance(raw, str | os.PathLike) and str(raw):
        path = Path(raw).expanduser()
        return str(path if base is None or path.is_absolute() else base / path)
    return raw


def _unknown(key: str, origin: str, known: Sequence[str], what: str = "setting") -> SettingsError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return SettingsError(f"unknown {what} {key} ({origin})", remedy=remedy)


def _invalid(error: msgspec.ValidationError, origins: Mapping[str, str]) -> SettingsError:
    text, _, path = str(error).partition(" - at `$.")
    key = path.rstrip("`")
    return SettingsError(f"{key}: {text} ({origins.get(key, 'settings')})")


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    """What no type can say: combinations."""
    destination = settings.destination
    if destination.url and not re.match(r"https?://[^/\s]+", destination.url):
        raise SettingsError(
            f"destination.url: {destination.url!r} is not an http or https URL ({origins['destination.url']})",
            remedy="e.g. https://receiver.example:8443",
        )
    if bool(destination.client_cert) != bool(destination.client_key):
        raise SettingsError("destination.client_cert and destination.client_key must be set together")
    for name, value in (
        ("destination.commit_field", destination.commit_field),
        ("receiver.commit_field", settings.receiver.commit_field),
    ):
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
            raise SettingsError(f"{name}: {value!r} is not an HTTP field name ({origins[name]})")
    if destination.pause_max_s < destination.pause_min_s:
        raise SettingsError("destination.pause_max_s is smaller than destination.pause_min_s")
    if bool(settings.receiver.tls_cert) != bool(settings.receiver.tls_key):
        raise SettingsError("receiver.tls_cert and receiver.tls_key must be set together")
