"""Programs whose every changing system call (or every reading one) is looked at before it is made, and may be failed,
be made in part, or kill its caller.

seccomp's user notifications (seccomp_unotify(2)): the kernel stops each listed call of a program, of every process and
thread that comes of it, and asks here. So the calls of all of them are in one order and counted in one place (strace
counts each thread's for itself), and a program that is not looked at pays nothing. Linux 5.19 on x86-64.

Programs are forked from a process that has imported fastship already (`Nursery`): hundreds of them are started.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

# Call -> (its number on x86-64, which argument is a descriptor it changes, which (directory, path) it names last).
_CALLS: dict[str, tuple[int, int | None, tuple[int | None, int] | None]] = {
    "write": (1, 0, None),
    "pwrite64": (18, 0, None),
    "writev": (20, 0, None),
    "pwritev": (296, 0, None),
    "pwritev2": (328, 0, None),
    "sendfile": (40, 0, None),
    "copy_file_range": (326, 2, None),
    "sendto": (44, 0, None),
    "sendmsg": (46, 0, None),
    "sendmmsg": (307, 0, None),
    "fsync": (74, 0, None),
    "fdatasync": (75, 0, None),
    "sync_file_range": (277, 0, None),
    "ftruncate": (77, 0, None),
    "fallocate": (285, 0, None),
    "fchmod": (91, 0, None),
    "open": (2, None, (None, 0)),
    "creat": (85, None, (None, 0)),
    "openat": (257, None, (0, 1)),
    "truncate": (76, None, (None, 0)),
    "rename": (82, None, (None, 1)),
    "renameat": (264, None, (2, 3)),
    "renameat2": (316, None, (2, 3)),
    "link": (86, None, (None, 1)),
    "linkat": (265, None, (2, 3)),
    "symlink": (88, None, (None, 1)),
    "symlinkat": (266, None, (1, 2)),
    "unlink": (87, None, (None, 0)),
    "unlinkat": (263, None, (0, 1)),
    "rmdir": (84, None, (None, 0)),
    "mkdir": (83, None, (None, 0)),
    "mkdirat": (258, None, (0, 1)),
    "chmod": (90, None, (None, 0)),
    "fchmodat": (268, None, (0, 1)),
    "utimensat": (280, None, (0, 1)),
    "socket": (41, None, None),
    "accept": (43, 0, None),
    "accept4": (288, 0, None),
}
CHANGING = frozenset(_CALLS)
_CALLS |= {
    "read": (0, 0, None),
    "pread64": (17, 0, None),
    "readv": (19, 0, None),
    "preadv": (295, 0, None),
    "preadv2": (327, 0, None),
    "getdents64": (217, 0, None),
    "stat": (4, None, (None, 0)),
    "fstat": (5, 0, None),
    "lstat": (6, None, (None, 0)),
    "newfstatat": (262, None, (0, 1)),
    "statx": (332, None, (0, 1)),
    "access": (21, None, (None, 0)),
    "faccessat": (269, None, (0, 1)),
    "faccessat2": (439, None, (0, 1)),
    "readlink": (89, None, (None, 0)),
    "readlinkat": (267, None, (0, 1)),
    "statfs": (137, None, (None, 0)),
    "fstatfs": (138, 0, None),
}
READING = frozenset(_CALLS) - CHANGING
"""What may be looked at: one of the two, for each costs the program some 0.1 ms a call."""
_NAMES = {number: name for name, (number, _, _) in _CALLS.items()}
_OPEN_FLAGS = {"open": 1, "openat": 2}  # which argument
_CHANGING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_AT_FDCWD = 0xFFFFFF9C

_FREE_FD = 1000  # what is sent over this descriptor is not looked at: it brings us the listener
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls of linux/seccomp.h
_CONTINUE = 1

_LOADED = (  # by name: an import that nobody uses is one that a linter takes away
    "fastship.cli.display",
    "fastship.custody",
    "fastship.receiver.metrics",
    "fastship.receiver.server",
    "fastship.receiver.store.scrub",
    "fastship.receiver.wire.connection",
    "fastship.shipper",
    "fastship.supervisor.loop",
    "uvicorn.lifespan.on",
    "uvloop",
)
END_S = 60.0  # more than any program of a test takes; what is still there then is killed, and the test told


class Call(NamedTuple):
    """One system call that is about to be made."""

    first: bool  # by the process that was started, not by one that it started
    name: str  # "open" is one that only reads, "create" one that may change something
    path: str  # of the file that changes, or "tcp", "unix"; else as /proc/PID/fd has it


class Stuck(AssertionError):
    """A program did not end by itself."""


Action = int | Literal["kill", "kill all", "half"] | None
"""What is to come of a call: this errno, or the end of its process or of all of them, or the first half of what it was
to write (to a file or to a stream of TCP) and no more, or what would have come of it."""


# --- the program's side ------------------------------------------------------------------------------------------


def _filter(calls: frozenset[str]) -> bytes:
    """BPF: stop these calls, but what is sent over `_FREE_FD`; let all others go."""
    load, equal, give = 0x20, 0x15, 0x06
    stop, go = 0x7FC00000, 0x7FFF0000
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, go),
        (load, 0, 0, 0),  # the number
        (equal, 0, 3, _CALLS["sendmsg"][0]),
        (load, 0, 0, 16),  # the first argument
        (equal, 0, 1, _FREE_FD),
        (give, 0, 0, go),
        (load, 0, 0, 0),
    ]
    for number in (_CALLS[name][0] for name in calls):
        program += [(equal, 0, 1, number), (give, 0, 0, stop)]
    program.append((give, 0, 0, go))
    return b"".join(struct.pack("=HBBI", *step) for step in program)


class _Program(ctypes.Structure):
    _fields_ = (("steps", ctypes.c_ushort), ("at", ctypes.c_char_p))


def _listen(calls: frozenset[str]) -> int:
    """Have this process, and all that come of it, looked at: the descriptor to do it with. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(calls)
    no_new_privileges, set_filter, new_listener, wait_killable = 38, 1, 1 << 3, 1 << 5
    if libc.prctl(no_new_privileges, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    program = _Program(len(code) // 8, code)
    fd = libc.syscall(317, set_filter, new_listener | wait_killable, ctypes.byref(program))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(fd)


def _nurse(channel: socket.socket) -> None:
    """Fork a program at each word on ``channel``; say how it ended when nothing that came of it is there any more."""
    subreaper = 36
    ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0)
    gc.freeze()
    while True:
        word, fds, _, _ = socket.recv_fds(channel, 1 << 16, 2)
        if not word:
            return
        arguments, seen = json.loads(word)
        pid = os.fork()
        if not pid:
            for number, fd in enumerate(fds, 1):
                os.dup2(fd, number)
                os.close(fd)
            os.dup2(channel.fileno(), _FREE_FD, inheritable=False)
            with socket.socket(fileno=_FREE_FD) as free:
                channel.close()
                if seen:
                    listener = _listen(frozenset(seen))
                    socket.send_fds(free, [str(os.getpid()).encode()], [listener])
                    os.close(listener)
                else:
                    free.send(str(os.getpid()).encode())
            from fastship.cli import main

            main(arguments)
        for fd in fds:
            os.close(fd)
        status = 0
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, how = os.waitpid(-1, 0)
                if ended == pid:
                    status = os.waitstatus_to_exitcode(how)
        channel.send(f"ended {status}".encode())


# --- the test's side ---------------------------------------------------------------------------------------------


@functools.cache
def work() -> bool:
    """Whether this kernel can do it, and lets us."""
    if platform.machine() != "x86_64":
        return False
    asked = subprocess.run([sys.executable, __file__, "try"], capture_output=True)
    return asked.returncode == 0


class Program:
    """One that was started by a `Nursery`. `wait` for it."""

    def __init__(self, channel: socket.socket, look: Callable[[Call], Action] | None) -> None:
        word, fds, _, _ = socket.recv_fds(channel, 64, 1)
        self.pid = int(word)
        self._pids = {self.pid}  # that made a call
        self._sockets: dict[str, str] = {}
        self._status: int | None = None
        self._channel = channel
        self._look = look
        self._thread: threading.Thread | None = None
        if look is not None:
            self._listener = fds[0]
            self._thread = threading.Thread(target=self._follow, name="look at calls")
            self._thread.start()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def ended(self) -> bool:
        """Every process that came of it; `wait` will not block."""
        return bool(select.select([self._channel], [], [], 0)[0])

    def wait(self) -> int:
        """The exit code, as ``subprocess`` has it, once every process that came of it is gone. Raises `Stuck`."""
        self._channel.settimeout(END_S)
        try:
            word = self._channel.recv(64)
        except TimeoutError:
            self._kill_all()
            word = self._channel.recv(64)
            raise Stuck(f"it did not end within {END_S:.0f} s") from None
        finally:
            self._channel.settimeout(None)
            if self._thread is not None:
                self._thread.join()
            self._status = int(word.split()[1])
        return self._status

    def kill(self) -> None:
        """SIGKILL for all of its processes, and `wait` for their end, where nobody has."""
        if self._status is None:
            self._kill_all()
            self.wait()

    def _kill_all(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _follow(self) -> None:
        leaders: dict[int, int] = {}
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll()):
                self._answer(leaders)
        finally:
            os.close(self._listener)

    def _answer(self, leaders: dict[int, int]) -> None:
        asked = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, asked)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # it was killed meanwhile
                return
            raise
        cookie, tid, _, number, _, _, *arguments = _NOTIFICATION.unpack(asked)
        try:
            if tid not in leaders:
                leaders[tid] = _leader(tid)
            pid = leaders[tid]
            self._pids.add(pid)
            name = _NAMES[number]
            path = _path(tid, name, arguments)
            if path.startswith("socket:["):
                path = self._sockets.setdefault(path, _family(tid, path))
            call = Call(pid == self.pid, _said_name(name, arguments), path)
        except (FileNotFoundError, ProcessLookupError):
            return  # it is gone
        assert self._look is not None
        action = self._look(call)
        if action == "kill":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif action == "kill all":
            self._kill_all()
        else:
            written = _write_half(pid, tid, name, arguments) if action == "half" else 0
            errno_ = action if isinstance(action, int) else 0
            response = _RESPONSE.pack(cookie, written, -errno_, 0 if written or errno_ else _CONTINUE)
            with contextlib.suppress(FileNotFoundError):
                fcntl.ioctl(self._listener, _SEND, response)


