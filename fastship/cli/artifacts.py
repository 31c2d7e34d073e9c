"""``pack``, ``ls`` and ``extract``: artifacts by hand, without a spool or a receiver.

What always holds: a file gets its name only when it is whole (it grows as ``FILE.partial``); nothing that exists
is replaced without ``--force``; standard input and output are only used when ``-`` says so.

Imports ``pack`` and ``frames`` when a command runs; only ``cli`` imports it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from fastship.cli.newfile import new_file, require_absent
from fastship.cli.options import Invocation, SettingsSource, json_option, settings_options, shared_options
from fastship.cli.output import (
    format_bytes,
    format_rate,
    format_ratio,
    format_seconds,
    printable,
    write_json,
    write_line,
)
from fastship.errors import OutboxFull, UsageError

if TYPE_CHECKING:
    from fastship.frames import Member

_MEASURE_LIMIT_BYTES = 1 << 60


@click.command(short_help="Pack a directory into an artifact.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="FILE", required=True, help="The artifact to write; - for standard output.")
@click.option("--level", metavar="N", type=click.IntRange(-7, 22), help="zstd level; as --set pack.level=N.")
@click.option("--threads", metavar="N", type=click.IntRange(0), help="Cores; 0 = all; as --set pack.threads=N.")
@click.option("-f", "--force", is_flag=True, help="Replace FILE.")
@json_option
@settings_options
@shared_options
def pack(
    invocation: Invocation,
    source: SettingsSource,
    directory: Path,
    output: str,
    level: int | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Pack the directory DIR into one artifact (.tar.zst), which zstd and tar read as well."""
    asked = {key: value for key, value in (("level", level), ("threads", threads)) if value is not None}
    settings = source.load(values={"pack": asked}).settings.pack
    if as_json and output == "-":
        raise UsageError("--json and -o - both want standard output", remedy="-o FILE")
    episode = _existing_directory(directory)

    from fastship.frames import FramePool
    from fastship.pack import PackOptions, level_without_link, measure
    from fastship.pack import pack as pack_episode

    fixed = level_without_link(settings.level_min, settings.level_max) if settings.level == "auto" else settings.level
    options = PackOptions(
        level=fixed,
        frame_bytes=settings.frame_bytes,
        owner=settings.owner,
        page_cache=settings.page_cache,
    )
    cores = settings.threads or len(os.sched_getaffinity(0))
    show_progress = not invocation.quiet and sys.stderr.isatty()
    total = measure(episode, _MEASURE_LIMIT_BYTES).bytes if show_progress else 0
    with (
        _output_file(output, episode, force=force) as sink,
        _byte_progress(episode.name, total, quiet=invocation.quiet) as progress,
        FramePool(cores) as pool,
    ):
        try:
            manifest = pack_episode(episode, sink, options, pool, progress)
        except OutboxFull as error:
            raise OutboxFull(error.message, remedy="free space there, or -o a FILE elsewhere") from None
    if as_json:
        write_json(
            {
                "episode": manifest.episode,
                "artifact": {"sha256": manifest.artifact_sha256, "bytes": manifest.artifact_bytes},
                "content": {
                    "blake3": manifest.content_blake3,
                    "bytes": manifest.content_bytes,
                    "members": manifest.members,
                },
                "frames": manifest.frames,
                "frame_bytes": manifest.frame_bytes,
                "levels": manifest.levels,
                "skipped": [printable(name) for name in manifest.skipped],
                "seconds": manifest.seconds,
                "cpu_seconds": manifest.cpu_seconds,
            }
        )
        return
    for name in manifest.skipped:
        click.echo(f"fastship: left out, as it is a socket: {printable(name)}", err=True)
    if not invocation.quiet:
        sizes = f"{format_bytes(manifest.content_bytes)} -> {format_bytes(manifest.artifact_bytes)}"
        ratio = format_ratio(manifest.content_bytes, manifest.artifact_bytes)
        rate = format_rate(manifest.content_bytes, manifest.seconds)
        click.echo(
            f"packed {_members(manifest.members)}: {sizes} ({ratio}x) in {format_seconds(manifest.seconds)}, {rate}",
            err=True,
        )


@click.command(short_help="List an artifact's members.")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-l", "--long", "as_long", is_flag=True, help="With kind, mode, owner, size and time.")
@json_option
@shared_options
def ls(invocation: Invocation, file: Path, as_long: bool, as_json: bool) -> None:  # noqa: ARG001 - same flags everywhere
    """List the members of the artifact FILE. Control characters and undecodable bytes show as escapes."""
    from fastship.frames import ArtifactReader

    with ArtifactReader.open(_existing_file(file)) as reader:
        if as_json:
            write_json([_member_json(member) for member in reader.members()])
            return
        for member in reader.members():
            write_line(_long_line(member) if as_long else printable(member.name))


