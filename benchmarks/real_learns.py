"""Does a real pretrained model learn here? SmolLM2-135M-Instruct before, while and after GRPO on short sums.

    python benchmarks/real_learns.py MODEL [--name smollm2] [--answers 8] [--questions 64] [KEY=VALUE …]
    (`make real` makes MODEL first)

MODEL is what `make real-model` leaves. Three runs of the real command with the settings of real_learns.yaml, KEY=VALUE
above them: job=eval of the model as it is, training, and job=eval of what came of it, with the same questions, none of
which is trained on, and the same settings. Runs stay in runs/; one that was interrupted goes on, one that is completed
is read.

before, after: mean accuracy over questions with its 95 % interval (docs/evaluation.md: the answers to one question are
one observation). rise: the mean of the questions' differences, with its own, narrower interval, since both asked the
same. seconds: from the training run's first commit to its last, by the broker's clock. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import ROOT, Run, machine, say
from rich.console import Console
from rich.table import Table

from offtrail.platform.evaluator.measures import Estimate, Values, average, over_questions

SETTINGS = ROOT / "benchmarks" / "real_learns.yaml"
EVERY = 10
"""Learner steps of a line of the printed curve."""


def run(name: str, keys: list[str]) -> Run:
    """One run by the real command to its end, shown as it goes. SystemExit where it does not complete."""
    folder = Path("runs", name)
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "completed":
        begun = [f"run.name={name}", "run.resume=true"] if (folder / "config.yaml").is_file() else []
        fresh = [str(SETTINGS), f"run.name={name}", *keys]
        command = [sys.executable, str(ROOT / "launch.py"), *(begun or fresh)]
        say(" ".join(command[1:]))
        if status := subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise SystemExit(status)
    return Run(folder)


def scores(evaluated: Run) -> dict[str, Values]:
    """Question → accuracies of its answers."""
    found: dict[str, list[float]] = {}
    for file in sorted((evaluated.folder / "answers").glob("*.parquet")):
        for row in pq.read_table(file, columns=["prompt", "rewards"]).to_pylist():
            found.setdefault(row["prompt"], []).append(dict(row["rewards"])["accuracy"])
    return {prompt: np.array(values) for prompt, values in found.items()}


def curve(trained: Run) -> Table:
    """Accuracy of the training batches, a line each EVERY steps, and of held-out questions where one was scored."""
    shown = Table("steps", "training", "held out", "length", "", box=None)
    rows = trained.rows()
    for first in range(0, len(rows), EVERY):
        part = rows[first : first + EVERY]
        mean = {
            name: np.mean([row[name] for row in part if name in row] or [np.nan])
            for name in ("reward/accuracy", "eval/accuracy", "length/mean")
        }
        told = [
            f"{mean[name]:.3f}" if mean[name] == mean[name] else "" for name in ("reward/accuracy", "eval/accuracy")
        ]
        bar = "█" * round(40 * float(np.nan_to_num(mean["reward/accuracy"])))
        shown.add_row(f"{part[0]['step']}–{part[-1]['step']}", *told, f"{mean['length/mean']:.1f}", bar)
    return shown


def report(args: argparse.Namespace) -> dict[str, Any]:
    """The three runs and what they came to."""
    asking = ["job=eval", f"eval.samples={args.answers}", f"eval.prompts={args.questions}"]
    before = run(f"{args.name}-before", [f"checkpoint={args.model}", *asking, *args.keys])
    trained = run(args.name, [f"model.path={args.model}", *args.keys])
    after = run(f"{args.name}-after", [f"checkpoint={trained.folder}", *asking, *args.keys])
    Console(stderr=True).print(curve(trained))
    told = {"before": scores(before), "after": scores(after)}
    if told["before"].keys() != told["after"].keys():
        raise SystemExit(f"{before.folder} and {after.folder} asked other questions: remove them, and begin again")
    values = {name: average(np.array([found[q] for q in told["before"]])) for name, found in told.items()}
    values["rise"] = values["after"] - values["before"]
    last = len(trained.rows()) - 1
    found = {name: shown(over_questions(value)) for name, value in values.items()}
    summary = json.loads((trained.folder / "summary.json").read_text())
    return {
        "benchmark": "real_learns", **found, "seconds": round(trained.seconds(0, last)), "steps": last,
        "stale_tokens": summary["staleness/stale_token_share"], "figure": str(trained.folder / "learning.png"),
        "settings": {"questions": args.questions, "answers": args.answers, "keys": args.keys, **machine()},
    }  # fmt: skip


def shown(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(estimate).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that `make real-model` leaves")
    parser.add_argument("--name", default="smollm2", help="of the runs: runs/NAME, NAME-before and NAME-after")
    parser.add_argument("--answers", type=int, default=8, help="to each question, before and after")
    parser.add_argument("--questions", type=int, default=64, help="held out")
    parser.add_argument("keys", nargs="*", help="keys of all three runs, as launch.py takes them")
    print(json.dumps(report(parser.parse_intermixed_args())))


if __name__ == "__main__":
    main()
