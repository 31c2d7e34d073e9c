"""The ways to get a backlog off a host, each as one command that is measured whole, its start included.

What always holds: a peer gets the backlog with a warm page cache and an empty sink, is checked to have delivered all of
it, and is given what its users would give it (level 3, every core), not less. What a peer does not do (verify, sync,
retire, compress, encrypt) stands in its ``note``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zstandard

from bench import measure, recordings
from bench.measure import Cost
from bench.peers.backlog import Backlog
from bench.servers import Nginx, Receiver

FASTSHIP = [sys.executable, "-m", "fastship"]


class Missing(Exception):
    """The peer cannot run here; says why and what to install."""


class Sinks(NamedTuple):
    plain: Nginx
    receiver: Receiver


class Delivered(NamedTuple):
    cost: Cost
    sink_cpu_s: float
    stored_bytes: int


class Peer(NamedTuple):
    """``remote``: into the sink, as fastship; else into a repository on the same disk."""

    name: str
    note: str
    deliver: Callable[[Backlog, Sinks, Path], Delivered]
    slow: str = ""  # "level": packs some MB/s; "episode": starts programs for each; "files": waits at each file
    compresses: bool = True
    remote: bool = True


# --- what was delivered ------------------------------------------------------------------------------------------


def _check_artifacts(artifacts: list[Path], backlog: Backlog) -> int:
    """Every artifact decompresses, is a tar, and the files in them sum up to the backlog. Bytes stored."""
    assert len(artifacts) == backlog.episode_count, f"{len(artifacts)} artifacts of {backlog.episode_count} episodes"
    found = 0
    for path in artifacts:
        with (
            open(path, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            found += sum(member.size for member in tar)
    assert found == backlog.raw_bytes, f"{found} bytes delivered of {backlog.raw_bytes}"
    return sum(path.stat().st_size for path in artifacts)


def _into_sink(backlog: Backlog, sink: Nginx | Receiver, command: list[str], env: dict[str, str]) -> Delivered:
    sink.empty()
    os.sync()  # what earlier runs left to be written is not this one's cost
    before = sink.cpu_s()
    cost, _ = measure.run(command, env=env, cwd=backlog.episodes)
    sink_cpu_s = sink.cpu_s() - before
    backlog.restore()
    return Delivered(cost, sink_cpu_s, _check_artifacts(sink.artifacts(), backlog))


# --- fastship ----------------------------------------------------------------------------------------------------


def fastship_command(backlog: Backlog, url: str, *values: str) -> list[str]:
    settings = [f"spool.root={backlog.spool}", f"destination.url={url}", "log.level=error", *values]
    return [*FASTSHIP, "once", "--json", "--quiet", *(part for value in settings for part in ("--set", value))]


def _fastship_plain(backlog: Backlog, sinks: Sinks, _work: Path) -> Delivered:
    command = fastship_command(backlog, sinks.plain.url, "destination.proof=status")
    return _into_sink(backlog, sinks.plain, command, {})


def _fastship_receiver(backlog: Backlog, sinks: Sinks, _work: Path) -> Delivered:
    sink = sinks.receiver
    sink.empty()
    os.sync()
    before = sink.cpu_s()
    cost, out = measure.run(fastship_command(backlog, sink.url))
    sink_cpu_s = sink.cpu_s() - before
    assert json.loads(out)["shipped"] == backlog.episode_count
    backlog.restore()
    return Delivered(cost, sink_cpu_s, _check_artifacts(sink.artifacts(), backlog))


# --- programs everybody has --------------------------------------------------------------------------------------


def _original(level: int) -> Callable[[Backlog, Sinks, Path], Delivered]:
    def deliver(backlog: Backlog, sinks: Sinks, _work: Path) -> Delivered:
        command = [sys.executable, "-m", "bench.peers.original", "--level", str(level)]
        command += ["--spool", str(backlog.spool), "--url", sinks.plain.url]
        checkout = Path(__file__).parents[2]
        return _into_sink(backlog, sinks.plain, command, {"PYTHONPATH": str(checkout)})

    return deliver


_TEE = """set -euo pipefail
for e in *; do
  tar -cf - "$e" | zstd -q -T0 -3 | tee "$WORK/a.tar.zst" | sha256sum > "$WORK/a.sha256"
  digest="X-Content-SHA256: $(cut -c1-64 "$WORK/a.sha256")"
  curl -fsS -o "$WORK/answer" -H "$digest" -T "$WORK/a.tar.zst" "$URL/$e.tar.zst"
