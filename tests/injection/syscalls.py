"""What processes did to their files and said to each other, read from a trace of strace(1).

The trace has all data (as hexadecimal digits, which also keeps every odd name readable), the path of each descriptor
and the ends of each connection. A call is known by the lines on which it was entered and left: what another thread's
``fsync`` covers is what was left before that was entered.
"""

from __future__ import annotations

import binascii
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fsync,fdatasync,rename,renameat,"
    "renameat2,link,linkat,unlink,unlinkat,rmdir,mkdir,mkdirat,sendto"
)
_LINE = re.compile(rb"(\d+) +(?:<\.\.\. (\w+) resumed>(.*)|(\w+)\((.*))", re.DOTALL)
_RETURNED = re.compile(rb"(.*)\) += (-?\d+)(?:<((?:\\x[0-9a-f]{2})*)>)?.*", re.DOTALL)
_HEX = rb"(?:\\x[0-9a-f]{2})*"
_FILE = re.compile(rb"(\d+)<(" + _HEX + rb")>(\(deleted\))?")
_SOCKET = re.compile(rb"(\d+)<TCP(?:v6)?:\[([^\]]*)\]>")
_AT = re.compile(rb"(?:AT_FDCWD|\d+)<(" + _HEX + rb")>")
_STRING = re.compile(rb'"(' + _HEX + rb')"(\.\.\.)?')
_UNFINISHED = b" <unfinished ...>"


class Call(NamedTuple):
    """One system call that succeeded and was about a file below one of the roots, or about a TCP connection."""

    name: str
    begun: int  # the lines of the trace
    ended: int
    thread: int
    result: int
    path: str = ""  # absolute; of a descriptor's file under the name it has now or had last
    other: str = ""  # of rename and link: the new one
    connection: str = ""  # "from->to", as this end sees it
    fd: int = -1  # that it is about, or that it opened
    data: bytes = b""
    offset: int | None = None
    flags: str = ""


def works() -> bool:
    """Whether strace is there and may trace."""
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def strace(trace: Path) -> list[str]:
    """What to put before a command line."""
    options = ["-f", "-qq", "--seccomp-bpf", "-y", "-yy", "-xx", "-s", str(1 << 24), "-e", "signal=none"]
    return ["strace", *options, "-e", f"trace={_CALLS}", "-o", str(trace)]


def read(trace: Path, roots: Iterable[Path]) -> list[Call]:
    """The calls in the order in which they ended. What was under way when the trace ended is not among them."""
    wanted = [_digits(root) for root in roots]
    calls: list[Call] = []
    entered: dict[bytes, tuple[int, bytes]] = {}
    with trace.open("rb") as lines:
        for number, line in enumerate(lines):
            match = _LINE.match(line.rstrip(b"\n"))
            if match is None:
                continue
            thread, resumed, rest, name, begin = match.groups()
            begun = number
            if resumed is not None:
                name, (begun, begin) = resumed, entered.pop(thread, (number, b""))
                begin += rest
            elif begin.endswith(_UNFINISHED):
                entered[thread] = (number, begin.removesuffix(_UNFINISHED))
                continue
            if b"<TCP" in begin[:20] or any(root in begin for root in wanted):
                calls += _read(name.decode(), begun, number, int(thread), begin)
    return calls


def _read(name: str, begun: int, ended: int, thread: int, text: bytes) -> Iterator[Call]:
    returned = _RETURNED.fullmatch(text)
    if returned is None or int(returned[2]) < 0:
        return
    told, result = returned[1], int(returned[2])
    socket = _SOCKET.match(told)
    strings = [_text(digits, rest) for digits, rest in _STRING.findall(told)]
    call = Call(name, begun, ended, thread, result)
    if socket is not None:
        if name in ("write", "writev", "sendto"):
            yield call._replace(fd=int(socket[1]), connection=socket[2].decode(), data=b"".join(strings)[:result])
    elif name in ("open", "openat", "creat"):
        if returned[3]:
            flags = next((word.decode() for word in told.split(b", ") if word.startswith(b"O_")), "O_CREAT|O_TRUNC")
            yield call._replace(path=_name(returned[3]), fd=result, flags=flags)
    elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
        old, new = _two_paths(told, strings)
        yield call._replace(name=name.removesuffix("2").removesuffix("at"), path=old, other=new)
    elif name in ("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"):
        kind = "rmdir" if b"AT_REMOVEDIR" in told else name.removesuffix("at")
        yield call._replace(name=kind, path=_path(_AT.match(told), strings[0]))
    elif (file := _FILE.match(told)) is not None:
        call = call._replace(fd=int(file[1]), path=_name(file[2]))
        if name in ("fsync", "fdatasync"):
            yield call
        elif name == "ftruncate":
            yield call._replace(offset=int(told.rpartition(b", ")[2]))
        elif name.startswith(("write", "pwrite")):
            words = told.split(b", ")
            at = None if name.startswith("write") else int(words[-2 if name == "pwritev2" else -1])
            yield call._replace(data=b"".join(strings)[:result], offset=at)


def _two_paths(told: bytes, strings: list[bytes]) -> tuple[str, str]:
    above = list(_AT.finditer(told))
    first, second = (above[0], above[1]) if len(above) == 2 else (None, None)
    return _path(first, strings[0]), _path(second, strings[1])


def _path(above: re.Match[bytes] | None, name: bytes) -> str:
    path = name.decode(errors="surrogateescape")
    return path if path.startswith("/") or above is None else f"{_name(above[1])}/{path}"


def _name(digits: bytes) -> str:
    return _text(digits).decode(errors="surrogateescape").removesuffix(" (deleted)")


def _text(digits: bytes, rest: bytes = b"") -> bytes:
    assert not rest, "the trace has not all of the data"
    return binascii.unhexlify(digits.replace(b"\\x", b""))


def _digits(path: Path) -> bytes:
    return b"".join(b"\\x%02x" % byte for byte in bytes(path))
