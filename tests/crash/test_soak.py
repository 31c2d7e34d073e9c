"""A long run: everything at once over one spool and one receiver, and then every episode looked at.

Seconds in ``make test``, a minute at ``FASTSHIP_FAULTS=0.1``, ten at 1; with ``FASTSHIP_SOAK_S`` as many as one likes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import faults
import pytest
from soak import Sample, Soak

SECONDS = float(os.environ.get("FASTSHIP_SOAK_S", 600.0 * faults.SHARE if faults.SHARE >= 0.1 else 3.0))
KILLS = {
    "kill_supervisor": 3, "kill_all": 1, "kill_worker": 4, "drain": 2, "reload": 2, "stop_for_a_while": 2,
    "kill_receiver": 3, "end_receiver": 1, "cut": 4, "stall": 2, "rotate": 2, "nothing": 2,
}  # fmt: skip
NO_KILLS = {"cut": 4, "stall": 2, "rotate": 2, "stop_for_a_while": 2, "nothing": 4}
SLACK = Sample(rss_bytes=48 << 20, descriptors=40, threads=16)
"""What a process may have more of at the end than after a quarter, besides a quarter of what it had: heaps and pools
that are not at their largest yet. A leak of a descriptor or a thread each time is far more over ten minutes."""


@pytest.mark.timeout(2 * SECONDS + 300)
def test_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))  # of the processes
    monkeypatch.setattr(tempfile, "tempdir", None)
    with contextlib.closing(Soak(tmp_path, faults.chance("soak"))) as soak:
        soak.run(SECONDS / 2, KILLS)
        # The second half leaves the processes alone, to see whether they grow.
        soak.run(SECONDS / 8, NO_KILLS)
        soak.settle()
        soak.sample()
        soak.run(3 * SECONDS / 8, NO_KILLS)
        soak.settle()
        soak.sample()
        wrong = soak.compare()
        told = f"{len(soak.recorded)} episodes, {soak.done}; see {tmp_path}/soak.log"
        print(told)
        assert not any(wrong.values()), f"{wrong}; {told}"
        assert "Traceback" not in soak.log(), told
        early, late = soak.samples
        for role, before in early.items():
            after = late[role]
            for field in Sample._fields:
                most = 1.25 * getattr(before, field) + getattr(SLACK, field)
                assert getattr(after, field) <= most, f"{role} grew: {before} -> {after}; {told}"
        files = soak.files()
        assert files["outbox, not of an episode held"] == files["condemned"] == 0, files
        assert files["temporaries"] <= 1, files  # the status being written
        assert files["state"] <= 8, files
        # Of requests that were cut: forgotten by their age, and one at most for each.
        counted = sum(soak.done.values())
        assert len(list((soak.receiver.root / "uploads").glob("*.part"))) <= counted
        assert len(list(scratch.iterdir())) <= 2, sorted(scratch.iterdir())
        growth = {role: f"{early[role].rss_bytes >> 20} -> {late[role].rss_bytes >> 20} MiB" for role in early}
    faults.count(
        "soak: faults",
        f"kills, signals, cuts, stalls and rotated tokens in {SECONDS:.0f} s, {len(soak.recorded)} episodes of all "
        f"kinds recorded meanwhile and each looked at; memory after a quarter -> at the end: {growth}",
        of=counted,
        tried=counted,
        lost=len(wrong["lost"]),
        doubled=len(wrong["doubled"]),
        mixed=len(wrong["mixed"]),
        test="tests/crash/test_soak.py",
    )
