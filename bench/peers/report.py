"""The table and the chart of a run, as Markdown and SVG, written by plain Python."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench import measure
from bench.peers.backlog import Backlog
from bench.peers.programs import Delivered, Peer

_BEGIN = "<!-- made by `make bench-peers`: begin; what stands between the marks is overwritten -->"
_END = "<!-- made by `make bench-peers`: end -->"


_COLUMNS = (
    "peer",
    "wall s",
    "MB/s",
    "episodes/s",
    "fastship is",
    "CPU s/GB",
    "sink CPU s/GB",
    "ratio",
    "memory MiB",
    "spread",
)


class Row(NamedTuple):
    peer: str
    note: str
    compresses: bool
    remote: bool
    rounds: int
    wall_s: float  # of all of the backlog, scaled up where only a piece was delivered
    megabytes_per_s: float  # of raw data
    spread: float  # slowest over fastest round
    cpu_s_a_gb: float  # of the peer
    sink_cpu_s_a_gb: float
    ratio: float  # raw over stored
    peak_mib: float
    piece: str  # "" or what was delivered instead of all
    episodes_per_s: float

    @classmethod
    def of(cls, peer: Peer, piece: Backlog, whole: Backlog, delivered: Sequence[Delivered]) -> Row:
        cost = measure.median([one.cost for one in delivered])
        walls = [one.cost.wall_s for one in delivered]
        sink = statistics.median(one.sink_cpu_s for one in delivered)
        partial = piece is not whole
        return cls(
            peer=peer.name,
            note=peer.note,
            compresses=peer.compresses,
            remote=peer.remote,
            rounds=len(delivered),
            wall_s=cost.wall_s * whole.raw_bytes / piece.raw_bytes,
            megabytes_per_s=cost.megabytes_per_s(piece.raw_bytes),
            spread=max(walls) / min(walls),
            cpu_s_a_gb=cost.a_gigabyte(piece.raw_bytes),
            sink_cpu_s_a_gb=sink * 1e9 / piece.raw_bytes,
            ratio=piece.raw_bytes / delivered[-1].stored_bytes,
            peak_mib=cost.peak_bytes / measure.MIB,
            piece=f"{piece.episode_count} episodes, {piece.raw_bytes / 1e6:.0f} MB" if partial else "",
            episodes_per_s=piece.episode_count / cost.wall_s,
        )


class Table(NamedTuple):
    shape: str
    episodes: int
    raw_bytes: int
    rows: list[Row]
    missing: dict[str, str]


def plain(table: Table) -> dict[str, Any]:
    return {**table._asdict(), "rows": [row._asdict() for row in table.rows]}


def markdown(tables: Sequence[Table], conditions: Mapping[str, Any], versions: Mapping[str, str], *, chart: str) -> str:
    on = "{cores} cores of {cpu}, {memory_gib} GiB, Linux {kernel}, Python {python}".format_map(conditions)
    load = f"load {conditions['load_before']} before and {conditions.get('load_after', '?')} after the run"
    lines = [
        "## Beside its peers",
        "",
        f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by `make bench-peers` on {on}; {load}.",
        f"Scale {conditions['scale']:g}, medians of {conditions['rounds']} interleaved rounds, page cache warm,",
        "disk synced before each. Sink: nginx on loopback, one worker, PUT, no digest, no sync. Each peer is measured",
        "whole, its start included.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        f"![MB/s of raw data, by shape]({chart})",
        "",
        "MB are 1e6 bytes of raw data. CPU is the peer's own, all its processes; the sink's is beside it. Memory is",
        "the sum of all processes alive at once. Spread is the slowest round over the fastest. `*`: only a piece was",
        "delivered, stated below the table, and the wall time is scaled by bytes.",
    ]
    for table in tables:
        lines += ["", f"### {table.shape}: {table.episodes} episodes, {table.raw_bytes / 1e6:.0f} MB", ""]
        lines += [
            _row(_COLUMNS),
            _row(["---", *["--:"] * (len(_COLUMNS) - 1)]),
        ]
        base = next((row.megabytes_per_s for row in table.rows if row.peer == "fastship"), None)
        for row in table.rows:
            lines.append(
                _row(
                    [
                        row.peer,
                        f"{row.wall_s:.2f}" + ("\\*" if row.piece else ""),
                        f"{row.megabytes_per_s:.1f}",
                        f"{row.episodes_per_s:.1f}",
                        f"{base / row.megabytes_per_s:.2f} x" if base else "",
                        f"{row.cpu_s_a_gb:.2f}",
                        f"{row.sink_cpu_s_a_gb:.2f}",
                        f"{row.ratio:.2f}",
                        f"{row.peak_mib:.0f}",
                        f"{row.spread:.2f}",
                    ]
                )
            )
        lines += ["", _best(table)]
        pieces: dict[str, list[str]] = {}
        for row in table.rows:
            if row.piece:
                pieces.setdefault(row.piece, []).append(row.peer)
        lines += [f"`*` {piece}: {', '.join(peers)}." for piece, peers in pieces.items()]
        lines += [f"Left out: {name}: {why}" for name, why in table.missing.items()]
    lines += ["", "### What each of them does", ""]
    notes = {row.peer: row.note for table in tables for row in table.rows}
    lines += [f"- **{name}**: {note}." for name, note in notes.items()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _best(table: Table) -> str:
    """How far ahead of the best peers that compress: into the same sink, and into a repository on the same disk."""
    ours = {row.peer: row for row in table.rows if row.peer.startswith("fastship")}
    told = []
    for where, remote in (("that compresses and ships", True), ("with a local repository", False)):
        peers = [row for row in table.rows if row.compresses and row.remote == remote and row.peer not in ours]
        if peers and ours:
            best = max(peers, key=lambda row: row.megabytes_per_s)
            times = [f"{name} {row.megabytes_per_s / best.megabytes_per_s:.2f} x" for name, row in ours.items()]
            told.append(f"Beside the best peer {where} ({best.peer}): {', '.join(times)}.")
    return "\n".join(told)


def replace_section(path: Path, text: str) -> None:
    """Put ``text`` between the marks of the file; what others wrote around them stays."""
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
    except FileNotFoundError:
        before, after = "# Benchmarks\n\nMeasured, not promised. How to run them: `bench/README.md`.\n\n", "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}", encoding="utf-8")


_WIDTH, _LEFT, _BAR, _GAP = 900, 320, 18, 5


def chart(tables: Sequence[Table]) -> str:
    """Bars of MB/s on a logarithmic axis, one group a shape, fastship's in another colour."""
    speeds = [row.megabytes_per_s for table in tables for row in table.rows]
    low, high = min(speeds), max(speeds)
    floor = math.floor(math.log10(low))
    span = max(math.ceil(math.log10(high * 1.001)) - floor, 1)

    def x(speed: float) -> float:
        return _LEFT + (math.log10(speed) - floor) / span * (_WIDTH - _LEFT - 70)

    parts: list[str] = []
    y = 10
    for table in tables:
        y += 22
        title = f"{table.shape}: {table.episodes} episodes, {table.raw_bytes / 1e6:.0f} MB"
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 10
        for row in sorted(table.rows, key=lambda row: -row.megabytes_per_s):
            colour = "#1b7f5c" if row.peer.startswith("fastship") else "#8a94a6"
            end = x(row.megabytes_per_s)
            name = escape(row.peer + "*" * bool(row.piece))
            parts.append(
                f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>'
                f'<rect x="{_LEFT}" y="{y}" width="{max(end - _LEFT, 1):.1f}" height="{_BAR}" fill="{colour}"/>'
                f'<text x="{end + 6:.1f}" y="{y + 13}">{row.megabytes_per_s:.3g}</text>'
            )
            y += _BAR + _GAP
    lines = []
    for power in range(floor, floor + span + 1):
        at = x(10**power)
        lines.append(f'<line x1="{at:.1f}" y1="20" x2="{at:.1f}" y2="{y}" stroke="#e3e6ec"/>')
        lines.append(f'<text x="{at:.1f}" y="{y + 16}" text-anchor="middle">{10**power:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{y + 34}" text-anchor="middle">MB/s of raw data (log)</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 46}" width="{_WIDTH}" height="{y + 46}"'
        ' font-family="sans-serif" font-size="12" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(lines + parts) + "\n</svg>\n"
    )