done"""
_STREAM = """set -euo pipefail
for e in *; do tar -cf - "$e" | zstd -q -T0 -3 | curl -fsS -o "$WORK/answer" -T - "$URL/$e.tar.zst"; done"""
_STREAM_TWO = """set -euo pipefail
ls | xargs -P "$(nproc)" -I{} bash -c 'set -euo pipefail
  tar -cf - "$1" | zstd -q -T1 -3 | curl -fsS -o "$WORK/answer.$$" -T - "$URL/$1.tar.zst"; rm "$WORK/answer.$$"' _ {}"""


def _shell(script: str, *programs: str) -> Callable[[Backlog, Sinks, Path], Delivered]:
    def deliver(backlog: Backlog, sinks: Sinks, work: Path) -> Delivered:
        _require(*programs)
        env = {"URL": sinks.plain.url, "WORK": str(work)}
        return _into_sink(backlog, sinks.plain, ["bash", "-c", script], env)

    return deliver


# --- rclone ------------------------------------------------------------------------------------------------------


def _rclone(sinks: Sinks) -> tuple[str, dict[str, str]]:
    if not sinks.plain.webdav:
        raise Missing("rclone's WebDAV needs PROPFIND of nginx: apt install libnginx-mod-http-dav-ext")
    try:
        program = recordings.rclone()
    except recordings.NotFetched as error:
        raise Missing(str(error)) from None
    env = {"RCLONE_CONFIG": "/dev/null", "RCLONE_WEBDAV_URL": sinks.plain.url, "RCLONE_WEBDAV_VENDOR": "other"}
    return str(program), env


def _rclone_copy(backlog: Backlog, sinks: Sinks, _work: Path) -> Delivered:
    program, env = _rclone(sinks)
    sink = sinks.plain
    sink.empty()
    os.sync()
    before = sink.cpu_s()
    cost, _ = measure.run([program, "copy", "-q", str(backlog.episodes), ":webdav:"], env=env)
    sink_cpu_s = sink.cpu_s() - before
    stored = sum(path.stat().st_size for path in sink.store.rglob("*") if path.is_file())
    assert stored == backlog.raw_bytes, f"{stored} bytes of {backlog.raw_bytes}"
    return Delivered(cost, sink_cpu_s, stored)


def _rclone_archive(backlog: Backlog, sinks: Sinks, _work: Path) -> Delivered:
    program, env = _rclone(sinks)
    script = (
        'set -euo pipefail; for e in *; do "$RCLONE" archive create -q --prefix "$e" "$e" ":webdav:$e.tar.zst"; done'
    )
    return _into_sink(backlog, sinks.plain, ["bash", "-c", script], {**env, "RCLONE": program})


# --- backup programs ---------------------------------------------------------------------------------------------


def _restic(backlog: Backlog, _sinks: Sinks, work: Path) -> Delivered:
    _require("restic")
    repository = work / "restic"
    env = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(repository), "RESTIC_CACHE_DIR": str(work / "cache")}
    measure.run(["restic", "init", "-q", "--repository-version", "2"], env=env)
    os.sync()
    cost, _ = measure.run(["restic", "backup", "-q", "."], env=env, cwd=backlog.episodes)
    _, out = measure.run(["restic", "stats", "--json", "--mode", "restore-size"], env=env)
    assert json.loads(out)["total_size"] >= backlog.raw_bytes
    return Delivered(cost, 0.0, _take_repository(repository, work / "cache"))


