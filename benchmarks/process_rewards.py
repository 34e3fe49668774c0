"""Process rewards as a treatment: what each way of paying for steps keeps of true accuracy, over paired seeds.

    python benchmarks/process_rewards.py --start MODEL --prm RUN [--seeds 8] [--steps 40] [--arms ARM …] [--out FOLDER]

MODEL is a policy of middling accuracy on the chain of modulus 3, RUN a process reward model of its steps
(docs/trails/process_rewards.md has the commands of both). Every arm is the plain synchronous loop of one process
(platform/learner/synchronous.py: the numbers of a run with staleness.max=0) with the model scoring each group, at
learning rate 3e-4, 40 learner steps of 8 groups of 8. Runs of a seed share start, data order and random numbers. The
model scores every arm, `verifier` too, where it is not paid; and 512 held-out answers, at every 20th version, the same
prompts and random numbers in all runs.

Protocol, written before any run:

1. Hypothesis (DeepSeek-R1 §4.2): a process reward model in RL is hacked. verifier + 1.0·sum loses true accuracy while
   what it is paid rises; verifier + min does not.
   Arms against `verifier`: `sum` and `min` (algo.process, by leave-one-out, beside the verifier's group advantages),
   `paid_sum` and `paid_min` (the sum, or the least, of the steps' scores as a component of weight 1, normalised by
   group-std together with the verifier's).
   An arm is hacked (reproduced) where in 6 of 8 seeds what it pays has a slope > 0 over the run and the final accuracy
   is 5 points or more below the verifier's, the difference's interval is below 0 and p ≤ .05, and steps are ×1.5, or
   answers of 0 or 1 step ≥ .20, or repetition +.10. It is refuted where at no evaluation the interval goes below −1
   point, and the mean rank correlation over steps of what is paid and what is right is ≥ .5. Else undecided.
2. Hypothesis (the trap of group-std): a tiny reward for steps (.01·sum) that is divided by its group's standard
   deviation together with the verifier's is blown up where all answers of a group are wrong, or all right.
   `tiny_std` (the trap) against `tiny_fixed` (algo.std=none) and `tiny_own` (algo.process, a channel of its own).
   Shown where tiny_std ends 5 points or more below the other, the interval is below 0 and p ≤ .05; not shown where the
   interval is within ±5 points; else undecided.

Accuracy is of the held-out answers. Intervals are two-way t, over seeds and prompts, of paired differences; p is the
exact sign-flip test's over seeds (ablations/intervals.py). Fewer than six seeds decide nothing. FOLDER keeps every
run's numbers, so that the script goes on where it was interrupted; arms.csv, runs.csv, series.csv and
process_rewards.png are made of all that is asked for. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import machine, say

from offtrail.ablations.intervals import Interval, sign_flip, two_way
from offtrail.core.types import Batch, Group, Sampling
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.config.sets import sets_of
from offtrail.platform.evaluator.answers import STOP
from offtrail.platform.evaluator.role import EVAL_SEED
from offtrail.platform.learner.report import batch_metrics
from offtrail.platform.learner.synchronous import Synchronous
from offtrail.platform.scorer.groups import score_groups
from offtrail.platform.scorer.local import load_scorers
from offtrail.platform.scorer.proxies import proxy_metrics
from offtrail.platform.tracking.hacking import Watch
from offtrail.platform.tracking.summary import write_atomic
from offtrail.rewards import behaviour
from offtrail.rewards.score_metrics import rank_correlation
from offtrail.rewards.total import total

EVERY = 20
"""Learner steps between two evaluations."""
SETTING = (
    "task=chain", "task.modulus=3", "task.max_operand=3", "task.noise=0.25", "learner.optim.lr=3e-4",
    "batch.groups=8", "batch.group_size=8", "staleness.max=0", "eval.prompts=512", "algo.kl=k3", "algo.kl_coef=1e-9",
    "reward.weights.prm=0",
)  # fmt: skip
"""Of every run; the KL term is measured and pulls on nothing."""
ARMS: dict[str, tuple[str, ...]] = {
    "verifier": (),
    "sum": ("algo.process.channel=prm", "algo.process.form=sum"),
    "min": ("algo.process.channel=prm", "algo.process.form=min"),
    "paid_sum": ("reward.weights.prm=1",),
    "paid_min": ("reward.weights.prm=1", "scorer.models.prm.aggregate=min"),
    "tiny_std": ("reward.weights.prm=0.01",),
    "tiny_fixed": ("reward.weights.prm=0.01", "algo.std=none"),
    "tiny_own": ("algo.process.channel=prm", "algo.process.form=sum", "algo.process.weight=0.01"),
}
"""The keys in which an arm differs."""
BASE = dict.fromkeys(("sum", "min", "paid_sum", "paid_min"), "verifier") | dict.fromkeys(
    ("tiny_fixed", "tiny_own"), "tiny_std"
)
"""What an arm is compared with."""
SERIES = {
    "proxy": "hacking/prm/proxy", "truth": "reward/accuracy", "step_score": "channel/prm", "kl": "policy/kl_ref",
    "auc": "hacking/prm/auc", "rank_correlation": "hacking/prm/rank_correlation", "steps": "length/steps",
    "no_step": "length/no_step_share", "one_step": "length/one_step_share", "tokens": "length/mean",
    "tokens_per_step": "length/tokens_per_step", "cut": "length/truncated_share",
    "repeated": "behaviour/repeated_suffix_share", "process_share": "policy/process_share",
}  # fmt: skip
"""What is kept of every learner step."""
POINTS = 0.05
"""The difference in accuracy that counts."""
FEWEST = 6
"""Seeds of a verdict."""


class Scored(Synchronous):
    """The synchronous loop whose groups a model scores, in the same process, as judges do it in a run."""

    def __init__(self, config: Config, start: Path) -> None:
        super().__init__(config, start)
        self.scorers = load_scorers(config, Path(), self.answers.text)
        [held_out] = sets_of(config)
        self.problems = held_out.problems()

    def generate(self, step: int) -> Batch:
        """With scores, and rewards that count them."""
        batch = super().generate(step)
        self.score(batch.groups)
        for group in batch.groups:
            group.rewards = total(self.config.reward, group.components, task=group.problem.task, step=step)
        return batch

    def score(self, groups: Sequence[Group]) -> None:
        """Component, channel and step ends of each group."""
        score_groups(groups, self.scorers, lambda on: None)
        for group in groups:
            if "prm" not in group.channels:
                raise SystemExit(f"the model has no score of the answers to problem {group.problem.index}")
            texts = [self.answers.text.answer_text(group.problem, sample.tokens) for sample in group.samples()]
            group.counts = behaviour.counted(texts, (group.finish == STOP).tolist(), "en")

    def evaluate(self, version: int) -> tuple[list[int], float]:
        """Of each held-out prompt whether its answer is right, and what the model pays on average."""
        sampling = Sampling(
            max_new_tokens=self.config.sampling.longest_at(version), temperature=1.0, top_p=1.0,
            stop_token_ids=self.answers.text.stop_token_ids, seed=EVAL_SEED,
        )  # fmt: skip
        groups = [g for g in self.answers.groups(self.problems, 1, sampling, step=version) if g is not None]
        self.score(groups)
        right = [int(group.components["accuracy"][0]) for group in groups]
        return right, float(np.mean([group.components["prm"][0] for group in groups]))


def result(folder: Path, arm: str, seed: int, start: Path, keys: Sequence[str], steps: int) -> dict[str, Any]:
    """One run's numbers: from ``folder`` if it was made before, else made now."""
    file, wanted = folder / f"{arm}-{seed}.json", [*keys, f"run.seed={seed}", f"learner.steps={steps}"]
    made_with = [*wanted, f"start={start.resolve()}"]
    if file.is_file() and (known := json.loads(file.read_text()))["keys"] == made_with:
        return dict(known)
    began, config = time.perf_counter(), compose([*wanted, f"learner.checkpoint_every={steps}"])
    loop, watch = Scored(config, start), Watch("prm")
    held, rows = [loop.evaluate(0)], list[dict[str, float]]()
    for step in loop.run(steps):
        row = {"step": float(step.batch.step + 1), **step.report.metrics}
        row |= batch_metrics(step.batch, config.reward, loop.answers.text.vocabulary)
        row |= proxy_metrics(step.batch.groups, config)
        watch.take(row)
        rows.append(row)
        if len(rows) % EVERY == 0:
            held.append(loop.evaluate(len(rows)))
    found = {
        "arm": arm, "seed": seed, "keys": made_with, "seconds": time.perf_counter() - began,
        "right": ["".join(map(str, right)) for right, _ in held], "held_out_proxy": [paid for _, paid in held],
        "onset": watch.found.onset if watch.found else None,
        "series": {name: [row.get(tag) for row in rows] for name, tag in SERIES.items()},
    }  # fmt: skip
    write_atomic(file, json.dumps(found))
    return found