@click.command(short_help="Extract an artifact, or members of it.")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("members", metavar="[MEMBER]...", nargs=-1)
@click.option(
    "-C", "--directory", "target", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Into DIR."
)
@json_option
@shared_options
def extract(invocation: Invocation, file: Path, members: tuple[str, ...], target: Path, as_json: bool) -> None:
    """Extract the artifact FILE, or only MEMBER (a directory with all below it), into DIR.

    Every frame read is verified; nothing is written outside DIR and nothing in it is overwritten.
    """
    from fastship.frames import ArtifactReader
    from fastship.pack import extract as extract_members

    started = time.monotonic()
    _existing_file(file)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror}", remedy="-C takes a directory that you may write") from None
    with ArtifactReader.open(file) as reader:
        total = 0 if members else reader.content_bytes or 0
        with _byte_progress(file.name, total, quiet=invocation.quiet) as progress:
            result = extract_members(reader, target, members, progress, threads=len(os.sched_getaffinity(0)))
    seconds = time.monotonic() - started
    if as_json:
        skipped = [printable(name) for name in result.skipped]
        write_json({"members": result.members, "bytes": result.bytes, "skipped": skipped, "seconds": seconds})
        return
    for name in result.skipped:
        click.echo(f"fastship: left out, as it is a device: {printable(name)}", err=True)
    if not invocation.quiet:
        told = f"extracted {_members(result.members)}, {format_bytes(result.bytes)}, into {printable(str(target))}"
        click.echo(f"{told} in {format_seconds(seconds)}, {format_rate(result.bytes, seconds)}", err=True)


def _members(count: int) -> str:
    return "1 member" if count == 1 else f"{count} members"


def _existing_directory(directory: Path) -> Path:
    """DIR as an absolute path with a name of its own, so that ``.`` packs under the directory's real name."""
    try:
        resolved = directory.resolve(strict=True)
        is_directory = stat.S_ISDIR(resolved.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{directory}: {getattr(error, 'strerror', None) or error}", remedy="DIR is what to pack"
        ) from None
    if not is_directory:
        raise UsageError(f"{directory} is not a directory", remedy="DIR is what to pack")
    if not resolved.name:
        raise UsageError("/ has no name to pack it under", remedy="pack the directories in it")
    return resolved


def _existing_file(file: Path) -> Path:
    try:
        kind = file.stat().st_mode
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", remedy="FILE is an artifact, something.tar.zst") from None
    if stat.S_ISDIR(kind):
        raise UsageError(f"{file} is a directory", remedy="FILE is an artifact, something.tar.zst")
    return file


@contextlib.contextmanager
def _output_file(output: str, episode: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Where the artifact goes; a file appears under its name only when the body ended well. Raises `UsageError`."""
    if output == "-":
        if sys.stdout.isatty():
            raise UsageError("an artifact is not written to a terminal", remedy="-o FILE, or pipe it: -o - | ...")
        sys.stdout.flush()
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as sink:
            yield _WholeWrites(sink)  # type: ignore[misc]
        return
    if not output or output.endswith("/") or Path(output).is_dir():
        raise UsageError(
            f"{output or 'the empty name'} is {'a directory' if output else 'no FILE'}",
            remedy=f"-o {Path(output or '.') / (episode.name + '.tar.zst')}",
        )
    path = Path(output)
    with _output_faults(path):
        if not force:
            require_absent(path)
    path = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
    if path.exists() and not path.is_file():  # above all not /dev/null, for root
        raise UsageError(f"{path} is not a file, and only a file is replaced", remedy="-o - > IT, if you mean it")
    if episode in path.absolute().parent.resolve().joinpath("x").parents:
        raise UsageError(f"{path} would be inside the directory that is packed", remedy="-o a FILE elsewhere")
    with _output_faults(path), new_file(path, replace=force) as sink:
        yield _WholeWrites(sink)  # type: ignore[misc]


@contextlib.contextmanager
def _output_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{path} is there already", remedy="--force to replace it") from None
    except OSError as error:
        remedy = "-o a FILE where you may write and there is room; of faults of the disk the kernel's log says more"
        raise UsageError(f"{path} cannot be written: {error.strerror}", remedy=remedy) from None


class _WholeWrites:
    """An unbuffered file whose ``write`` takes everything: a raw write to a pipe or a full disk may take less."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = view.nbytes
        while view.nbytes:
            view = view[self._raw.write(view) :]
        return size


def _byte_progress(title: str, total_bytes: int, *, quiet: bool) -> contextlib.AbstractContextManager[Any]:
    from fastship.cli.display import byte_progress

    return byte_progress(title, total_bytes, quiet=quiet)


_KIND_LETTERS = {
    "FILE": "-",
    "HARD_LINK": "h",
    "SYMLINK": "l",
    "CHARACTER_DEVICE": "c",
    "BLOCK_DEVICE": "b",
    "DIRECTORY": "d",
    "FIFO": "p",
}


def _long_line(member: Member) -> str:
    """As ``tar -tv`` shows it."""
    permissions = stat.filemode(member.mode)[1:]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(member.mtime)) if abs(member.mtime) < 1 << 37 else "?"
    link = {"SYMLINK": " -> ", "HARD_LINK": " link to "}.get(member.kind.name, "")
    target = link + printable(member.link) if link else ""
    kind = _KIND_LETTERS.get(member.kind.name, "?")
    owner = f"{member.uid}/{member.gid}"
    return f"{kind}{permissions} {owner:<11} {member.size:>12} {when} {printable(member.name)}{target}"


def _member_json(member: Member) -> dict[str, Any]:
    """Names are what Python's ``os.fsdecode`` gives: bytes that are no UTF-8 stand as lone surrogates (PEP 383)."""
    return {
        "name": os.fsdecode(member.name),
        "kind": member.kind.name.lower().replace("_", " "),
        "mode": f"{member.mode:04o}",
        "uid": member.uid,
        "gid": member.gid,
        "bytes": member.size,
        "mtime": member.mtime,
        "link": os.fsdecode(member.link),
        "tar_offset": member.tar_offset,
    }
