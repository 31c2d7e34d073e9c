"""Reading settings: layers, units, and what is said when a value is wrong."""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from fastship.errors import SettingsError
from fastship.settings.checks import check
from fastship.settings.sections import MAX_DURATION_S, MAX_SIZE, Settings
from fastship.settings.units import format_duration, format_size, parse_duration, parse_size


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
    check(settings, origins)
    return LoadedSettings(settings, origins, file_path)


def profile_names() -> list[str]:
    """The names ``--profile`` takes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _conf().iterdir() if entry.name.endswith(".toml"))


def _conf() -> Any:
    """The folder of profiles: inside the package in a wheel, ``conf/`` beside it in a checkout."""
    packaged = resources.files("fastship") / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


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
    bounds += f" to {show(high)}" if high is not None and high not in (MAX_SIZE, MAX_DURATION_S) else ""
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
