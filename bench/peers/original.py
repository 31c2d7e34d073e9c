"""The pipeline of the tool that fastship replaces, re-made from its description to be measured: not for use.

One episode at a time: ``tarfile`` into the program ``zstd -T0 -LEVEL``, to ``.partial``, renamed; the artifact read
again for its SHA-256; one PUT; the episode moved to ``shipped/``, the artifact removed.

    python -m bench.peers.original --spool DIR --url URL --level 19
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import subprocess
import tarfile
from pathlib import Path
from urllib.parse import urlsplit


def pack(episode: Path, outbox: Path, level: int) -> Path:
    artifact = outbox / f"{episode.name}.tar.zst"
    partial = artifact.with_name(artifact.name + ".partial")
    partial.unlink(missing_ok=True)
    command = ["zstd", "-q", "-T0", f"-{level}", "-o", str(partial)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with tarfile.open(fileobj=process.stdin, mode="w|") as tar:
            tar.add(episode, arcname=episode.name)
        process.stdin.close()
        if process.wait():
            raise SystemExit(f"zstd failed on {episode}")
    partial.rename(artifact)
    return artifact


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def put(url: str, artifact: Path, digest: str) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    try:
        with open(artifact, "rb") as file:
            fields = {"Content-Length": str(artifact.stat().st_size), "X-Content-SHA256": digest}
            connection.request("PUT", f"/{artifact.name}", file, fields)
            answer = connection.getresponse()
            answer.read()
            return answer.status
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--level", type=int, default=19)
    arguments = parser.parse_args()
    outbox, shipped = arguments.spool / "outbox", arguments.spool / "shipped"
    outbox.mkdir(exist_ok=True)
    shipped.mkdir(exist_ok=True)
    count = 0
    for episode in sorted((arguments.spool / "episodes").iterdir()):
        if not (episode / "done.marker").exists():
            continue
        artifact = pack(episode, outbox, arguments.level)
        status = put(arguments.url, artifact, sha256(artifact))
        if status not in (200, 201):
            raise SystemExit(f"{episode.name}: {status}")
        os.rename(episode, shipped / episode.name)
        artifact.unlink()
        count += 1
    print(json.dumps({"shipped": count}))


if __name__ == "__main__":
    main()
