"""fastship as a Python API: one pass, or for ever, over the spool that the settings name.

    from fastship import Settings, Shipper

    shipper = Shipper(Settings.load("fastship.toml"))
    result = shipper.run_once()
    print(result.shipped, result.transient_failures)

What always holds: between calls a `Shipper` holds nothing (no lock, no process, no descriptor); during one it is
the only instance on its spool. Imports the supervisor, ``spool``, ``settings``; the command line imports it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastship.errors import SettingsError, SpoolBusy, UsageError
from fastship.settings import Settings
from fastship.spool import Spool, requests
from fastship.status import PassResult, Snapshot
from fastship.supervisor import Supervisor

Observer = Callable[[Snapshot], None]
ANSWER_TIMEOUT_S = 15.0


class Shipper:
    """The daemon as an object. ``observer`` is called about 4 times a second and at the end, in the caller's thread.

    ``reload`` gives new settings on SIGHUP. With it (and in the main thread) signals are handled while running:
    SIGTERM and SIGINT drain, a second one stops at once, SIGHUP reloads. Without it no handler is touched.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        observer: Observer | None = None,
        reload: Callable[[], Settings] | None = None,
    ) -> None:
        """Raises `SettingsError` when there is no spool or no destination to ship to."""
        if not settings.spool.root:
            raise SettingsError("spool.root is not set", remedy="set it in fastship.toml, or: fastship init DIR")
        if not settings.destination.url:
            raise SettingsError(
                "destination.url is not set", remedy='set it in fastship.toml: [destination] url = "https://..."'
            )
        self._settings = settings
        self._observer = observer
        self._reload = reload

    def run_once(self) -> PassResult:
        """One pass: every ready episode is attempted once; blocks until each has its verdict.

        Raises `SpoolBusy`, `SpoolError`, `WorkerCannotStart`. May be repeated.
        """
        return Supervisor(self._settings, once=True, observer=self._observer, reload=self._reload).run()

    def run_forever(
        self,
        *,
        stop_check: Callable[[], bool] | None = None,
        heartbeat: Callable[[], None] | None = None,
    ) -> PassResult:
        """Until ``stop_check()`` is true (looked at every 0.5 s at least) or a signal says so; then drains.

        ``heartbeat`` is called once each ``spool.scan_interval_s``; what it raises is logged. Returns the totals.
        Raises as `run_once`.
        """
        return Supervisor(
            self._settings,
            once=False,
            stop_check=stop_check,
            heartbeat=heartbeat,
            observer=self._observer,
            reload=self._reload,
        ).run()


def operate(settings: Settings, action: requests.Action, episode: str, *, new_id: str | None = None) -> str:
    """Carry out an operator's word on a held or quarantined episode; returns a sentence saying what was done.

    Under the spool lock, or through the daemon that holds it. Raises `UsageError` when it cannot be done,
    `SpoolBusy` when the daemon does not answer.
    """
    spool = Spool(settings.spool.root)
    spool.paths.require(["episodes"])
    spool.create()
    request = requests.Request(action=action, episode=episode, new_id=new_id)
    try:
        lock = spool.lock()
    except SpoolBusy:
        answer = requests.submit(spool.paths.requests, request, timeout_s=ANSWER_TIMEOUT_S)
        if answer is not None:
            if not answer.ok:
                raise UsageError(answer.text, remedy=answer.remedy) from None
            return answer.text
        lock = spool.lock()  # the request is withdrawn: the daemon is busy, or it has died meanwhile
    try:
        return requests.carry_out(spool, request).text
    finally:
        lock.release()
