"""The real command on a model that cannot answer: the run goes to its end and says what did not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_a_random_model_without_a_right_answer_is_said_to_learn_nothing(launch: Any, start_dir: Path) -> None:
    run = launch("stuck", f"model.path={start_dir}", "learner.steps=3", "sampling.max_new_tokens=4")
    assert run.code == 0, run.output
    said = run.summary["warnings"]
    assert [line.partition(": ")[2].partition(" (")[0].partition(";")[0] for line in said] == [
        "in every group all rewards were equal",
        "reward/accuracy was 0 for every answer",
        "reward/format was 0 for every answer",
    ]
    assert all(line.startswith("steps 1 to 3: ") for line in said)
    shown = " ".join(run.output.split())
    for line in said:
        assert shown.count(" ".join(f"warning: {line}".split())) == 1  # while it runs
        assert shown.count(line[:60]) == 2  # and among the last words
