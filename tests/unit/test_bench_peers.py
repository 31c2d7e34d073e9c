"""The table and the chart of the peers, and the backlog that each of them finds as the one before did."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.corpus import Corpus
from bench.measure import CommandFailed, Cost, run
from bench.peers import backlog, report
from bench.peers.backlog import Backlog
from bench.peers.programs import Delivered, Peer


def peer(name: str) -> Peer:
    return Peer(name, "a note", lambda *_: pytest.fail("not run here"))


def table(*speeds: tuple[str, float]) -> report.Table:
    whole = Backlog(Path("/nowhere"), 10, 100_000_000)
    piece = Backlog(Path("/nowhere/piece"), 1, 10_000_000)
    rows = []
    for name, wall_s in speeds:
        delivered = [Delivered(Cost(wall_s * factor, 2.0, 1 << 20), 0.5, 5_000_000) for factor in (1, 2, 3)]
        rows.append(report.Row.of(peer(name), piece if "slow" in name else whole, whole, delivered))
    return report.Table("small", 10, whole.raw_bytes, rows, {"absent": "not installed: apt install absent"})


CONDITIONS = {
    "cores": 2, "cpu": "a <cpu>", "memory_gib": 8, "kernel": "6", "python": "3.11",
    "load_before": 0.1, "load_after": 0.2, "scale": 1.0, "rounds": 3,
}  # fmt: skip


def test_a_row_has_the_median_and_scales_a_piece_by_bytes() -> None:
    ours, slow = table(("fastship", 1.0), ("slow", 1.0)).rows
    assert (ours.wall_s, ours.megabytes_per_s, ours.spread, ours.piece) == (2.0, 50.0, 3.0, "")
    assert (ours.cpu_s_a_gb, ours.ratio, ours.peak_mib) == (20.0, 20.0, 1.0)
    assert (slow.wall_s, slow.megabytes_per_s, slow.piece) == (20.0, 5.0, "1 episodes, 10 MB")


def test_the_table_says_how_far_ahead_and_what_was_left_out() -> None:
    text = report.markdown([table(("fastship", 1.0), ("other", 2.0), ("slow", 1.0))], CONDITIONS, {}, chart="c.svg")
    assert "| other | 4.00 | 25.0 | 2.5 | 2.00 x |" in text
    assert "| slow | 20.00\\* |" in text
    assert "Beside the best peer that compresses and ships (other): fastship 2.00 x." in text
    assert "Left out: absent: not installed: apt install absent" in text


def test_the_chart_is_well_formed_and_has_a_bar_for_each() -> None:
    root = ElementTree.fromstring(report.chart([table(("fastship", 1.0), ("a & b <c>", 200.0))]))
    bars = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("x")]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert len(widths) == 2
    assert widths[0] > widths[1] > 0


def test_what_others_wrote_around_the_section_stays(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "benchmarks.md"
    report.replace_section(path, "first")
    path.write_text("Above.\n" + path.read_text() + "Below.\n")
    report.replace_section(path, "second")
    text = path.read_text()
    assert text.startswith("Above.\n")
    assert text.endswith("Below.\n")
    assert "second" in text
    assert "first" not in text


def test_a_backlog_is_put_back_as_it_was(tmp_path: Path) -> None:
    whole = backlog.make(tmp_path, "small", 0.01, Corpus(pool_bytes=1 << 18))
    before = sorted(path.relative_to(whole.spool) for path in whole.spool.rglob("*"))
    (whole.spool / "shipped").mkdir()
    for episode in whole.episodes.iterdir():
        episode.rename(whole.spool / "shipped" / episode.name)
    (whole.spool / "outbox").mkdir()
    whole.restore()
    assert sorted(path.relative_to(whole.spool) for path in whole.spool.rglob("*")) == before
    assert (whole.episode_count, whole.raw_bytes) == (2, 2 * 64 * 16_384)


def test_a_sample_is_smaller_and_the_whole_where_that_is_small_enough(tmp_path: Path) -> None:
    corpus = Corpus(pool_bytes=1 << 18)
    whole = backlog.make(tmp_path, "small", 0.02, corpus)
    assert backlog.sample(whole, tmp_path / "s", "small", corpus, most_bytes=1 << 30, most_episodes=9) is whole
    piece = backlog.sample(whole, tmp_path / "s", "small", corpus, most_bytes=1 << 30, most_episodes=3)
    assert (piece.episode_count, piece.raw_bytes) == (3, 3 * 64 * 16_384)
    one = backlog.sample(whole, tmp_path / "s", "small", corpus, most_bytes=500_000, most_episodes=9)
    assert one.episode_count == 1
    assert 0 < one.raw_bytes <= 500_000


def test_a_commands_cost_has_the_cpu_and_memory_of_what_it_started() -> None:
    script = "x = bytearray(60_000_000); sum(range(5_000_000)); import time; time.sleep(0.3)"
    cost, out = run(["bash", "-c", f'echo begun; python3 -c "{script}" & wait'])
    assert out == b"begun\n"
    assert cost.cpu_s > 0.02
    assert cost.peak_bytes > 60_000_000
    with pytest.raises(CommandFailed, match="exit 3: why"):
        run(["bash", "-c", "echo why >&2; exit 3"])
