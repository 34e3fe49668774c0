"""A driver of two rounds from outside the tree, through the real command: other group sizes, and exact repeats."""

from __future__ import annotations

import os
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "drivers.md"
TWO_ROUNDS = ("search=two_rounds:TwoRounds", "search.flexible=true", "search.settings.more=3")


@pytest.fixture(scope="module")
def environment(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Beside the two-round driver, the example of docs/extending/drivers.md."""
    folder = tmp_path_factory.mktemp("outside")
    [example] = re.findall(r"```python\n(# my_drivers\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "my_drivers.py").write_text(example)
    return environment | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1] / "outside")])}


def ledger(run_dir: Path, query: str) -> list[Any]:
    with sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True) as connection:
        return connection.execute(query).fetchall()


def test_a_driver_of_two_rounds_trains_under_a_bound(launch: Any) -> None:
    run = launch("bound", *TWO_ROUNDS, "staleness.max=2")
    assert run.code == 0, run.output
    assert run.summary["status"] == "completed"
    assert run.summary["groups/lost"] == run.summary["groups/duplicated"] == 0
    # G/2 = 2 samples of the first round and 3 of the second, in 4 learner steps of 4 groups
    assert ledger(run.run_dir, "SELECT samples, count(*) FROM groups WHERE batch IS NOT NULL GROUP BY 1") == [(5, 16)]


@pytest.mark.prove
def test_a_driver_of_two_rounds_repeats_bit_for_bit_in_exact_mode(launch: Any) -> None:
    exact = (*TWO_ROUNDS, "staleness.mode=exact", "staleness.max=1")
    first, second = launch("first", *exact), launch("second", *exact)
    assert (first.code, second.code) == (0, 0), first.output + second.output
    versions = [ledger(run.run_dir, "SELECT checksum FROM versions ORDER BY version") for run in (first, second)]
    assert versions[0] == versions[1]
    assert len(set(versions[0])) == 5  # versions 0…4: each step moved the weights


def test_the_example_of_the_docs_asks_again_where_no_answer_is_right(launch: Any) -> None:
    again = ("search=my_drivers:SecondTry", "search.flexible=true", "search.settings.more=2")
    run = launch("again", *again, "learner.steps=2")
    assert run.code == 0, run.output
    sizes = ledger(run.run_dir, "SELECT DISTINCT samples FROM groups WHERE batch IS NOT NULL ORDER BY 1")
    assert sizes == [(4,), (6,)]
