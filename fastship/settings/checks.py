"""What no type can say of settings: the form of some texts, and combinations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fastship.errors import SettingsError
from fastship.settings.sections import Settings
from fastship.settings.units import format_duration

_FIELD_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2 token
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):([0-9]{1,5})")


def check(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raises `SettingsError` that names the key, its value, and where it was set (``origins``)."""
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
