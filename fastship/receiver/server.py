"""Sockets and processes: one listening socket, one or more processes that serve it.

What always holds: the socket is bound once, here; the address is announced when every process is ready to answer;
SIGTERM or SIGINT lets requests finish for `GRACE_S` and then ends them; processes end when the one that started
them is gone. A process that cannot start stops everything with its message; one that dies later is replaced, as often
as it takes while another one serves.

Imported by ``__main__`` (a serving process) and, as `serve`, by the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import resource
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from fastship.errors import EXIT_OK, ReceiverError
from fastship.receiver.app import create_app, missing_extra
from fastship.receiver.policy.access import Access, Limits
from fastship.receiver.store.store import Store
from fastship.settings import ReceiverSettings

_log = logging.getLogger("fastship.receiver")

GRACE_S = 5  # for requests that are being served when the receiver is told to end
_BACKLOG = 1024
_KEEP_ALIVE_S = 75  # longer than a client's pause between two episodes of a busy spool
_STALL_MS = 60_000
_HANDSHAKE_S = 10.0  # of TLS; such a connection is not counted yet
_FILES_A_CONNECTION = 5  # its socket, lent; the part, its lock, and who verifies beside
_OTHER_FILES = 256  # the directory, libraries, threads that read and publish
_RESTART_PAUSE_S = 1.0
_BOOT_TIMEOUT_S = 60.0
_POLL_S = 0.1


def serve(settings: ReceiverSettings, *, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT (in the main thread); blocks. Returns the exit code.

    ``announce`` is called once with the base URL when requests are really answered. Raises `ReceiverError`.
    """
    _require_uvicorn()
    Store(settings)  # every message about a root that cannot be used comes from here, before any process starts
    Access(settings.token_file, settings.commits_file, limits=Limits.usual(settings))
    _check_tls(settings)
    listening = _bind(settings.listen)
    host, port = listening.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    with listening:
        if settings.workers == 1:
            with _signals_end_quietly() as told:
                serve_socket(settings, listening, ready=lambda: announce(url), orphaned=lambda: bool(told))
        else:
            _Processes(settings, listening).run(lambda: announce(url))
    return EXIT_OK


