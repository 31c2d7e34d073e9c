"""What the command line prints: amounts, names, tables and JSON, on standard output and nothing else.

What always holds: text that came from elsewhere (names on disk, a receiver's answer) cannot move the cursor or
colour the terminal, because control characters are shown as escapes; JSON is pure ASCII and one document; on a
pipe nothing is cut to a width.

Imports ``errors``; only ``cli`` imports it. rich is loaded only when a table goes to a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from fastship.errors import OutputError


def format_bytes(size: float) -> str:
    """``12345678`` -> ``12.3 MB``: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_rate(size: float, seconds: float) -> str:
    """Megabytes a second of ``size`` bytes in ``seconds``; ``-`` when it says nothing yet."""
    return f"{size / seconds / 1e6:.1f} MB/s" if seconds > 0 and size > 0 else "-"


def format_ratio(bytes_in: float, bytes_out: float) -> str:
    """How many times smaller it became: ``4.10``; ``-`` when nothing went out."""
    return f"{bytes_in / bytes_out:.2f}" if bytes_out else "-"


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``0.25`` -> ``0.25 s``, ``200000`` -> ``2 d 7 h``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def printable(text: str | bytes) -> str:
    """``text`` on one line with every control character as an escape and undecodable bytes as ``\\377``.

    The quoting of GNU tar's listing (``--quoting-style=escape``); a backslash is doubled so that it is reversible.
    """
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    return "".join(map(_printable_character, text))


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _printable_character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if "\udc80" <= character <= "\udcff":  # a byte that os.fsdecode could not decode (PEP 383)
        return f"\\{ord(character) - 0xDC00:03o}"
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}:  # controls, also of writing direction
        return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogatepass"))
    return character


def printable_lines(text: str) -> str:
    """As `printable`, but lines stay lines: for an answer's body or a remediation."""
    return "\n".join(printable(line).replace("\\\\", "\\").replace("\\t", "\t") for line in text.splitlines())


def write_json(value: Any) -> None:
    """One JSON document of msgspec structs and plain values on standard output."""
    with _written():
        json.dump(msgspec.to_builtins(value), sys.stdout, indent=2)
        sys.stdout.write("\n")


def write_line(text: str = "") -> None:
    """One line on standard output; what the terminal's encoding cannot show becomes an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    with _written():
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """What the disk or the terminal says is about standard output: raises `OutputError`, but for a pipe's end."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_error(error) from None


def output_error(error: OSError | ValueError) -> OutputError:
    """What it means that standard output cannot be written."""
    why = getattr(error, "strerror", "") or error
    remedy = "what was asked for is done, but its result is not told; free space where that goes"
    return OutputError(f"standard output cannot be written: {why}", remedy=remedy)


def write_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """A table with columns ``right`` aligned right: folded to a terminal's width, never cut on a pipe
    or on a terminal too narrow to fold it for.

    Cells are shown through `printable_lines`.
    """
    cells = [[printable_lines(cell) for cell in row] for row in rows]
    flat = [[cell.replace("\n", " ") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(headings, *flat, strict=True)]
    # What cannot be folded, and a little of the rest: on a terminal narrower than that, columns would vanish.
    least = sum(width if number in right else min(width, 12) for number, width in enumerate(widths)) + 2 * len(widths)
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= least:
        _write_rich_table(headings, cells, right)
        return
    for row in (headings, *flat):
        padded = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        write_line("  ".join(padded).rstrip())


def _write_rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout, highlight=False).print(table)
