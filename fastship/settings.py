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

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from fastship.errors import SettingsError

_MAX_SIZE = 1 << 60  # far beyond any disk, and still an int64 for libcurl
_MAX_DURATION_S = 10 * 366 * 86400.0  # ten years: more overflows the timeouts of select(2) and friends for nothing

Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE, extra={"kind": "size"})]
"""Bytes."""
Duration = Annotated[float, msgspec.Meta(ge=0, le=_MAX_DURATION_S, extra={"kind": "duration"})]
"""Seconds."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
File = Annotated[str, msgspec.Meta(extra={"kind": "path"})]
"""A path; ``~`` is the home directory, a relative one is relative to the settings file. ``""``: not set."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class SpoolSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    root: File = ""  # must be set; holds episodes/ outbox/ shipped/ quarantine/ on one file system
    scan_interval_s: Duration = 10.0
    order: Literal["name", "oldest", "newest"] = "name"


class DestinationSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


Level = Annotated[int, msgspec.Meta(ge=-7, le=22)]


class PackSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Level | Literal["auto"] = "auto"
    level_min: Level = 1
    level_max: Level = 9
    frame_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30, extra={"kind": "size"})] = 8 << 20
    threads: Count = 0
    owner: Literal["keep", "zero"] = "keep"
    page_cache: Literal["as-found", "keep", "drop"] = "as-found"


class WorkersSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Count = 0
    heartbeat_timeout_s: Duration = 30.0
    drain_timeout_s: Duration = 60.0
    poison_after: Annotated[int, msgspec.Meta(ge=1)] = 3


class UploadSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    bandwidth: Size = 0
    one_shot_bytes: Size = 4 << 20
    stream_bytes: Size = 8 << 20
    connect_timeout_s: Duration = 10.0
    stall_timeout_s: Duration = 30.0
    answer_timeout_s: Duration = 120.0
    retries: Count = 5
    retry_min_s: Duration = 0.5
    retry_max_s: Duration = 30.0


class HostSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    io_class: Literal["none", "best-effort", "idle"] = "best-effort"
    io_priority: Annotated[int, msgspec.Meta(ge=0, le=7)] = 7
    reserved_cores: Count = 0
    memory_limit_bytes: Size = 0
    give_way: bool = True
    pause_max_s: Duration = 600.0
    memory_pressure_limit: Percent = 10.0
    io_pressure_limit: Percent = 0.0
    load_limit: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class RetentionSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    quarantine_keep_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    quarantine_cleanup_interval_s: Duration = 3600.0


class ReceiverSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class LogSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Settings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All sections. ``Settings.load()`` is how one is made; ``Settings()`` alone has no spool and no destination."""

    spool: SpoolSettings = SpoolSettings()
    destination: DestinationSettings = DestinationSettings()
    pack: PackSettings = PackSettings()
    workers: WorkersSettings = WorkersSettings()
    upload: UploadSettings = UploadSettings()
    host: HostSettings = HostSettings()
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

    here = Path.cwd()
    layers: list[tuple[str, dict[str, Any], Path]] = []
    asked_by = "--profile" if profile else str(file_path)
    for name, layer in _profile_chain(profile or named or "default", asked_by):
        layers.append((f"profile {name}", layer, here))
    if file_path is not None:
        layers.append((str(file_path), file_layer, file_path.absolute().parent))
    for text in overrides:
        layers.append((f"--set {text}", _parse_override(text), here))
    if values:
        layers.append(("given directly", {name: dict(section) for name, section in values.items()}, here))

    merged: dict[str, dict[str, Any]] = {}
    origins = {f"{section}.{key}": "built in" for section, keys in _catalogue().items() for key in keys}
    for origin, layer, base in layers:
        for section, keys in layer.items():
            if section not in _catalogue():
                raise _unknown(section, origin, list(_catalogue()), what="section")
            if not isinstance(keys, dict):
                raise SettingsError(f"{section} is a section, not a value ({origin})", remedy=f"write [{section}]")
            known = _catalogue()[section]
            for key, raw in keys.items():
                if key not in known:
                    raise _unknown(f"{section}.{key}", origin, [f"{section}.{name}" for name in known])
                value = _read_value(raw, known[key], base, f"{section}.{key}", origin)
                merged.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = origin
    settings = msgspec.convert(merged, Settings)
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


def format_duration(seconds: float) -> str:
    """``300.0`` -> ``5min``: the shortest exact form that `Settings.load` reads back."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds and seconds % factor == 0:
            return f"{seconds // factor:.0f}{unit}"
    if 0 < seconds < 1 and (seconds * 1000).is_integer():
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.12g}s"