def serve_socket(
    settings: ReceiverSettings,
    listening: socket.socket,
    *,
    ready: Callable[[], None],
    orphaned: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the listening socket in this process; blocks. ``ready`` is called once; ends when ``orphaned``."""
    import uvicorn

    from fastship.receiver.wire import connection
    from fastship.receiver.wire.quiet import Quiet

    _keep_freed_memory()
    for name in ("uvicorn.error", connection.__name__):
        logging.getLogger(name).addFilter(Quiet())

    class Connection(connection.Connection):
        most = _most_connections(settings)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            if settings.tls_cert:  # uvicorn has no setting for it
                limited = functools.partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE_S)
                loop.create_server = limited  # type: ignore[method-assign]
            await super().startup(sockets)
            ready()

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or orphaned()

    tls: dict[str, Any] = {}
    if settings.tls_cert:
        tls = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    if settings.client_ca:
        tls |= {"ssl_ca_certs": settings.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        create_app(settings),
        http=Connection,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        **tls,
    )
    Server(config).run(sockets=[listening])


def worker_main(arguments: list[str]) -> int:
    """A serving process: ``[settings as JSON, descriptor of the socket, descriptor to say "ready" on]``."""
    settings = msgspec.json.decode(arguments[0], type=ReceiverSettings)
    listening = socket.socket(fileno=int(arguments[1]))
    parent = os.getppid()

    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):  # it was told to end meanwhile, or is gone: we shall hear of it
            os.write(int(arguments[2]), b"r")
        os.close(int(arguments[2]))

    logging.raiseExceptions = False  # a line that a full disk does not take is lost, without a traceback in its place
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with listening, _signals_end_quietly() as told:
        try:
            serve_socket(settings, listening, ready=ready, orphaned=lambda: bool(told) or os.getppid() != parent)
        except ReceiverError as error:  # the disk may be full by now: the one that started this one tries again
            _log.error("%s; %s", error.message, error.remedy)
            return error.exit_code
    return EXIT_OK


class _Processes:
    """The serving processes of one receiver and the loop that watches over them."""

    def __init__(self, settings: ReceiverSettings, listening: socket.socket) -> None:
        self._settings = settings
        self._listening = listening
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended_by: int | None = None
        self._metrics = Path(settings.root) / "metrics"

    def run(self, announce: Callable[[], None]) -> None:
        shutil.rmtree(self._metrics, ignore_errors=True)
        try:
            self._metrics.mkdir(exist_ok=True)
        except OSError as error:
            remedy = "the receiver's root must take new files: is it full, or mounted read-only?"
            raise ReceiverError(f"{self._metrics}: cannot be made: {error.strerror}", remedy=remedy) from None
        before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start(self._settings.workers)
            if self._ended_by is None:
                announce()
            while self._ended_by is None:
                time.sleep(_POLL_S)
                self._replace_dead()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, _frame: object) -> None:
        self._ended_by = number

    def _start(self, count: int) -> None:
        """Start ``count`` processes and wait until all are ready. Raises `ReceiverError` when one is not."""
        waiting: list[int] = []
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        try:
            while len(waiting) < count:
                waiting.append(self._spawn())
            for said in waiting:
                if not self._wait_ready(said, deadline):
                    raise ReceiverError(
                        "a serving process of the receiver ended before it was ready",
                        remedy="its last messages, above, say why",
                    )
                if self._ended_by is not None:
                    return
        finally:
            for said in waiting:
                os.close(said)

    def _spawn(self) -> int:
        """One more process: where it will say that it is ready. Raises `ReceiverError` when the system gives none."""
        try:
            said, says = os.pipe()
        except OSError as error:
            raise _not_given(error) from None
        command = [
            sys.executable,
            "-m",
            "fastship.receiver",
            msgspec.json.encode(self._settings).decode(),
            str(self._listening.fileno()),
            str(says),
        ]
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics.absolute())}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                env=environment,
                pass_fds=(self._listening.fileno(), says),
                # Ctrl-C of a terminal goes to its whole group; only the first process is to hear it.
                process_group=0,
            )
        except OSError as error:
            os.close(said)
            raise _not_given(error) from None
        finally:
            os.close(says)
        self._processes.append(process)
        return said

    def _wait_ready(self, said: int, deadline: float) -> bool:
        """Whether the process said it is ready; True as well when the receiver was told to end meanwhile."""
        with selectors.DefaultSelector() as selector:
            selector.register(said, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if selector.select(_POLL_S):
                    return os.read(said, 1) == b"r"
                if self._ended_by is not None:
                    return True
        return False

    def _replace_dead(self) -> None:
        dead = [process for process in self._processes if process.poll() is not None]
        for process in dead:
            self._processes.remove(process)
            _log.error("a serving process (%d) ended with code %s; starting another", process.pid, process.returncode)
            _forget_gauges(self._metrics, process.pid)
        missing = self._settings.workers - len(self._processes)
        if missing:
            time.sleep(_RESTART_PAUSE_S)
            try:
                self._start(missing)
            except ReceiverError as error:
                if all(process.poll() is not None for process in self._processes):
                    raise
                # The others serve on; what did not start is missing, or found dead, at the next look.
                _log.error("%s; it is tried again", error.message)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_S + 3
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("a serving process (%d) did not end in time and is killed", process.pid)
                process.kill()
                process.wait()
        shutil.rmtree(self._metrics, ignore_errors=True)


def _bind(listen: str) -> socket.socket:
    """A listening socket for ``HOST:PORT`` or ``[V6]:PORT``; port 0 takes a free one."""
    host, colon, port = listen.rpartition(":")
    remedy = "write HOST:PORT, for example 127.0.0.1:8490 or [::1]:0"
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ReceiverError(f"receiver.listen: {listen!r} is not an address", remedy=remedy)
    listening = None
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit this: a client whose host vanished is noticed without a byte from it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        # And one that takes nothing of what is left to send, though its kernel lives: tcp(7). There is no other limit
        # once the last byte is with the transport.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALL_MS)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        if listening is not None:
            listening.close()
        remedy = "choose another port or end who listens there" if listening is not None else remedy
        raise ReceiverError(f"cannot listen on {listen}: {error.strerror}", remedy=remedy) from None
    return listening


def _check_tls(settings: ReceiverSettings) -> None:
    if settings.client_ca and not settings.tls_cert:
        raise ReceiverError("receiver.client_ca needs tls_cert and tls_key", remedy="set them, or leave it out")
    if not settings.tls_cert:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.client_ca:
            context.load_verify_locations(settings.client_ca)
    except (OSError, ssl.SSLError) as error:
        raise ReceiverError(
            f"the TLS files of the receiver cannot be used: {error}",
            remedy="receiver.tls_cert, tls_key and client_ca name PEM files; the key must belong to the certificate",
        ) from None


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed: glibc gives the pieces of each body back to the kernel and faults them in again.

    Measured on a body of 400 MB to tmpfs: 2.8 CPU-seconds a GB without this, 1.6 with it. Where there is no
    mallopt(3), nothing is done.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 128 << 20)
        mallopt(mmap_threshold, 32 << 20)


def _most_connections(settings: ReceiverSettings) -> int:
    """As the settings say, where the limit of open files, raised as far as it goes, has room for so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 20)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    room = max(1, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES) // _FILES_A_CONNECTION)
    if room < settings.max_connections:
        _log.warning("the limit of open files is %d: at most %d connections are served at once", files, room)
    return min(room, settings.max_connections)


def _require_uvicorn() -> None:
    try:
        import httptools  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise missing_extra(error) from None


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[list[int]]:
    """uvicorn raises the signal that ended it once more when it is done; that must not kill us then.

    Gives the list of the signals that came while uvicorn was not listening: one that came before it does must end it.
    """
    told: list[int] = []
    try:
        before = {
            number: signal.signal(number, lambda number, _frame: told.append(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
    except ValueError:  # not the main thread: nobody sends us signals
        yield told
        return
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_given(error: OSError) -> ReceiverError:
    remedy = "is there room for processes, memory and open files?"
    return ReceiverError(f"a serving process cannot be started: {error.strerror}", remedy=remedy)


def _forget_gauges(directory: Path, pid: int) -> None:
    with contextlib.suppress(OSError):  # a figure that is too high stops no replacement
        for path in directory.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)


def _has_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, OSError, ValueError):
        return False
