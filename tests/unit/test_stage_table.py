"""The table of a recipe's models, what each cost, and the verdict on two arms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from offtrail.core.types import Batch
from offtrail.platform.broker.archive import tables
from offtrail.platform.config.recipe import Stage
from offtrail.platform.launcher import published
from offtrail.platform.launcher.asking import file_of
from offtrail.platform.launcher.stage_cost import lineage, made_for, spent, together
from offtrail.platform.launcher.stage_table import as_markdown, as_table, cells, in_short, rows_of, write_table
from offtrail.platform.launcher.verdict import compared, shares_of


def stage(number: int, name: str, job: str, start_from: str = "", *data_from: str) -> Stage:
    return Stage(number, name, job, start_from, data_from, {}, f"recipe.stages.{name}")


STAGES = [
    stage(1, "base", "sft"),
    stage(2, "ask_base", "eval", "base"),
    stage(3, "dev2", "rl", "base"),
    stage(4, "ask_dev2", "eval", "dev2"),
    stage(5, "samples", "sample", "dev2"),
    stage(6, "kept", "reject", "", "samples"),
    stage(7, "dev3", "sft", "base", "kept"),
    stage(8, "ask_dev3", "eval", "dev3"),
]
SUMMARIES: dict[str, dict[str, Any]] = {name: {} for name in (s.name for s in STAGES)}
SUMMARIES |= {
    "base": {"compute/flops": 100.0, "tokens/trained": 7, "wall_seconds": 2.0},
    "dev2": {
        "compute/flops": 50.0, "compute/evaluator_flops": 8.0, "tokens/generated": 30, "tokens/trained": 20,
        "wall_seconds": 3.0,
    },
    "samples": {"compute/flops": 5.0, "tokens/generated": 11, "launch_seconds": 1.0},
    "kept": {"launch_seconds": 0.5},
    "dev3": {"compute/flops": 20.0, "tokens/trained": 9, "wall_seconds": 4.0},
}  # fmt: skip


def evaluation(accuracy: float) -> dict[str, Any]:
    measures = {"avg@2": accuracy, "pass@2": 1.0, "length": 31.25, "behaviour/other_language_share": 0.3}
    return {
        "results": {"chain": {f"{name},none": mean for name, mean in measures.items()}},
        "intervals": {"chain": {name: [mean - 0.1, mean + 0.1] for name, mean in measures.items()}},
    }


def rows() -> list[dict[str, Any]]:
    evaluations = {"ask_base": evaluation(0.1), "ask_dev2": evaluation(0.6), "ask_dev3": evaluation(0.95)}
    return rows_of(STAGES, evaluations, SUMMARIES)


def test_what_a_stage_spent_is_without_its_evaluation() -> None:
    assert spent(SUMMARIES["dev2"]) == {"flops": 42.0, "generated": 30.0, "trained": 20.0, "seconds": 3.0}
    assert spent({}) == {"flops": 0.0, "generated": 0.0, "trained": 0.0, "seconds": 0.0}
    named_alike = {"evaluator_flops": 1.0, "compute/evaluator_old_flops": 2.0, "compute/evaluator_teraflops": 4.0}
    assert spent(SUMMARIES["dev2"] | named_alike)["flops"] == 42.0
    asked = {"compute/flops": 8.0, "compute/evaluator_flops": 8.0, "tokens/generated": 5}  # of job=eval
    assert spent(asked)["flops"] == 0.0


def test_a_model_stands_on_its_start_and_its_data() -> None:
    assert made_for("dev3", STAGES) == ["samples", "kept", "dev3"]
    assert lineage("dev3", STAGES) == ["base", "dev2", "samples", "kept", "dev3"]
    assert together(["samples", "kept", "dev3"], SUMMARIES) == {
        "flops": 25.0, "generated": 11.0, "trained": 9.0, "seconds": 5.5,
    }  # fmt: skip


def test_a_row_for_each_model_that_was_asked_with_its_own_cost_and_r1s_figures_beside() -> None:
    found = rows()
    assert [row["stage"] for row in found] == ["base", "dev2", "dev3"]
    assert [row["cost"]["flops"] for row in found] == [100.0, 42.0, 25.0]
    assert found[2]["cost_with_what_it_stands_on"]["flops"] == 167.0
    assert found[1]["sets"]["chain"]["accuracy"] == [0.6, 0.5, 0.7]
    assert found[1]["sets"]["chain"]["language"] == pytest.approx([0.7, 0.6, 0.8])
    assert found[0]["published"] == {}
    assert found[2]["published"]["AIME 2024 (pass@1)"] == 78.1
    assert in_short(found)["dev2"] == {"chain": {"accuracy": 0.6, "language": 0.7, "length": 31.25}}


def test_the_table_of_an_interrupted_recipe_has_the_rows_that_there_are() -> None:
    assert [row["stage"] for row in rows_of(STAGES, {"ask_base": evaluation(0.1)}, SUMMARIES)] == ["base"]


def test_the_three_files(tmp_path: Path) -> None:
    write_table(tmp_path, "r1", rows(), {"lines": ["chain: undecided"]})
    told = json.loads((tmp_path / "dev.json").read_text())
    assert [row["stage"] for row in told["rows"]] == ["base", "dev2", "dev3"]
    assert told["published"]["source"] == published.SOURCE
    assert (tmp_path / "dev.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "dev.md").read_text()
    assert "| dev3 | 0.950 (0.850–1.000) | 0.700 | 31.2 | 25 | 11 | 9 | 6 |" in text  # no interval beyond 1
    assert "| dev2 | 74.0 | 95.9 | 70.7 | 63.5 | 72.0 | 55.8 |" in text
    assert "- chain: undecided" in text
    assert cells(rows())[0][:4] == ["stage", "chain: accuracy", "chain: language", "chain: length"]


def test_the_terminal_has_a_column_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=80).print(as_table(rows()))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["base", "dev2", "dev3"]
    assert lines[1] == ["chain:", "accuracy", "0.100", "±0.100", "0.600", "±0.100", "0.950", "±0.075"]
    assert lines[4] == ["FLOPs", "100", "42", "25"]


def test_a_recipe_of_other_names_has_none_of_r1s_figures(tmp_path: Path) -> None:
    [row] = rows_of(STAGES[:2], {"ask_base": evaluation(0.1)}, SUMMARIES)
    assert "DeepSeek" not in as_markdown("mine", [row])
    write_table(tmp_path, "mine", [row])
    assert "published" not in json.loads((tmp_path / "dev.json").read_text())
    assert (tmp_path / "dev.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("benchmark", published.SHOWN)
def test_what_is_shown_of_r1_is_there(benchmark: str) -> None:
    assert len(published.FIGURES[benchmark]) == len(published.STAGES)


ARMS = {"rl": ["rl_0", "rl_1"], "distil": ["distil_0", "distil_1"]}
ARM_STAGES = [
    stage(number, name, "rl" if "rl" in name else "sft", "", *(["given"] if "distil" in name else []))
    for number, name in enumerate(["given", "rl_0", "rl_1", "distil_0", "distil_1"], 1)
]
ARM_SUMMARIES = {"given": {"compute/flops": 3.0}} | {
    name: {"compute/flops": 10.0 if "rl" in name else 7.0} for name in ("rl_0", "rl_1", "distil_0", "distil_1")
}


def shares(rl: float, distil: float) -> dict[str, dict[str, Any]]:
    """100 questions: each arm is right at the first so many, a seed like the other but for one question."""
    level = {"rl": rl, "distil": distil}
    return {
        name: {"chain": (np.arange(100) < level[arm] * 100 - i).astype(np.float64)}
        for arm, names in ARMS.items()
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize(
    ("rl", "distil", "ahead"), [(0.5, 0.9, "distil"), (0.9, 0.5, "rl"), (0.5, 0.5, ""), (0.5, 0.51, "")]
)
def test_an_arm_is_ahead_only_where_the_interval_does_not_hold_0(rl: float, distil: float, ahead: str) -> None:
    found = compared(ARMS, ARM_STAGES, ARM_SUMMARIES, shares(rl, distil))
    of_set = found["sets"]["chain"]
    assert of_set["ahead"] == ahead
    assert of_set["difference"][0] == pytest.approx(distil - rl)
    assert of_set["rl"]["by_seed"] == pytest.approx([rl, rl - 0.01])
    assert found["arms"]["distil"]["flops"] == [10.0, 10.0]  # the teacher's tokens are charged
    [line] = found["lines"]
    assert ("undecided, the interval holds 0" if not ahead else f"{ahead} is ahead") in line
    assert "over 100 questions and 2 seeds" in line


def test_one_seed_says_nothing_of_others() -> None:
    arms = {arm: names[:1] for arm, names in ARMS.items()}
    found = compared(arms, ARM_STAGES, ARM_SUMMARIES, shares(0.5, 0.9))
    assert found["sets"]["chain"]["difference_of_other_seeds"] is None
    assert "and 1 seed: distil is ahead" in found["lines"][0]


def test_arms_are_paired_by_question_where_a_prompt_left_no_room(
    tmp_path: Path, make_batch: Callable[..., Batch]
) -> None:
    """Questions 0, 2 and 65 of 67 have answers, in two files."""
    (tmp_path / "answers").mkdir()
    (tmp_path / "config.yaml").write_text("job: eval\ncheckpoint: m\n")
    (tmp_path / "eval.json").write_text(json.dumps({"n-samples": {"my_tasks:Sums": {"original": 67}}}))
    groups = [
        dataclasses.replace(one, group=number, components={"accuracy": np.array(right, np.float32)})
        for one, number, right in zip(
            make_batch(0, B=3, G=2).groups, (0, 2, 65), ([1, 0], [1, 1], [1, np.nan]), strict=True
        )
    ]
    for first, part in ((0, groups[:2]), (64, groups[2:])):
        rows = tables("asked", [({"group": one.group, "state": "evaluated"}, one) for one in part], {})
        pq.write_table(pa.concat_tables(rows), file_of(tmp_path, "my_tasks:Sums", first))
    shares = shares_of(tmp_path)["my_tasks:Sums"]
    assert len(shares) == 67
    assert {place: share for place, share in enumerate(shares.tolist()) if share} == {0: 0.5, 2: 1.0, 65: 0.5}
