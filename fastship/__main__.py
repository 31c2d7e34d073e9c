"""The process of a command: ``fastship`` and ``python -m fastship``.

An interrupt while it loads ends it at once and quietly, as it ends a program of any other kind: there is nothing to
clean up yet, and Python's own way would be a traceback. From `cli.main` on it is a ``KeyboardInterrupt``.
"""

import signal


def main() -> None:
    """Run the command line. Never returns."""
    loud = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else whoever started us ignores it
    if loud:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fastship import cli

    if loud:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