def _borg(backlog: Backlog, _sinks: Sinks, work: Path) -> Delivered:
    _require("borg")
    repository = work / "borg"
    env = {"BORG_REPO": str(repository), "BORG_BASE_DIR": str(work / "cache"), "LC_ALL": "C.UTF-8"}
    env["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
    measure.run(["borg", "init", "--encryption", "none"], env=env)
    os.sync()
    cost, _ = measure.run(
        ["borg", "create", "--compression", "zstd,3", "::backlog", "."], env=env, cwd=backlog.episodes
    )
    _, out = measure.run(["borg", "info", "--json", "::backlog"], env=env)
    assert json.loads(out)["archives"][0]["stats"]["original_size"] >= backlog.raw_bytes
    return Delivered(cost, 0.0, _take_repository(repository, work / "cache"))


def _take_repository(repository: Path, cache: Path) -> int:
    stored = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())
    shutil.rmtree(repository)
    shutil.rmtree(cache, ignore_errors=True)
    return stored


_PACKAGES = {"restic": "restic", "borg": "borgbackup", "zstd": "zstd", "curl": "curl", "tar": "tar"}


def _require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed: apt install {_PACKAGES[program]}")


def program_versions() -> dict[str, str]:
    """What each program says of itself, in a few words."""
    found = {}
    commands = {
        "nginx": ["/usr/sbin/nginx", "-v"],
        "tar": ["tar", "--version"],
        "zstd": ["zstd", "--version"],
        "curl": ["curl", "--version"],
        "restic": ["restic", "version"],
        "borg": ["borg", "--version"],
    }
    for name, command in commands.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            words = (done.stdout or done.stderr).splitlines()[0].replace("v", " ").replace("/", " ").replace(",", " ")
            found[name] = next((word for word in words.split() if word[0].isdigit()), "?")
    found["rclone"] = recordings.RCLONE.requirement.rpartition("=")[2]
    return found


_NO_PROOF = "believes the answer's status, keeps no receipt, retires nothing"
PEERS = (
    Peer(
        "fastship",
        "to the plain sink, which proves nothing: proof=status; syncs, keeps a receipt, retires",
        _fastship_plain,
    ),
    Peer(
        "fastship to its receiver",
        "the receiver, on the same cores, digests, decompresses, compares and syncs before it answers",
        _fastship_receiver,
    ),
    Peer("original, -3", f"the original's pipeline at level 3; {_NO_PROOF} but a rename", _original(3), "episode"),
    Peer("original, -19", "the original's pipeline as it was", _original(19), "level"),
    Peer(
        "tar, zstd -T0 -3, tee, sha256sum; curl -T",
        f"a shell loop, one episode after the other; {_NO_PROOF}",
        _shell(_TEE, "tar", "zstd", "curl"),
        "episode",
    ),
    Peer(
        "tar, zstd -T0 -3, curl -T -",
        f"the same without a file in between and without a digest; {_NO_PROOF}",
        _shell(_STREAM, "tar", "zstd", "curl"),
        "episode",
    ),
    Peer(
        "tar, zstd -T1 -3, curl -T -, xargs -P",
        f"the same, one episode a core at a time; {_NO_PROOF}",
        _shell(_STREAM_TWO, "tar", "zstd", "curl"),
        "episode",
    ),
    Peer(
        "rclone archive create",
        f"tar.zst at rclone's own level, straight to WebDAV; {_NO_PROOF}",
        _rclone_archive,
        "episode",
    ),
    Peer(
        "rclone copy",
        "every file by itself to WebDAV, not compressed; about 34 ms a file, the same with --transfers 16 or"
        f" --no-check-dest: it spaces its requests; {_NO_PROOF}",
        _rclone_copy,
        "files",
        compresses=False,
    ),
    Peer(
        "restic backup",
        "all episodes as one snapshot into a repository on the same disk, no network; deduplicates, encrypts, syncs",
        _restic,
        remote=False,
    ),
    Peer(
        "borg create, zstd,3",
        "as restic, and does not encrypt",
        _borg,
        remote=False,
    ),
)
