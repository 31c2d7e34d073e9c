"""The network: turns a `Request` into a transfer of libcurl, and its end into an `Answer` or a `Fault`.

The only module that imports pycurl. What always holds:

- one thread makes all calls (`Transfers.wake` alone may come from any); nothing blocks but `Transfers.poll`;
- the bearer token is in no value, exception, log, argument or environment: it is read from its file when a request
  starts, goes into libcurl's field list, and only ever to the destination's own scheme, host and port;
- where a refusal's body echoes the token, it is taken out of the `Answer` (``incoming``);
- a proxy of the environment (``https_proxy``, ``no_proxy``...) counts, but never for this machine itself;
- TLS is verified (peer and host name), only http and https are spoken, redirects are not followed;
- an `Answer` came whole (libcurl ended without error, so its status is to be trusted, and its head was whole), else it
  is a `Fault`.

HTTP/1.1 over kept-alive connections: for bulk, several connections beat several streams of one. Driven by
``epoll`` and libcurl's ``socket_action``, so it sleeps for as long as there is nothing to do.

Imports ``course``, ``incoming``, ``bandwidth`` and ``token``; the session imports it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import ipaddress
import os
import select
import termios
import time
from collections.abc import Hashable
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pycurl

from fastship import __version__
from fastship.settings import DestinationSettings, UploadSettings
from fastship.upload.bandwidth import Bandwidth
from fastship.upload.course import Answer, Fault, FaultKind, Request, Taker
from fastship.upload.incoming import ANSWER_LIMIT_BYTES, Incoming
from fastship.upload.token import Token

READ_BYTES = 256 << 10
"""libcurl's upload buffer, and so much one callback reads. Measured on 2 GB over loopback, CPU seconds a GB, medians:
64 KiB 0.56, 256 KiB 0.37, 1 MiB 0.41, 2 MiB (libcurl's greatest) 0.44, ``curl -T`` 0.33. Larger ones leave the core's
cache between the read, pycurl's copy and the send."""

EXPECT_BYTES = 1 << 20
"""A body above this asks first (100-continue): below, the round trip costs more than a refused body would. It is
libcurl's own limit, and its own field: one that is given to it, it repeats after a 417, thirty times."""

STALL_LOOKS = 4
"""A stall is noticed after between 1 and 1 + 1/STALL_LOOKS times its limit."""

_DNS = {pycurl.E_COULDNT_RESOLVE_PROXY, pycurl.E_COULDNT_RESOLVE_HOST}
_CUT = ("unexpected eof", "Connection reset", "Broken pipe", "SSL_ERROR_SYSCALL")  # a handshake, in libcurl's words
# 35 handshake, 60 peer not verified, 53 54 66 80 engine and close, 64 no TLS, 83 issuer, 90 91 pin and status.
_TLS = {35, 53, 54, 60, 64, 66, 80, 83, 90, 91}
# 1 protocol, 2 initialisation, 3 URL, 27 memory, 43 bad call, 47 redirects, 58 client certificate, 59 ciphers,
# 77 CA file, 82 CRL file.
_SETTINGS = {1, 2, 3, 4, 27, 41, 43, 47, 48, 58, 59, 77, 82}


Key = TypeVar("Key", bound=Hashable)


class Ended(NamedTuple, Generic[Key]):
    """The end of a request: what came of it, and how many bytes of its body were sent."""

    key: Key
    result: Answer | Fault
    sent_bytes: int


class Transfers(Generic[Key]):
    """Requests under way, each known by a key of the caller's. Not thread-safe, except `wake`."""

    def __init__(self, destination: DestinationSettings, upload: UploadSettings) -> None:
        self._destination = destination
        self._upload = upload
        self._token = Token(destination.token_file)
        self._asks_first = True  # with Expect, until a 417 says that it is not understood
        self._agent = f"fastship/{__version__}"
        self._buffer = memoryview(bytearray(READ_BYTES))  # shared: libcurl copies before the next callback can come
        self._bandwidth = Bandwidth(upload.bandwidth, now=time.monotonic())
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, upload.connections)
        self._curl_due: float | None = None  # when libcurl wants to be called, monotonic
        self._under_way: dict[Key, _Transfer] = {}
        self._keys: dict[Any, Key] = {}  # by easy handle
        self._idle: list[Any] = []  # easy handles to use again
        self._ended: list[Ended[Key]] = []  # without libcurl, to be told by the next poll

    def start(self, key: Key, request: Request, artifact_fd: int, taker: Taker | None = None) -> None:
        """Begin a request; `poll` tells its end. ``artifact_fd`` stays the caller's and open until then.

        ``taker`` may have the answer's body, at the pace of the bandwidth limit. Raises nothing for settings that
        cannot be used: that is a `Fault` of the next poll.
        """
        easy = self._idle.pop() if self._idle else pycurl.Curl()
        transfer = _Transfer(
            easy, request, artifact_fd, self._buffer, self._bandwidth, self._upload.stall_timeout_s, taker
        )
        try:
            token = self._token.read()
            transfer.configure(self._destination, self._upload, self._agent, token, asks_first=self._asks_first)
            self._multi.add_handle(easy)
        except (pycurl.error, ValueError) as error:  # ValueError: the token; a URL or field of impossible characters
            message = error.args[1] if isinstance(error, pycurl.error) and len(error.args) > 1 else str(error)
            self._ended.append(Ended(key, Fault(FaultKind.SETTINGS, str(message)), 0))
            self._recycle(easy)
            return
        self._under_way[key] = transfer
        self._keys[easy] = key

    def sent_bytes(self, key: Key) -> int:
        """Body bytes of this request that the kernel has taken so far; 0 when it is not under way."""
        transfer = self._under_way.get(key)
        return transfer.sent_bytes() if transfer else 0

    def moved_bytes(self, key: Key) -> int:
        """Of these, what the other end has acknowledged."""
        transfer = self._under_way.get(key)
        return transfer.moved_bytes() if transfer else 0

    def cancel(self, key: Key) -> None:
        """Cut a request at once, with its connection; `poll` will not tell its end. May be repeated."""
        self._ended = [ended for ended in self._ended if ended.key != key]
        transfer = self._under_way.pop(key, None)
        if transfer:
            self._remove(transfer)

    def set_bandwidth(self, bytes_per_s: float) -> None:
        """Limit of all transfers together from now on; 0: none."""
        self._bandwidth.set_rate(bytes_per_s, time.monotonic())

    def wake(self) -> None:
        """End the `poll` that blocks now, or the next one. The only call for other threads; may be repeated."""
        os.eventfd_write(self._wake_fd, 1)

    def poll(self, timeout_s: float | None) -> list[Ended[Key]]:
        """Move bytes for up to ``timeout_s`` (None: until something happens); the requests that ended, if any.

        Blocks until a socket, a timer or `wake` has something, which need not be the end of a request.
        """
        for fd, event in self._epoll.poll(self._sleep_s(timeout_s)):
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            else:
                readable = pycurl.CSELECT_IN if event & ~select.EPOLLOUT else 0
                writable = pycurl.CSELECT_OUT if event & select.EPOLLOUT else 0
                self._multi.socket_action(fd, readable | writable)
        now = time.monotonic()
        if self._curl_due is not None and now >= self._curl_due:
            self._curl_due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()
        self._resume_paused(now)
        self._give_up_stalled(now)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Cut everything and give all back to the kernel. May be repeated; nothing else may be called after."""
        for key in list(self._under_way):
            self.cancel(key)
        for easy in self._idle:
            easy.close()
        self._idle.clear()
        if not self._epoll.closed:
            self._multi.close()  # its idle connections unregister themselves
            self._epoll.close()
            os.close(self._wake_fd)

    def _sleep_s(self, timeout_s: float | None) -> float | None:
        now = time.monotonic()
        if self._ended:
            return 0.0
        dues = [transfer.next_look for transfer in self._under_way.values()]
        if self._curl_due is not None:
            dues.append(self._curl_due)
        if timeout_s is not None:
            dues.append(now + timeout_s)
        if any(transfer.paused for transfer in self._under_way.values()):
            dues.append(now + self._bandwidth.ready_in_s(now))
        return max(0.0, min(dues) - now) if dues else None

    def _on_socket(self, what: int, fd: int, _multi: object, _data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            with contextlib.suppress(OSError, ValueError):  # closed already: the kernel has forgotten it
                self._epoll.unregister(fd)
            return
        events = (select.EPOLLIN if what & pycurl.POLL_IN else 0) | (select.EPOLLOUT if what & pycurl.POLL_OUT else 0)
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._epoll.register(fd, events)

    def _on_timer(self, timeout_ms: int) -> None:
        self._curl_due = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000

    def _collect(self) -> None:
        more = 1
        while more:
            more, well, failed = self._multi.info_read()
            for easy in well:
                self._end(easy, None)
            for easy, code, message in failed:
                self._end(easy, (code, message))

    def _end(self, easy: Any, error: tuple[int, str] | None) -> None:
        key = self._keys[easy]
        transfer = self._under_way.pop(key)
        end = transfer.answer() if error is None else transfer.fault(*error)
        self._asks_first &= not (isinstance(end, Answer) and end.status == 417)
        self._ended.append(Ended(key, end, transfer.sent_bytes()))
        self._remove(transfer)

    def _remove(self, transfer: _Transfer) -> None:
        del self._keys[transfer.easy]
        self._multi.remove_handle(transfer.easy)
        self._recycle(transfer.easy)

    def _recycle(self, easy: Any) -> None:
        easy.reset()  # also lets go of the callbacks, the field list and with it the token
        self._idle.append(easy)

    def _resume_paused(self, now: float) -> None:
        paused = [transfer for transfer in self._under_way.values() if transfer.paused]
        if paused and self._bandwidth.ready_in_s(now) <= 0:
            # The one that waited longest first, and no more than the bucket serves: a turn each.
            min(paused, key=lambda transfer: transfer.paused_at).resume(now)

    def _give_up_stalled(self, now: float) -> None:
        for key, transfer in list(self._under_way.items()):
            if now >= transfer.next_look:
                message = transfer.look(now)
                if message:
                    sent_bytes = transfer.sent_bytes()
                    self.cancel(key)
                    self._ended.append(Ended(key, Fault(FaultKind.STALL, message), sent_bytes))


class _Transfer:
    """One request at libcurl: its easy handle's callbacks, what they send and what they were told."""

    def __init__(
        self,
        easy: Any,
        request: Request,
        artifact_fd: int,
        buffer: memoryview,
        bandwidth: Bandwidth,
        stall_timeout_s: float,
        taker: Taker | None,
    ) -> None:
        self.easy = easy
        self._request = request
        self._fd = artifact_fd
        self._buffer = buffer
        self._bandwidth = bandwidth
        self._stall_timeout_s = stall_timeout_s
        self._wants_body = taker is not None
        self._incoming = Incoming(taker)
        self._start = request.body.offset if request.body else 0
        self._end = self._start + (request.body.length_bytes if request.body else 0)
        self._position = self._start
        self._artifact_error = ""
        self._certified = False  # a client certificate is shown
        self._token = ""
        self.paused = False
        self.paused_at = 0.0
        self._moved: tuple[int, int] = (0, 0)
        self._moved_at = time.monotonic()
        self.next_look = 0.0
        self._plan_look(self._moved_at)

    def configure(
        self, destination: DestinationSettings, upload: UploadSettings, agent: str, token: str, *, asks_first: bool
    ) -> None:
        set_option = self.easy.setopt
        set_option(pycurl.URL, self._request.url)
        set_option(pycurl.NOSIGNAL, 1)
        set_option(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        set_option(pycurl.FOLLOWLOCATION, 0)
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        set_option(pycurl.CONNECTTIMEOUT_MS, max(1, int(upload.connect_timeout_s * 1000)))
        set_option(pycurl.TCP_KEEPALIVE, 1)
        set_option(pycurl.USERAGENT, agent)
        set_option(pycurl.HEADERFUNCTION, self._incoming.field)
        set_option(pycurl.WRITEFUNCTION, self._on_body)
        if _is_this_machine(destination.url):
            set_option(pycurl.NOPROXY, "*")
        if self._request.url[:6].lower() == "https:":
            self._configure_tls(destination)
        fields = [f"{name}: {value}" for name, value in self._request.fields]
        self._token = token
        if token:
            fields.append(f"Authorization: Bearer {token}")
        if self._request.body is None:
            set_option(pycurl.NOBODY, 0 if self._wants_body else 1)
        else:
            length = self._request.body.length_bytes
            set_option(pycurl.UPLOAD, 1)
            set_option(pycurl.INFILESIZE_LARGE, length)
            set_option(pycurl.UPLOAD_BUFFERSIZE, READ_BYTES)
            set_option(pycurl.READFUNCTION, self._on_read)
            set_option(pycurl.SEEKFUNCTION, self._on_seek)
            if length <= EXPECT_BYTES or not asks_first:
                fields.append("Expect:")  # of more libcurl asks by itself
        set_option(pycurl.CUSTOMREQUEST, self._request.method)
        set_option(pycurl.HTTPHEADER, fields)

    def _configure_tls(self, destination: DestinationSettings) -> None:
        import ssl  # takes longer to load than all else here, and plain HTTP has no use for it

        set_option = self.easy.setopt
        set_option(pycurl.SSL_VERIFYPEER, 1)
        set_option(pycurl.SSL_VERIFYHOST, 2)
        # The wheel's libcurl looks where its build machine kept certificates; Python knows where this one does.
        system = ssl.get_default_verify_paths()
        if destination.ca_file:
            set_option(pycurl.CAINFO, destination.ca_file)
            set_option(pycurl.CAPATH, os.devnull)  # these certificates instead of the system's, not beside them
        else:
            if system.cafile:
                set_option(pycurl.CAINFO, system.cafile)
            if system.capath:
                set_option(pycurl.CAPATH, system.capath)
        self._certified = bool(destination.client_cert)
        if destination.client_cert:
            set_option(pycurl.SSLCERT, destination.client_cert)
            set_option(pycurl.SSLKEY, destination.client_key)
            set_option(pycurl.KEYPASSWD, "")  # else OpenSSL asks at the terminal, and waits

    def sent_bytes(self) -> int:
        return int(self.easy.getinfo(pycurl.SIZE_UPLOAD_T))

    def moved_bytes(self) -> int:
        return max(0, self.sent_bytes() - self._unacknowledged_bytes())

    def resume(self, now: float) -> None:
        """Go on after the bandwidth limit held it; the time it was held is no stall."""
        self.paused = False
        self._moved_at = now
        self._plan_look(now)
        self.easy.pause(pycurl.PAUSE_CONT)

    def look(self, now: float) -> str:
        """What to say if no byte has moved for too long; ``""`` and the time of the next look if all is well."""
        # Bytes of the answer do not count, where not asked for: it is short, and one that trickles would never end.
        answered_bytes = self._incoming.body_bytes if self._request.alive or self._incoming.taken else 0
        moved = (self.sent_bytes() + answered_bytes, self._unacknowledged_bytes())
        if moved != self._moved or self.paused:
            self._moved = moved
            self._moved_at = now
        still_s = now - self._moved_at
        if still_s >= self._limit_s():
            if self._all_handed_over() and not self._incoming.taken:
                return f"no answer within {still_s:.0f} s of the last byte"
            return f"no byte moved for {still_s:.0f} s"
        self._plan_look(now)
        return ""

    def _all_handed_over(self) -> bool:
        return self._position >= self._end

    def _limit_s(self) -> float:
        moving = self._incoming.taken or not self._all_handed_over()
        return self._stall_timeout_s if moving else self._request.answer_timeout_s

    def _plan_look(self, now: float) -> None:
        # The shorter limit, because a transfer may go over from one to the other at any time.
        self.next_look = now + min(self._stall_timeout_s, self._request.answer_timeout_s) / STALL_LOOKS

    def _unacknowledged_bytes(self) -> int:
        """What the kernel has taken and the other end has not (tcp(7), SIOCOUTQ).

        On a slow line the kernel's buffer holds a minute's worth: libcurl's count stands still while bytes move.
        """
        fd = self.easy.getinfo(pycurl.ACTIVESOCKET)
        if fd < 0:
            return 0
        count = array.array("i", [0])
        try:
            fcntl.ioctl(fd, termios.TIOCOUTQ, count)
        except OSError:
            return 0
        return count[0]

    def _on_read(self, size: int) -> Any:
        """libcurl wants up to ``size`` bytes. No exception may leave: libcurl would print it and say less."""
        wanted = min(size, self._end - self._position, len(self._buffer))
        now = time.monotonic()
        granted = self._bandwidth.take(wanted, now)
        if granted == 0 and wanted > 0:
            self.paused = True
            self.paused_at = now
            return pycurl.READFUNC_PAUSE
        piece = self._buffer[:granted]
        try:
            count = os.preadv(self._fd, [piece], self._position)
        except OSError as error:
            self._artifact_error = f"reading it at byte {self._position}: {error.strerror}"
            return pycurl.READFUNC_ABORT
        if count == 0 and wanted > 0:
            self._artifact_error = f"it ends at byte {self._position}"
            return pycurl.READFUNC_ABORT
        self._position += count
        return piece[:count]

    def _on_seek(self, offset: int, _origin: int) -> int:
        """libcurl repeats the request by itself where a kept-alive connection turned out to be dead."""
        self._position = self._start + offset
        return int(pycurl.SEEKFUNC_OK)

    def _on_body(self, piece: bytes) -> int | None:
        if self._incoming.is_for_taker():
            now = time.monotonic()
            if not self._bandwidth.take_whole(len(piece), now):
                self.paused, self.paused_at = True, now
                return int(pycurl.WRITEFUNC_PAUSE)  # the same piece comes again
        return None if self._incoming.add(piece) else -1

    def answer(self) -> Answer | Fault:
        return self._incoming.answer(int(self.easy.getinfo(pycurl.RESPONSE_CODE)), self._token)

    def fault(self, code: int, message: str) -> Fault:
        if self._artifact_error:
            return Fault(FaultKind.ARTIFACT, self._artifact_error)
        if self._incoming.too_long:
            return Fault(FaultKind.NETWORK, f"the answer's body goes on for more than {ANSWER_LIMIT_BYTES} bytes")
        if code == pycurl.E_UNSUPPORTED_PROTOCOL and self.easy.getinfo(pycurl.PRIMARY_IP):  # said after connecting
            return Fault(FaultKind.SETTINGS, f"what answers there is not HTTP, see destination.url: {message}")
        if "unexpected eof" in message and not self._incoming.began and not self._certified:
            # Servers that drop a TLS 1.3 connection without an alert (Python's asyncio) look like a cut line.
            message += "; if it asks for client certificates, set destination.client_cert"
        return Fault(_kind(code, message), f"{message or 'no reason given'} (curl {code})")


@functools.lru_cache(maxsize=8)
def _is_this_machine(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or no URL at all, which libcurl says better
        return False


def _kind(code: int, message: str) -> FaultKind:
    if code in _DNS:
        return FaultKind.DNS
    if code in _SETTINGS:
        return FaultKind.SETTINGS
    if code == pycurl.E_SSL_CONNECT_ERROR and any(part in message for part in _CUT):
        return FaultKind.NETWORK  # in the handshake, but nothing was refused: who served there ended, or the line broke
    # A TLS 1.3 server refuses a client certificate after the handshake, as an alert that is read like data.
    if code in _TLS or (code in (pycurl.E_RECV_ERROR, pycurl.E_SEND_ERROR) and "alert" in message):
        return FaultKind.TLS
    return FaultKind.NETWORK
