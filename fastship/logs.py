"""Where log lines go: standard error, as text for people or JSON lines for collectors.

What always holds: nothing is logged to standard output; a traceback in a log shows no local variables, which may
hold a token; a line is written whole, also while a live display owns the terminal (rich swaps ``sys.stderr``
meanwhile, so it is looked up at each line); nobody is stopped by a line that cannot be written; structlog, which takes
0.1 s to load, is not loaded before there is something to say, for a pass in which all goes well says nothing.

Imports ``settings``; whoever starts a process of fastship (``cli``, the worker's and the receiver's start) calls
`configure` once; everyone else uses `Logger`, or ``logging`` where structured fields are not needed.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, TextIO

from fastship.settings import LogSettings

if TYPE_CHECKING:
    import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_waiting: LogSettings | None = None  # what `configure` was told and structlog was not yet
_loading = threading.RLock()  # whoever has something to say meanwhile waits: unconfigured, structlog prints


class Logger:
    """``structlog.get_logger(name)``, loaded at the first line of the level that is set."""

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **fields: object) -> None:
        self._say("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._say("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._say("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._say("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._say("exception", event, fields)

    def _say(self, method: str, event: str, fields: dict[str, object]) -> None:
        waiting = _waiting
        if waiting is not None and _LEVELS.get(method, logging.ERROR) < _LEVELS[waiting.level]:
            return
        import structlog

        _load()
        getattr(structlog.get_logger(self._name), method)(event, **fields)


class _CurrentStderr:
    """A file that is whatever ``sys.stderr`` is when a line is written. Never raises ``OSError``: what was to be done
    about what is logged comes after the line, and a full disk under the log must not keep it from being done."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class _FirstWords(logging.Handler):
    """Stands where the real handler will, until somebody says something by ``logging``."""

    def emit(self, record: logging.LogRecord) -> None:
        _load()
        for handler in logging.getLogger().handlers:
            if handler is not self:
                handler.handle(record)


def configure(log: LogSettings) -> None:
    """Send this process's logs to standard error.

    May be repeated. What comes by ``logging`` goes the same way: fastship's own by the
    level set, a library's from "warning" on.
    """
    global _waiting
    level = _LEVELS[log.level]
    _waiting = log
    logging.basicConfig(handlers=[_FirstWords()], level=max(level, logging.WARNING), force=True)
    logging.getLogger("fastship").setLevel(level)
    if "structlog" in sys.modules:
        _load()


def _load() -> None:
    """Configure structlog as `configure` was told. Repeatable."""
    global _waiting
    with _loading:
        if _waiting is not None:
            _configure_structlog(_waiting)
            _waiting = None


def _configure_structlog(log: LogSettings) -> None:
    import structlog

    level = _LEVELS[log.level]
    text = log.format == "text" or (log.format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor
    if text:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_plain_traceback)
    else:
        renderer = structlog.processors.JSONRenderer()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not text),
    ]
    if not text:
        shared.append(structlog.processors.format_exc_info)  # as text: dict_tracebacks has every local variable
    last: list[structlog.typing.Processor] = [_harmless, renderer] if text else [renderer]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=_CurrentStderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def _harmless(_logger: object, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What came from elsewhere (a name on disk, an answer) neither moves a terminal's cursor nor makes lines."""
    for name, value in fields.items():
        if isinstance(value, str) and not value.isprintable():
            fields[name] = _escaped(value)
    return fields


def _plain_traceback(sio: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """structlog's own choice, rich's, prints every local variable."""
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    sio.write("\n" + "\n".join(line if line.isprintable() else _escaped(line) for line in lines))


def _escaped(text: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
