"""The command line: ``fastship COMMAND``.

What always holds: results go to standard output, everything else (logs, progress, errors) to standard error;
the exit code is that of `fastship.errors`; one of our errors is a sentence and a remedy, never a traceback; an
error nobody foresaw is a sentence, exit 70, and a file with the traceback. Importing this package is cheap: each
command imports what it needs when it runs, so that ``--help`` and ``status`` never load curl, zstd or uvicorn.

The top layer: only ``fastship.__main__`` imports it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

import click

from fastship import __version__
from fastship.cli import artifacts, custody, demonstration, measuring, service, setup, triage
from fastship.cli.options import Invocation
from fastship.cli.output import output_error, printable_lines
from fastship.errors import EXIT_INTERNAL, EXIT_OK, EXIT_USAGE, FastshipError, OutputError

_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
_EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE
_FAULTS_OF_THE_HOST = {  # no traceback tells more of them
    errno.ENOSPC: "free space where it writes to",
    errno.EDQUOT: "free space where it writes to, or have its user's quota raised",
    errno.EIO: "see the kernel's log for faults of the disk",
    errno.EROFS: "see the kernel's log for why the file system is read-only",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this host (sysctl fs.file-max)",
}


def _version(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(f"fastship {__version__}")
        context.exit()


class _InOrder(click.Group):
    """Lists its commands as they were added: in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's face
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all due work done; 1 of verify and scrub: not as it should be; 2 usage; 3 settings; "
    "4 some episode was not shipped; 5 another instance holds the spool; 70 a fault of fastship.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def fastship() -> None:
    """Gets finished episodes of telemetry off this host: packs, ships, proves the arrival, retires.

    Try it: `fastship demo`. For real: `fastship init DIR --url URL`, then `fastship run`.
    """


for _command in (
    demonstration.demo,
    setup.init,
    service.run,
    service.once,
    service.receive,
    service.status,
    triage.quarantine,
    triage.holds,
    custody.verify,
    custody.scrub,
    artifacts.pack,
    artifacts.ls,
    artifacts.extract,
    setup.config,
    measuring.bench,
    measuring.tune,
):
    fastship.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code. Never returns."""
    invocation = Invocation(debug=bool(os.environ.get("FASTSHIP_DEBUG")))
    _open_closed_streams()
    with contextlib.suppress(ValueError, AttributeError):  # a standard stream that was replaced
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = _run(arguments, invocation)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _EXIT_PIPE_CLOSED
    except (OSError, ValueError) as error:
        told = output_error(error)
        _tell(told.message, told.remedy)
        code = code or told.exit_code
        _silence_stdout()
    if code == _EXIT_PIPE_CLOSED:
        _silence_stdout()
    sys.exit(code)


def _open_closed_streams() -> None:
    """Give what was closed for us (``>&-``) a descriptor: the next file opened would get its number, and our words.

    Standard output for reading only, as gnulib's ``stdopen`` does: so that a result nobody can get is an error.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _run(arguments: Sequence[str] | None, invocation: Invocation) -> int:
    try:
        code = fastship.main(arguments, prog_name="fastship", standalone_mode=False, obj=invocation)
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _tell(error.format_message(), f"{context.command_path} --help" if context else "fastship --help")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _tell("interrupted")
        return _EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):  # without standalone_mode, click exits itself for a closed pipe only
        return _EXIT_PIPE_CLOSED
    except FastshipError as error:
        _tell(error.message, error.remedy)
        if invocation.debug:
            traceback.print_exc()
        if isinstance(error, OutputError):
            _silence_stdout()  # it is said: what is buffered would say it again
        return error.exit_code
    except PermissionError as error:
        what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "something that is needed"
        _tell(f"{what}: {error.strerror}", "run it as a user who may, most often the one that runs fastship")
        if invocation.debug:
            traceback.print_exc()
        return EXIT_USAGE
    except Exception as error:
        _tell_unexpected(error, invocation)
        return EXIT_INTERNAL


def _tell(message: str, remedy: str = "") -> None:
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"fastship: error: {printable_lines(message)}", err=True)
        if remedy:
            click.echo(f"  try: {printable_lines(remedy)}", err=True)


def _tell_unexpected(error: Exception, invocation: Invocation) -> None:
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror + (f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else "")
    else:
        what = f"unexpected {type(error).__name__}: {error}"
    if invocation.debug:
        traceback.print_exc()
        _tell(what)
        return
    if isinstance(error, OSError) and error.errno in _FAULTS_OF_THE_HOST:
        _tell(what, _FAULTS_OF_THE_HOST[error.errno])
        return
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fastship-traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        _tell(what, f"--debug shows where; the traceback is in {file.name}")
    except OSError:
        _tell(what, "--debug shows where")


def _silence_stdout() -> None:
    """Nobody can read our output: what is still buffered goes nowhere, so that the exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
