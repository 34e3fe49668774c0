"""A process reward model that chooses among answers: best of N and weighted votes against the majority, over seeds.

    python benchmarks/reranking.py [--seeds 8] [--policy-steps 200] [--questions 256] [--out FOLDER] [KEY=VALUE …]

One process reward model is made (benchmarks/labelled_answers.py, then job=prm) and left as it is. For each seed job=sft
trains a policy of middling accuracy from random weights of its own, and job=eval has it answer held-out questions N = 8
times at T = 1 and the model score every step: the questions, the policy and the drawn numbers are the seed's, the
process reward model is the same. Every job is the real command. KEY=VALUE goes to the policies' jobs.

The answer's one score is the least of its steps' (`aggregate` min, the default); other aggregates are shown beside it,
and the majority of the answers that have steps at all. Of the policies' own scored answers `auc` is the model's, right
against wrong, and `wrong_passed` the share of wrong ones in which it finds no step below ½.
Intervals are Student's t over seeds of differences that are paired within a seed, with the exact sign-flip test
(ablations/intervals.py). FOLDER keeps every run: what is there is not made again, and what was cut goes on. Beside them
stand seeds.csv, reranking.csv and reranking.png. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import ROOT, launch, machine, say

from offtrail.ablations.intervals import over_seeds, sign_flip
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.sets import sets_of
from offtrail.platform.evaluator.asked import Asked, asked_of
from offtrail.platform.evaluator.measures import weighted_vote
from offtrail.platform.launcher.asking import groups_of
from offtrail.platform.launcher.evaluate import questions_of
from offtrail.platform.model.text import Text
from offtrail.platform.tracking.summary import read_summary
from offtrail.rewards.score_metrics import auc

N = 8
TASK = ("task=chain", "task.modulus=3", "task.max_operand=3")
LABELS = ("--rows", "8000", "--spoiled", "0", *TASK, "task.noise=0.25")
PRM = (
    "job=prm", "prm.steps=1000", "prm.lr=3e-3", 'prm.cut={by: separator, separator: ";", within: thought}',
    "learner.checkpoint_every=250",
)  # fmt: skip
"""docs/reward_models.md's setting."""
MIN = f"best_of_n/prm/min@{N}", f"weighted_vote/prm/min@{N}"
"""What is claimed; all else is shown."""
SCORED, ONE_SCORED = f"cons_of_scored@{N}", f"avg_of_scored@{N}"
"""Controls: the majority of the answers that have a score, and one of them drawn blindly: what leaving out those
without steps does alone.
"""


def made(folder: Path, name: str, keys: Sequence[str]) -> Path:
    """A completed run in ``folder``: made or gone on with now, unless it is there. SystemExit where it was begun with
    other keys.
    """
    run, note = folder / name, folder / f"{name}.keys"
    wanted = "\n".join(keys)
    if note.is_file() and note.read_text() != wanted:
        raise SystemExit(f"{run}: was made with other settings ({note}); take another --out")
    note.write_text(wanted)
    if read_summary(run).get("status") != "completed":
        begun = ["run.resume=true"] if (run / "config.yaml").is_file() else []
        launch(folder, name, [*keys, "tracking.tensorboard=false", *begun])
    return run


def process_reward_model(folder: Path) -> Path:
    """Of the labelled steps in ``folder``, which are made first."""
    file = folder / "steps.jsonl"
    if not file.is_file():
        script = str(ROOT / "benchmarks" / "labelled_answers.py")
        subprocess.run(
            [sys.executable, script, "steps", "--out", str(file), *LABELS], check=True, stdout=subprocess.DEVNULL
        )
    return made(folder, "prm", [*PRM, f"prm.path={file}"])


def result(folder: Path, seed: int, steps: int, questions: int, keys: Sequence[str]) -> dict[str, Any]:
    """One seed's numbers: measure → share of questions, and how many answers have no score."""
    policy = made(folder, f"policy-{seed}", [f"sft.seed={seed}", "job=sft", *TASK, f"sft.steps={steps}", *keys])
    asked = [
        "job=eval", f"checkpoint={policy}", f"scorer.models={{prm: {{path: {folder / 'prm'}}}}}", f"run.seed={seed}",
        f"eval.prompts={questions}", f"eval.samples={N}", "eval.temperature=1", "eval.top_p=1",
    ]  # fmt: skip
    run = made(folder, f"answers-{seed}", asked)
    told = json.loads((run / "eval.json").read_text())
    measures = {name.removesuffix(",none"): value for name, value in told["results"]["chain"].items()}
    answers = answers_of(run)
    marks = answers.marks["prm/min"].values
    known = ~np.isnan(marks)
    rights = [
        float(right[have].mean()) if have.any() else 0.0 for right, have in zip(answers.scores, known, strict=True)
    ]
    measures[ONE_SCORED] = statistics.fmean(rights)
    measures[SCORED] = float(weighted_vote(answers.answers, np.where(known, 1.0, np.nan), answers.scores, N).mean())
    return {
        "seed": seed, "unscored": told["scored_by"]["chain"]["prm"]["unscored"],
        "auc": auc(marks[known], answers.scores[known]),
        "wrong_passed": float((marks[known & (answers.scores < 1)] >= 0.5).mean()), "measures": measures,
    }  # fmt: skip


def answers_of(run: Path) -> Asked:
    """The sealed answers of a run of job=eval."""
    config, text = load_config(run / "config.yaml"), Text(run / "start")
    [one] = sets_of(config)
    questions = questions_of(one, text)
    return asked_of(one, questions.problems, dict(groups_of(run, questions)), text)


