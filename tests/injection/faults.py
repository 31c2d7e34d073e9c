"""How many faults the tests of tests/crash try, and the count of what they tried.

``FASTSHIP_FAULTS`` is the share of all points that one run tries: 1 is every one (``make crash``), the default is what
``make test`` has time for. Which ones a smaller share takes is drawn from ``FASTSHIP_SEED``, which pytest's head
tells, so that runs together come to all of them and a failure can be had again.

With ``FASTSHIP_COUNTS=DIRECTORY`` what was tried is also written there, one file a kind; ``report.py`` makes of
them the table in docs/reliability.md.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SHARE = float(os.environ.get("FASTSHIP_FAULTS", "0.01"))
SEED = int(os.environ.setdefault("FASTSHIP_SEED", str(random.SystemRandom().randrange(1, 1 << 32))))
"""In the environment, so that every process of a run that is spread over several draws the same."""


def chance(name: str) -> random.Random:
    """Random numbers of one test, the same for the same seed whatever else runs."""
    return random.Random(f"{SEED}:{name}")


def some_of(points: Sequence[T], name: str, least: int = 1) -> list[T]:
    """`SHARE` of ``points``, at least ``least`` of them, in their order, spread over all of them."""
    count = min(len(points), max(least, round(len(points) * SHARE)))
    draw = chance(name)
    edges = [len(points) * number // count for number in range(count + 1)] if count else [0]
    return [points[draw.randrange(low, high)] for low, high in itertools.pairwise(edges)]


def nearly_all(points: Sequence[T], name: str, least: int = 1) -> list[T]:
    """All of ``points``, but for the smallest shares: what costs much to begin is drawn, at least ``least`` of them."""
    return some_of(points, name, least=len(points) if SHARE >= 0.1 else least)


def times(whole: int, least: int = 1) -> int:
    """How often to repeat what a whole run does ``whole`` times."""
    return max(least, round(whole * SHARE))


def count(
    kind: str, what: str, *, of: int, tried: int, test: str, lost: int = 0, doubled: int = 0, mixed: int = 0
) -> None:
    """Tell that ``tried`` of ``of`` points were tried; once for each ``kind``.

    ``what`` is one line for the operator, ``test`` the file of the test.
    """
    row = {"kind": kind, "what": what, "of": of, "tried": tried, "lost": lost, "doubled": doubled, "mixed": mixed}
    row["test"] = test
    print(f"{kind}: {tried} of {of} tried, lost {lost}, doubled {doubled}, mixed {mixed}: {what}")
    directory = os.environ.get("FASTSHIP_COUNTS")
    if directory:
        name = "".join(letter if letter.isalnum() else "-" for letter in kind)
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"{name}.json").write_text(json.dumps(row))