def parse_size(text: str) -> int:
    """``8MiB`` -> 8388608; decimal units are powers of 1000, ``/s`` may follow. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kKMGT]?)(i?)(B?)(?:/s)?\s*", text)
    if not match or (match[3] and not match[2]):
        raise ValueError("8MiB, 500kB")
    number = Decimal(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    if 0 < number < 1:  # would silently become 0, which often means "no limit"
        raise ValueError("8MiB, 500kB")
    return int(number)


_TIME_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """``30s`` -> 30.0. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(ms|s|min|h|d)?\s*", text)
    if not match:
        raise ValueError("30s, 500ms, 5min, 2h, 7d")
    return float(match[1]) * _TIME_UNITS[match[2] or "s"]


def _conf() -> Any:
    """The folder of profiles: inside the package in a wheel, ``conf/`` beside it in a checkout."""
    packaged = resources.files("fastship") / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a BOM
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file", remedy="make one with: fastship init DIR") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path}: not valid TOML: {error}", remedy='text, sizes and times stand in quotes: frame_bytes = "8MiB"'
        ) from None


def _profile_chain(name: str, asked_by: str) -> Sequence[tuple[str, dict[str, Any]]]:
    """The profile and all it inherits, the deepest first; every chain ends in ``default``."""
    chain: list[tuple[str, dict[str, Any]]] = []
    while True:
        if any(name == seen for seen, _ in chain):
            raise SettingsError(f"profile {name} inherits itself")
        if name not in profile_names():
            raise _unknown(name, asked_by, profile_names(), what="profile")
        layer = tomllib.loads((_conf() / f"{name}.toml").read_text(encoding="utf-8"))
        parent = layer.pop("inherits", "default")
        chain.insert(0, (name, layer))
        if name == "default":
            return chain
        name, asked_by = parent, f"profile {name}"


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not section or not name:
        raise SettingsError(f"--set {text}: not of the form section.key=value", remedy="e.g. --set pack.level=6")
    known = _catalogue().get(section, {}).get(name)
    value: Any = raw.strip()
    if known is not None and known.type_name == "text" and not value.startswith(('"', "'")):
        return {section: {name: value}}  # a bare word, even one of digits: --set spool.root=/data
    try:
        parsed = tomllib.loads(f"v = {raw}")
        value = parsed["v"] if len(parsed) == 1 else value
    except tomllib.TOMLDecodeError:
        pass  # a size or a time without quotes
    return {section: {name: value}}


class _Key(msgspec.Struct, frozen=True):
    """What is to be known of one setting to read it: from its annotation, nowhere else."""

    hint: Any
    kind: str  # "size", "duration", "path" or ""
    type_name: str  # "text", "number" or "flag"
    expected: str  # for people: "a size from 4KiB to 1GiB"


@functools.cache
def _catalogue() -> dict[str, dict[str, _Key]]:
    """Every section's settings, in the order of the classes."""
    return {
        section: {key: _key(hint) for key, hint in get_type_hints(kind, include_extras=True).items()}
        for section, kind in get_type_hints(Settings).items()
    }


def _key(hint: Any) -> _Key:
    if get_origin(hint) in (Union, UnionType):  # a number, or one of some words
        number, words = (_key(part) for part in get_args(hint))
        return _Key(
            hint, number.kind, number.type_name, f"{number.expected} or {words.expected.removeprefix('one of ')}"
        )
    meta = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, msgspec.Meta)), msgspec.Meta())
    kind = str((meta.extra or {}).get("kind", ""))
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(base) is Literal:
        return _Key(hint, kind, "text", "one of " + ", ".join(f'"{choice}"' for choice in get_args(base)))
    if base is bool:
        return _Key(hint, kind, "flag", "true or false")
    if base is str:
        return _Key(hint, kind, "text", "a path in quotes" if kind == "path" else "a text in quotes")
    what = {"size": "a size like 8MiB", "duration": "a time like 30s"}.get(kind) or (
        "a whole number" if base is int else "a number"
    )
    show: Callable[[Any], str] = {"size": format_size, "duration": format_duration}.get(kind, str)
    low, high = meta.ge, meta.le
    bounds = f" from {show(low)}" if low is not None else ""
    bounds += f" to {show(high)}" if high is not None and high not in (_MAX_SIZE, _MAX_DURATION_S) else ""
    return _Key(hint, kind, "number", what + bounds)


