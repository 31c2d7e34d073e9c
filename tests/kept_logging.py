"""For tests that run a command in their own process: the logging it configures does not outlive them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import structlog


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Puts `structlog` back to its defaults and `logging` to what it was (pytest's own handlers included)."""
    loggers = logging.getLogger(), logging.getLogger("fastship")
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    try:
        yield
    finally:
        structlog.reset_defaults()
        for logger, handlers, level in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