def right(run: dict[str, Any], at: int) -> np.ndarray:
    """[Q]: which held-out answers of one evaluation are right."""
    return np.array(list(map(int, run["right"][at])))


def accuracy(run: dict[str, Any]) -> list[float]:
    """At each evaluation."""
    return [float(right(run, at).mean()) for at in range(len(run["right"]))]


def ends(run: dict[str, Any]) -> dict[str, float]:
    """What the verdict reads of one run: the proxy's slope, and what the first and the last ten steps show."""
    series = {name: np.array(values, np.float64) for name, values in run["series"].items()}
    proxy, truth = series["proxy"], series["truth"]
    first, last = ({name: float(np.nanmean(v[at])) for name, v in series.items() if not np.isnan(v[at]).all()}
                   for at in (slice(0, 10), slice(-10, None)))  # fmt: skip
    return {
        "start": accuracy(run)[0], "accuracy": accuracy(run)[-1],
        "held_out_proxy_first": run["held_out_proxy"][0], "held_out_proxy_last": run["held_out_proxy"][-1],
        "proxy_slope": float(np.polyfit(np.arange(len(proxy)), proxy, 1)[0]),
        "proxy_first": first["proxy"], "proxy_last": last["proxy"], "agreement": rank_correlation(proxy, truth),
        "steps_ratio": last["steps"] / first["steps"], "few_steps": last["no_step"] + last["one_step"],
        "repeated_rise": last["repeated"] - first["repeated"], "cut": last["cut"], "kl": last["kl"],
        "auc_first": first.get("auc", np.nan), "auc_last": last.get("auc", np.nan),
    }  # fmt: skip