class Nursery:
    """A process that has imported fastship and forks programs, one at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._channel = ours
        self._program: Program | None = None

    def start(
        self,
        *arguments: str | Path,
        out: Path,
        log: Path,
        look: Callable[[Call], Action] | None = None,
        calls: frozenset[str] = CHANGING,
    ) -> Program:
        """``fastship ARGUMENTS``, standard output and error at the end of these files.

        ``look`` is asked about each of ``calls`` in a thread of its own; what it kills is killed before the call.
        """
        with out.open("ab") as stdout, log.open("ab") as stderr:
            word = json.dumps([[str(one) for one in arguments], sorted(calls) if look is not None else []]).encode()
            socket.send_fds(self._channel, [word], [stdout.fileno(), stderr.fileno()])
            self._program = Program(self._channel, look)
        return self._program

    def close(self) -> None:
        if self._program is not None:
            self._program.kill()
        self._channel.close()
        self._process.wait(END_S)


def _said_name(name: str, arguments: list[int]) -> str:
    place = _OPEN_FLAGS.get(name)
    if place is None:
        return "create" if name == "creat" else name
    return "create" if arguments[place] & _CHANGING_FLAGS else "open"


def _leader(tid: int) -> int:
    for line in Path(f"/proc/{tid}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise FileNotFoundError(tid)


def _path(tid: int, name: str, arguments: list[int]) -> str:
    _, descriptor, named = _CALLS[name]
    if descriptor is not None:
        return _link(tid, arguments[descriptor] & 0xFFFFFFFF)
    if named is None:
        return "socket"
    directory, path = named
    where = arguments[directory] & 0xFFFFFFFF if directory is not None else _AT_FDCWD
    if not arguments[path]:
        return _link(tid, where)
    text = _string(tid, arguments[path])
    if text.startswith("/"):
        return text
    if not text:  # AT_EMPTY_PATH
        return _link(tid, where)
    top = os.readlink(f"/proc/{tid}/cwd") if where == _AT_FDCWD else _link(tid, where)
    return os.path.join(top, text)


def _link(tid: int, fd: int) -> str:
    try:
        return os.readlink(f"/proc/{tid}/fd/{fd}")
    except FileNotFoundError:
        os.stat(f"/proc/{tid}")
        return f"closed:[{fd}]"


def _family(tid: int, link: str) -> str:
    inode = link.removeprefix("socket:[").removesuffix("]")
    local = Path(f"/proc/{tid}/net/unix").read_text().splitlines()
    return "unix" if any(inode in line.split() for line in local) else "tcp"


def _write_half(pid: int, tid: int, name: str, arguments: list[int]) -> int:
    """Write the first half of what a call was to write in its place; how many bytes. 0: it cannot be halved."""
    pieces = _pieces(tid, name, arguments)
    data = b"".join(_memory(tid, address, size) for address, size in pieces)
    half = data[: len(data) // 2]
    if not half:
        return 0
    pidfd = os.pidfd_open(pid)
    try:
        fd = ctypes.CDLL(None).syscall(438, pidfd, arguments[0], 0)  # pidfd_getfd(2)
    finally:
        os.close(pidfd)
    if fd < 0:
        return 0
    try:
        if name.startswith("pwrite"):
            return os.pwrite(fd, half, arguments[3])
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return os.write(fd, half)
        with socket.socket(fileno=os.dup(fd)) as sock:
            streams = sock.type == socket.SOCK_STREAM
            return sock.send(half, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) if streams else 0
    except OSError:  # let it be told by the call itself
        return 0
    finally:
        os.close(fd)


def _pieces(tid: int, name: str, arguments: list[int]) -> list[tuple[int, int]]:
    """Where what a call was to write is: addresses and sizes. None of what cannot be halved."""
    if name in ("write", "pwrite64") or (name == "sendto" and not arguments[4]):
        return [(arguments[1], arguments[2])]
    if name in ("writev", "pwritev"):
        vector, count = arguments[1], arguments[2]
    elif name == "sendmsg":
        address, _, vector, count, control, _, _ = struct.unpack("=QQQQQQQ", _memory(tid, arguments[1], 56))
        if address or control:
            return []
    else:
        return []
    numbers = struct.unpack(f"={2 * count}Q", _memory(tid, vector, 16 * count))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _memory(tid: int, address: int, size: int) -> bytes:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), size, address)


def _string(tid: int, address: int) -> str:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < 4096:
            # No further than the page: the next one may not be there.
            piece = os.pread(memory.fileno(), 4096 - (address + len(data)) % 4096, address + len(data))
            if not piece:
                break
            data += piece
    return os.fsdecode(data.partition(b"\0")[0])


if __name__ == "__main__":
    if sys.argv[1] == "try":
        _listen(CHANGING)
    else:
        for name in _LOADED:
            importlib.import_module(name)
        _nurse(socket.socket(fileno=int(sys.argv[1])))