def rows_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a measure at N: the mean over seeds, and its differences from the majority and from one answer, of all
    answers and of those that have a score.
    """
    names = [f"avg@{N}", f"cons@{N}", f"pass@{N}"]
    names += [
        ONE_SCORED,
        SCORED,
        *(name for name in found[0]["measures"] if name.endswith(f"@{N}") and "/prm/" in name),
    ]
    return [
        {
            "measure": name, "seeds": len(found), **estimate("mean", [one["measures"][name] for one in found]),
            **less(found, name, f"cons@{N}", "less_majority"), **less(found, name, f"avg@{N}", "less_one_answer"),
            **less(found, name, ONE_SCORED, "less_one_scored"), **less(found, name, SCORED, "less_majority_scored"),
        }
        for name in names
    ]  # fmt: skip


def less(found: Sequence[dict[str, Any]], name: str, other: str, column: str) -> dict[str, Any]:
    """The paired difference over seeds."""
    pairs = [one["measures"][name] - one["measures"][other] for one in found]
    if name == other:
        return {}
    return estimate(column, pairs) | {f"{column}_p": round(sign_flip(pairs), 4)}


def estimate(column: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds, where there are two."""
    told = {column: round(statistics.fmean(values), 4)}
    if len(values) < 2:
        return told
    around = over_seeds(values)
    return told | {f"{column}_low": round(around.low, 4), f"{column}_high": round(around.high, 4)}


def draw(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Left: accuracy over k, mean over seeds. Right: what each use of the model adds to the majority, seed by seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 1.25))
    sizes = [1 << i for i in range(N.bit_length())]
    curves = {
        "pass@k": ("pass@{}", "#0072B2"), "majority": ("cons@{}", "#D55E00"),
        "best of k by PRM (min)": ("best_of_n/prm/min@{}", "#CC79A7"),
        "vote weighed by PRM (min)": ("weighted_vote/prm/min@{}", "#E69F00"),
    }  # fmt: skip
    for label, (name, colour) in curves.items():
        means = [
            statistics.fmean(one["measures"][f"avg@{N}" if k == 1 else name.format(k)] for one in found) for k in sizes
        ]
        left.plot(sizes, means, marker="o", color=colour, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(k) for k in sizes])
    left.set_xlabel("k answers (k = 1: one answer alone)")
    left.set_ylabel(f"share of held-out questions, mean of {len(found)} seeds")
    left.legend(frameon=False, fontsize=8)
    shown = [row for row in rows if "/" in row["measure"] or row["measure"] == SCORED]
    for place, row in enumerate(shown):
        colour = {"best": "#CC79A7", "weig": "#E69F00"}.get(row["measure"][:4], "0.3")
        pairs = [one["measures"][row["measure"]] - one["measures"][f"cons@{N}"] for one in found]
        right.plot(pairs, [place] * len(pairs), ".", color="0.65", zorder=1)
        reach = [[row["less_majority"] - row.get("less_majority_low", row["less_majority"])],
                 [row.get("less_majority_high", row["less_majority"]) - row["less_majority"]]]  # fmt: skip
        right.errorbar([row["less_majority"]], [place], xerr=reach, fmt="o", color=colour, capsize=3)
    right.axvline(0, color="0.5", linewidth=0.8)
    right.set_yticks(range(len(shown)), [row["measure"].removesuffix(f"@{N}").replace("/prm/", " ") for row in shown])
    right.set_ylim(len(shown) - 0.5, -0.5)
    right.set_xlabel(f"share of questions, less majority of {N} (95 % over seeds)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--policy-steps", type=int, default=200, help="sft.steps of the policies")
    parser.add_argument("--questions", type=int, default=256, help="held-out questions a seed")
    parser.add_argument("--out", type=Path, default=Path("reranking-results"))
    parser.add_argument("keys", nargs="*", help="further keys of the policies' jobs, as launch.py takes them")
    args = parser.parse_args()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    summary = read_summary(process_reward_model(folder))
    judge = {name: summary[f"eval/{name}_last"] for name in ("auc", "accuracy", "first_error_f1")}
    say(f"process reward model: {judge}")
    found = []
    for seed in range(args.seeds):
        found.append(result(folder, seed, args.policy_steps, args.questions, args.keys))
        told = found[-1]["measures"]
        say(f"seed {seed}: " + ", ".join(f"{name} {told[name]:.3f}" for name in (f"avg@{N}", f"cons@{N}", *MIN)))
    rows = rows_of(found)
    names = [row["measure"] for row in rows]
    seeds = [
        {
            "seed": one["seed"], "unscored": one["unscored"],
            **{name: round(one[name], 4) for name in ("auc", "wrong_passed")},
            **{name: round(one["measures"][name], 4) for name in names},
        }
        for one in found
    ]  # fmt: skip
    for name, table in (("reranking", rows), ("seeds", seeds)):
        columns = list(dict.fromkeys(column for row in table for column in row))
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    draw(found, rows, folder / "reranking.png")
    claimed = {row["measure"]: row for row in rows if row["measure"] in MIN}
    print(
        json.dumps(
            {
                "benchmark": "reranking", **machine(), "prm": judge, "seeds": len(found),
                "policy_steps": args.policy_steps, "questions": args.questions,
                "unscored": sum(one["unscored"] for one in found),
                **{name: round(statistics.fmean(one[name] for one in found), 4) for name in ("auc", "wrong_passed")},
                **claimed,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
