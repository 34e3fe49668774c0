"""docs/metrics.md holds every metric name that the code writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("archive", "reward", "length", "loss", "policy", "offpolicy", "mismatch", "staleness", "queue", "throughput",
         "time", "compute", "channel", "weights", "eval", "groups", "tokens", "learner", "generator", "value",
         "memory", "budget", "cost", "behaviour", "hacking", "scores")  # fmt: skip
NAME = re.compile(rf"(?:{'|'.join(AREAS)})(?:/[a-z0-9_*]+)+")


def documented() -> set[str]:
    """The names in backticks; `<…>` matches anything, `…_x` takes the beginning of the name before it."""
    found: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        last = ""
        for name in re.findall(r"`([^`]+)`", line):
            full = re.sub(r"_[a-z0-9]+$", "", last) + name.removeprefix("…") if name.startswith("…") else name
            last = full
            found.add(re.sub(r"<[a-z]+>", "*", full))
    return found


def written() -> dict[str, str]:
    """Metric names in string literals and f-strings (a value becomes *), with the file that holds them."""
    found: dict[str, str] = {}
    for path in [p for folder in ("platform", "algos") for p in (ROOT / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
            else:
                continue
            if NAME.fullmatch(text):
                found[text] = str(path.relative_to(ROOT))
    return found


def covered(name: str, table: set[str]) -> bool:
    return any(re.fullmatch(row.replace("*", ".+"), name) for row in table) or any(
        re.fullmatch(name.replace("*", ".+"), row) for row in table
    )


def test_every_metric_that_is_written_is_documented():
    names, table = written(), documented()
    assert {"reward/accuracy", "staleness/max", "offpolicy/abs_dlogp_p*"} <= set(names)
    missing = {name: path for name, path in names.items() if not covered(name, table)}
    assert not missing, f"add to docs/metrics.md: {missing}"


def test_an_undocumented_name_would_be_found():
    table = documented()
    assert not covered("policy/unheard_of", table)
    assert covered("offpolicy/abs_dlogp_p95", table)
    assert covered("eval/*", table)
