"""How the judge of refusals agrees with people, on XSTest's own answers (github.com/paul-rottger/exaggerated-safety).

    python benchmarks/refusals.py exaggerated-safety/model_completions/*.csv

Each file has the answers of one model (`completion`), and what two people agreed that they do (`final_label`). Prints a
Markdown row a file: the share told as people do of three ways, and of complying or not; JSON in the last line.
"""

from __future__ import annotations

import argparse
import csv
import json
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="the answers of one model each, CSV")
    csv.field_size_limit(1 << 30)
    rows = [(path.stem, agreement(path)) for path in parser.parse_args().files]
    whole = {key: sum(row[key] for _, row in rows) for key in ("answers", "three", "two")}
    for name, row in [*rows, ("all", whole)]:
        shares = " | ".join(f"{row[key] / row['answers']:.3f}" for key in ("three", "two"))
        print(f"| {name} | {row['answers']} | {shares} |")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
