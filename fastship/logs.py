"""Where log lines go: standard error, as text for people or JSON lines for collectors.

What always holds: nothing is logged to standard output; a traceback in a log shows no local variables, which may
hold a token; a line is written whole, also while a live display owns the terminal (rich swaps ``sys.stderr``
meanwhile, so it is looked up at each line).

Imports ``settings``; whoever starts a process of fastship (``cli``, the worker's and the receiver's start) calls
`configure` once; everyone else just uses ``structlog.get_logger()``.
"""

from __future__ import annotations

import logging
import sys

import structlog

from fastship.settings import LogSettings

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _CurrentStderr:
    """A file that is whatever ``sys.stderr`` is when a line is written."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(log: LogSettings) -> None:
    """Send this process's logs to standard error.

    May be repeated. What comes by ``logging`` goes the same way: fastship's own by the
    level set, a library's from "warning" on.
    """
    level = _LEVELS[log.level]
    text = log.format == "text" or (log.format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor
    if text:
        plain = structlog.dev.plain_traceback  # structlog's own choice, rich's, prints every local variable
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
    else:
        renderer = structlog.processors.JSONRenderer()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not text),
    ]
    if not text:
        shared.append(structlog.processors.format_exc_info)  # as text: dict_tracebacks has every local variable
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=_CurrentStderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.getLogger("fastship").setLevel(level)
