"""Make the table of faults in docs/reliability.md from what the tests counted.

    python tests/injection/report.py COUNTS_DIRECTORY docs/reliability.md

Rows of kinds that this run did not count stay as they are.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

BEGIN, END = "<!-- counted: made by `make crash` -->", "<!-- /counted -->"
HEAD = "| fault | points | tried | lost | doubled | mixed | by | on |\n|---|---:|---:|---:|---:|---:|---|---|\n"


def line(row: dict[str, str | int], where: str) -> str:
    cells = (
        f"**{row['kind']}**: {row['what']}",
        *(f"{row[name]:,}" for name in ("of", "tried", "lost", "doubled", "mixed")),
    )
    return "| " + " | ".join((*cells, f"`{row['test']}`", where)) + " |"


def kind(text: str) -> str:
    return text.partition("**:")[0]


def main() -> None:
    counts, document = Path(sys.argv[1]), Path(sys.argv[2])
    before, _, rest = document.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {kind(text): text for text in table.splitlines() if text.startswith("| **")}
    where = f"{date.today()}, Linux {platform.release().partition('-')[0]}"
    for path in sorted(counts.glob("*.json")):
        text = line(json.loads(path.read_text()), where)
        rows[kind(text)] = text
    made = HEAD + "\n".join(rows[name] for name in sorted(rows)) + "\n"
    document.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
