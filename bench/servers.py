"""Real servers to ship to, on loopback or behind a link: nginx as a plain sink, and fastship's own receiver.

What always holds: each listens on a free port, keeps what it got below a directory of its own, says what CPU it used,
and is gone when its ``with`` block ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from bench import measure

_START_S = 30.0
NGINX_HINT = "nginx is not installed; on Debian and Ubuntu: apt install nginx-light libnginx-mod-http-dav-ext"
_DAV_EXT = Path("/usr/lib/nginx/modules/ngx_http_dav_ext_module.so")

_NGINX_CONF = """
{modules}
daemon off; master_process on; worker_processes {workers}; pid {root}/nginx.pid; error_log {root}/error.log warn;
{user}
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_max_body_size 0; client_body_buffer_size 1m; client_body_temp_path {root}/temp; keepalive_requests 1000000;
  proxy_temp_path {root}/t1; fastcgi_temp_path {root}/t2; uwsgi_temp_path {root}/t3; scgi_temp_path {root}/t4;
  server {{
    listen {address}:{port};
    location / {{ root {root}/store; create_full_put_path on; dav_methods PUT DELETE MKCOL COPY MOVE; {dav_ext} }}
  }}
}}
"""


class ServerMissing(Exception):
    """The server's program is not installed; says how to."""


class Place(NamedTuple):
    """Where a server runs: its address, and what a command there begins with. ``bench.links`` has others."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOOPBACK = Place()


class _Server:
    """A process, its URL and its store."""

    url = ""
    store: Path
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """CPU seconds since its start."""
        return measure.tree_cpu_s(self.process.pid)

    def peak_bytes(self) -> int:
        return measure.tree_peak_bytes(self.process.pid)

    def empty(self) -> None:
        """Remove what it has stored, between rounds."""
        for entry in os.scandir(self.store):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.artifacts())

    def artifacts(self) -> list[Path]:
        """Every file stored that is not a receipt, in name order."""
        return sorted(path for path in self.store.rglob("*") if path.is_file() and path.suffix != ".json")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Nginx(_Server):
    """nginx with dav_methods PUT: stores what comes, digests and syncs nothing. Raises `ServerMissing`."""

    def __init__(self, root: Path, *, workers: int = 1, place: Place = LOOPBACK) -> None:
        program = nginx_program()
        root.mkdir(parents=True)
        self.store = root / "store"
        for name in ("store", "temp"):
            (root / name).mkdir()
        self.webdav = _DAV_EXT.exists()  # PROPFIND, which only rclone needs
        port = _free_port()
        configuration = _NGINX_CONF.format(
            root=root,
            address=place.address,
            port=port,
            workers=workers,
            user="user root;" if os.geteuid() == 0 else "",
            modules=f"load_module {_DAV_EXT};" if self.webdav else "",
            dav_ext="dav_ext_methods PROPFIND OPTIONS;" if self.webdav else "",
        )
        (root / "nginx.conf").write_text(configuration)
        self.process = subprocess.Popen(
            [*place.prefix, program, "-p", str(root), "-e", str(root / "error.log"), "-c", str(root / "nginx.conf")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"http://{place.address}:{port}"
        _wait_until_it_listens(root / "nginx.pid", self.process, root / "error.log")


class Receiver(_Server):
    """``fastship receive`` in a process of its own, one worker unless said otherwise."""

    def __init__(self, root: Path, *options: str, workers: int = 1, place: Place = LOOPBACK) -> None:
        root.mkdir(parents=True)
        self._log = open(root.parent / f"{root.name}.log", "wb")  # noqa: SIM115 - closed with the process
        command = [*place.prefix, sys.executable, "-m", "fastship", "receive"]
        command += ["--root", str(root), "--listen", f"{place.address}:0"]
        self.process = subprocess.Popen(
            [*command, "--workers", str(workers), "--set", 'log.level="error"', *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env=measure.installed_environment(),
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url.startswith(f"http://{place.address}:"), f"the receiver did not start: see {self._log.name}"
        self.store = root / "episodes"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._log.close()


def nginx_program() -> str:
    """The path of nginx. Raises `ServerMissing`."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        raise ServerMissing(NGINX_HINT)
    return program


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_it_listens(pid_file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """nginx writes its pid once its sockets are open: it can be waited for in another network, too."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if pid_file.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"nginx did not start: {log.read_text()[-500:] if log.exists() else ''}")