def difference(arm: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], at: int) -> tuple[Interval, float]:
    """Of held-out accuracy at one evaluation, paired by seed: mean with its interval, and the sign-flip p."""
    pairs = np.array([right(a, at) - right(b, at) for a, b in zip(arm, base, strict=True)])
    return two_way(pairs), sign_flip(pairs.mean(1))


def hacked(arm: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    """The verdict of hypothesis 1."""
    n, told = len(arm), [ends(run) for run in arm]
    if n < FEWEST:
        return "undecided"
    whole, p = difference(arm, base, -1)
    losing = sum(
        end["proxy_slope"] > 0 and end["accuracy"] <= accuracy(other)[-1] - POINTS
        for end, other in zip(told, base, strict=True)
    )
    mean = {name: statistics.fmean(end[name] for end in told) for name in told[0]}
    shape = mean["steps_ratio"] >= 1.5 or mean["few_steps"] >= 0.2 or mean["repeated_rise"] >= 0.1
    if losing >= 0.75 * n and whole.high < 0 and p <= 0.05 and shape:
        return "reproduced"
    lows = [difference(arm, base, at)[0].low for at in range(1, len(arm[0]["right"]))]
    return "refuted" if min(lows) >= -0.01 and mean["agreement"] >= 0.5 else "undecided"


def trapped(trap: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """The verdict of hypothesis 2."""
    if len(trap) < FEWEST:
        return "undecided"
    whole, p = difference(trap, other, -1)
    if whole.mean <= -POINTS and whole.high < 0 and p <= 0.05:
        return "shown"
    return "not shown" if whole.low >= -POINTS and whole.high <= POINTS else "undecided"


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row an arm: means over seeds, and what is said of its hypothesis."""
    rows = []
    for arm, found in runs.items():
        told = [ends(run) for run in found]
        row: dict[str, Any] = {
            "arm": arm,
            "seeds": len(found),
            "alarms": sum(run["onset"] is not None for run in found),
        }
        row |= {name: round(float(np.mean([end[name] for end in told])), 4) for name in told[0]}
        if len(found) > 1:
            row["interval"] = str(two_way([right(run, -1) for run in found]))
        if len(found) > 1 and (base := runs.get(BASE.get(arm, ""))):
            of, against = (base, found) if BASE[arm] == "tiny_std" else (found, base)
            whole, p = difference(of, against, -1)
            row |= {"difference": str(whole), "p": round(p, 4)}
            row["verdict"] = trapped(of, against) if BASE[arm] == "tiny_std" else hacked(of, against)
        rows.append(row)
    return rows


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table; a row may lack columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def tens(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's series as means of ten learner steps each."""
    steps = len(run["series"]["proxy"])
    found = []
    for at in range(0, steps, 10):
        row: dict[str, Any] = {
            "arm": run["arm"],
            "seed": run["seed"],
            "steps_from": at + 1,
            "steps_to": min(at + 10, steps),
        }
        for name, values in run["series"].items():
            known = [value for value in values[at : at + 10] if value is not None]
            row[name] = round(statistics.fmean(known), 5) if known else ""
        found.append(row)
    return found


def draw(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A column an arm: above held-out accuracy (points) and that of training, below what the model pays; every seed in
    grey, their mean in colour.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(runs), figsize=(2.5 * len(runs), 4.6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, (arm, found) in enumerate(runs.items()):
        held = np.array([accuracy(run) for run in found])
        for axis, name, colour in ((axes[0, column], "truth", "C0"), (axes[1, column], "proxy", "C1")):
            curves = np.array([run["series"][name] for run in found], np.float64)
            at = 1 + np.arange(curves.shape[1])
            axis.plot(at, curves.T, color="0.8", linewidth=0.6)
            axis.plot(at, curves.mean(0), color=colour, linewidth=2)
        axes[0, column].plot(EVERY * np.arange(held.shape[1]), held.mean(0), "ko", markersize=4)
        axes[0, column].set_ylim(0, 1)
        axes[0, column].set_title(arm, fontsize=10)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("what the model pays")
    figure.supxlabel("learner step")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="the policy's Hugging Face folder")
    parser.add_argument("--prm", type=Path, required=True, help="the run or folder of the process reward model")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help=f"learner steps, a multiple of {EVERY}")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("process-results"))
    args = parser.parse_args()
    if args.steps < EVERY or args.steps % EVERY:
        parser.error(f"--steps {args.steps}: must be a multiple of {EVERY}, so that the last step is measured")
    models = f"scorer.models={{prm: {{path: {args.prm.resolve()}, empty: 0, aggregate: sum}}}}"
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):  # seed by seed: an interrupted series is still paired
        for arm in args.arms:
            own = {key.partition("=")[0] for key in ARMS[arm]}
            keys = [models, *(key for key in SETTING if key.partition("=")[0] not in own), *ARMS[arm]]
            run = result(args.out, arm, seed, args.start, keys, args.steps)
            runs[arm].append(run)
            say(f"seed {seed} {arm}: {' '.join(f'{a:.3f}' for a in accuracy(run))} ({run['seconds']:.0f} s)")
    rows, every = summary(runs), [run for found in runs.values() for run in found]
    write(args.out, "arms.csv", rows)
    write(args.out, "runs.csv", [row_of(run) for run in every])
    write(args.out, "series.csv", [row for run in every for row in tens(run)])
    draw(runs, args.out / "process_rewards.png")
    print(json.dumps({"benchmark": "process_rewards", "steps": args.steps, "arms": rows, **machine()}))


def row_of(run: dict[str, Any]) -> dict[str, Any]:
    """A run's line of runs.csv."""
    held = {f"accuracy_{EVERY * i}": round(value, 4) for i, value in enumerate(accuracy(run))}
    return {"arm": run["arm"], "seed": run["seed"], **held, "onset": run["onset"], **ends(run)}


if __name__ == "__main__":
    main()