def _read_value(raw: Any, known: _Key, base: Path, key: str, origin: str) -> Any:
    """``raw`` as the setting's own type: units read, paths made absolute, bounds checked."""
    value = raw
    try:
        if known.kind == "size" and isinstance(raw, str):
            value = parse_size(raw)
        elif known.kind == "duration" and isinstance(raw, str):
            value = parse_duration(raw)
        elif known.kind == "path" and isinstance(raw, str | os.PathLike) and str(raw):
            if "\0" in str(raw):
                raise ValueError("a path without NUL")
            value = str(base / Path(raw).expanduser())
        return msgspec.convert(value, known.hint)
    except (ValueError, RuntimeError):  # RuntimeError: a ~user that does not exist
        shown = f'"{raw}"' if isinstance(raw, str | os.PathLike) else raw
        raise SettingsError(
            f"{key} = {shown} ({origin}) is not {known.expected}", remedy=f"set {key} to {known.expected}"
        ) from None


def _unknown(name: str, origin: str, known: Sequence[str], what: str = "setting") -> SettingsError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return SettingsError(f"unknown {what} {name} ({origin})", remedy=remedy)


_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2 token
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):([0-9]{1,5})")


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    """What no type can say: the form of some texts, and combinations."""
    destination, receiver = settings.destination, settings.receiver

    def refuse(key: str, problem: str, remedy: str) -> SettingsError:
        return SettingsError(f"{key} {problem} ({origins[key]})", remedy=remedy)

    if destination.url:
        shown = re.sub(r"//[^/@]*@", "//...@", destination.url)  # never a password in a log
        if not re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", destination.url):
            example = "write it as https://receiver.example:8443, without ? and #"
            raise refuse("destination.url", f'= "{shown}" is not an http or https URL', example)
        if shown != destination.url:
            raise refuse(
                "destination.url", f'= "{shown}" has a password in it', "put a token into destination.token_file"
            )
    for key, name in (
        ("destination.commit_field", destination.commit_field),
        ("receiver.commit_field", receiver.commit_field),
    ):
        if not _FIELD_NAME.fullmatch(name):
            raise refuse(key, f'= "{name}" is not an HTTP field name', "letters, digits and - only")
    match = _LISTEN.fullmatch(receiver.listen)
    if not match or int(match[2]) > 65535:
        remedy = "write HOST:PORT, e.g. 127.0.0.1:8490, [::1]:8490, or port 0 for a free one"
        raise refuse("receiver.listen", f'= "{receiver.listen}" is not an address', remedy)
    _check_pairs(settings, refuse)


def _check_pairs(settings: Settings, refuse: Callable[[str, str, str], SettingsError]) -> None:
    destination, receiver, upload, pack = settings.destination, settings.receiver, settings.upload, settings.pack
    if pack.level_min > pack.level_max:
        raise refuse(
            "pack.level_max", f"= {pack.level_max} is less than pack.level_min", "raise it or lower pack.level_min"
        )
    for first, second, pair in (
        ("destination.client_cert", "destination.client_key", (destination.client_cert, destination.client_key)),
        ("receiver.tls_cert", "receiver.tls_key", (receiver.tls_cert, receiver.tls_key)),
    ):
        if bool(pair[0]) != bool(pair[1]):
            given, missing = (first, second) if pair[0] else (second, first)
            raise refuse(given, f"is set without {missing}", "set both or neither")
    for smaller, larger, values in (
        ("destination.pause_min_s", "destination.pause_max_s", (destination.pause_min_s, destination.pause_max_s)),
        ("upload.retry_min_s", "upload.retry_max_s", (upload.retry_min_s, upload.retry_max_s)),
    ):
        if values[0] > values[1]:
            raise refuse(
                larger, f"= {format_duration(values[1])} is less than {smaller}", f"raise it or lower {smaller}"
            )
