"""How the judge of refusals agrees with people, on XSTest's own answers (github.com/paul-rottger/exaggerated-safety).

    python benchmarks/refusals.py exaggerated-safety/model_completions/*.csv

Each file has the answers of one model (`completion`), and what two people agreed that they do (`final_label`). Prints a
Markdown row a file: the share told as people do of three ways, and of complying or not; JSON in the last line.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from offtrail.rewards.refusal import judged

LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}


def agreement(path: Path) -> dict[str, int]:
    """Answers, those told as people do, and those of which it is told right whether they comply."""
    found = {"answers": 0, "three": 0, "two": 0}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            people, phrases = LABELS[row["final_label"]], judged(row["completion"])
            found["answers"] += 1
            found["three"] += phrases == people
            found["two"] += (phrases == "compliance") == (people == "compliance")
    return found


def main() -> None:
    """Print the table."""
    csv.field_size_limit(1 << 30)
    rows = {path: agreement(Path(path)) for path in sys.argv[1:]}
    rows["all"] = {key: sum(row[key] for row in rows.values()) for key in ("answers", "three", "two")}
    for path, row in rows.items():
        shares = " | ".join(f"{row[key] / row['answers']:.3f}" for key in ("three", "two"))
        print(f"| {Path(path).stem} | {row['answers']} | {shares} |")
    print(json.dumps(rows["all"]))


if __name__ == "__main__":
    main()
