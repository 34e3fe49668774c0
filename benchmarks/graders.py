"""How the graders agree with other projects' test cases: a JSON object a line with gold, pred, expected, source, kind.

    python benchmarks/graders.py CASES.jsonl

`pred` is the answer itself or, of kind "response" or with one box in it, a text in which the answer is looked for.
Prints a Markdown row for each reason for which a policy departs from its source, and JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offtrail.rewards.answer import boxed
from offtrail.rewards.grading import grade

BRACKETS = re.compile(r"\[([^\[\]]*)\]\.?$")
TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
DECIDED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "SkyRL: 0.5 for 1/2": lambda case: case["source"].startswith("NovaSky") and not case["expected"],
    "an extraction of LaTeX alone": lambda case: case.get("options", {}).get("match_types") == ["latex"],
    "rounded to 2 decimals": lambda case: case.get("options", {}).get("precision") == 2,
}
"""Departures of the lenient policy, which are decided: exact values, and no notation left out."""


def answer_of(case: dict[str, Any]) -> str:
    """The answer part of a case, empty where there is none."""
    pred = re.sub(r"<\|im_start\|>user$", "", case["pred"] or "")
    if "<answer>" in pred:
        found = TAGS.findall(pred)
        return found[0] if len(found) == 1 else ""
    if pred.count("\\boxed{") == 1 or (case["kind"] == "response" and "\\boxed" in pred):
        return boxed(pred) or ""
    if case["kind"] == "response" and (match := BRACKETS.search(pred)):
        return match[1]
    return pred


def judged(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case with what both policies say of it."""
    found = []
    for case in cases:
        gold, answer = case["gold"] or "", answer_of(case)
        strict, lenient = (grade(gold, answer, "math", lenient=policy) for policy in (False, True))
        found.append(case | {"answer": answer, "strict": strict, "lenient": lenient})
    return found


def departures(cases: list[dict[str, Any]], policy: str) -> Counter[str]:
    """Reason → cases in which ``policy`` departs from what the project expects, and why."""
    return Counter(case[policy].why for case in cases if case[policy].right != case["expected"])


def undecided(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases in which lenient departs though nothing was decided."""
    odd = [case for case in cases if case["lenient"].right != case["expected"]]
    return [case for case in odd if not any(rule(case) for rule in DECIDED.values())]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, help="JSON Lines")
    written = parser.parse_args().cases.read_text(encoding="utf-8")
    cases = judged([json.loads(line) for line in written.splitlines()])
    table = {policy: departures(cases, policy) for policy in ("strict", "lenient")}
    for policy, reasons in table.items():
        for why, count in reasons.most_common():
            print(f"| {policy} | {why} | {count} |")
    for case in cases:
        if case["strict"].right and not case["expected"]:
            print("strict takes what its source refuses:", case["source"], case["gold"], case["answer"])
    agreed = {policy: len(cases) - sum(reasons.values()) for policy, reasons in table.items()}
    print(json.dumps({"cases": len(cases), **agreed, "undecided": len(undecided(cases))}))


if __name__ == "__main__":
    main()
