"""Staleness as a treatment: what each correction keeps of learning on data exactly η versions old, over seeds.

    python benchmarks/staleness.py [--seeds 8] [--staleness 16] [--steps 80] [--arms ARM …] [--out FOLDER] [KEY=VALUE …]

Every arm is the real command on the harder chain at learning rate 3e-4 for 80 learner steps, `staleness.mode=exact`:
batch k is trained wholly from version max(0, k − η). The arms of a seed share start model, data order and random
numbers, so they are compared paired. `fresh` is η = 0 with decoupled PPO, every other arm η with the correction of its
name: `uncorrected` clips around the proximal policy without a weight, `none` around the behaviour policy.

Judged by accuracy on 512 held-out prompts at T = 1 after the last step, and its share of seeds below the start.
Intervals are Student's t over seeds, of differences between runs of one seed where arms are compared; beside them the
exact sign-flip test (ablations/intervals.py). FOLDER keeps every run's numbers: a run that is there is not made again,
so the script goes on where it was interrupted, and seeds.csv, arms.csv and staleness.png are made from all that is
there. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import launch, machine, say

from offtrail.ablations.intervals import over_seeds, sign_flip
from offtrail.platform.config.compose import options_of

SETTING = (
    "task=chain_hard", "staleness.mode=exact", "learner.optim.lr=3e-4", "eval.every=20", "eval.prompts=512",
    "tracking.tensorboard=false",
)  # fmt: skip
"""Of every run, unless the command line says otherwise."""
DIAGNOSTICS = ("ess_token", "ess_sequence", "abs_dlogp")


def keys_of(arm: str, staleness: int) -> list[str]:
    """The keys in which an arm differs."""
    if arm == "fresh":
        return ["staleness.max=0", "correction=decoupled"]
    return [f"staleness.max={staleness}", f"correction={arm}"]


def result(folder: Path, arm: str, seed: int, keys: Sequence[str]) -> dict[str, Any]:
    """One run's numbers: from ``folder`` if it was made before, else made now."""
    file = folder / f"{arm}-{seed}.json"
    wanted = list(keys)
    if file.is_file() and (known := json.loads(file.read_text()))["keys"] == wanted:
        return dict(known)
    with tempfile.TemporaryDirectory(prefix="staleness-") as runs:
        run = launch(Path(runs), f"{arm}-{seed}", [*keys, f"run.seed={seed}"])
        rows = run.rows()
        late = [row for row in rows if row["step"] > len(rows) // 2]
        found = {
            "arm": arm, "seed": seed, "keys": wanted,
            "accuracy": [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None],
            "ess_token": statistics.fmean(row["offpolicy/ess_token"] for row in late),
            "ess_sequence": statistics.fmean(row["offpolicy/ess_sequence"] for row in late),
            "abs_dlogp": statistics.fmean(row["offpolicy/abs_dlogp_mean"] for row in late),
            "staleness_max": json.loads((run.folder / "summary.json").read_text())["staleness/max"],
        }  # fmt: skip
    file.write_text(json.dumps(found))
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % of the mean, where there are two seeds."""
    if len(values) < 2:
        return None
    found = over_seeds(values)
    return round(found.low, 3), round(found.high, 3)


def summary(found: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """A row an arm: means over seeds, their interval, and the paired difference to `uncorrected`."""
    by = {(row["arm"], row["seed"]): row for row in found}
    rows = []
    for arm in arms:
        runs = [row for row in found if row["arm"] == arm]
        first, last = [r["accuracy"][0] for r in runs], [r["accuracy"][-1] for r in runs]
        pairs = [
            by[arm, r["seed"]]["accuracy"][-1] - by["uncorrected", r["seed"]]["accuracy"][-1]
            for r in runs
            if ("uncorrected", r["seed"]) in by and arm != "uncorrected"
        ]
        rows.append(
            {
                "arm": arm, "seeds": len(runs), "start": round(statistics.fmean(first), 3),
                "end": round(statistics.fmean(last), 3), "interval": interval(last),
                "worst": round(min(last), 3), "best": round(max(last), 3),
                "below_start": sum(b < a for a, b in zip(first, last, strict=True)),
                "gain_over_uncorrected": round(statistics.fmean(pairs), 3) if pairs else None,
                "gain_interval": interval(pairs),
                "gain_p": round(sign_flip(pairs), 4) if pairs else None,
                **{k: round(statistics.fmean(r[k] for r in runs), 4) for k in DIAGNOSTICS},
            }
        )  # fmt: skip
    return rows


def draw(found: Sequence[dict[str, Any]], arms: Sequence[str], file: Path) -> None:
    """A small panel an arm: every seed's held-out accuracy over the learner steps, and their mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(5, len(arms))
    height = -(-len(arms) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(2.5 * columns, 2.2 * height), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    for axis, arm in zip(axes.flat, arms, strict=False):
        curves = np.array([row["accuracy"] for row in found if row["arm"] == arm])
        steps = 20 * np.arange(curves.shape[1])
        axis.plot(steps, curves.T, color="0.7", linewidth=0.8)
        axis.plot(steps, curves.mean(0), color="C0", linewidth=2)
        axis.axhline(curves[:, 0].mean(), color="0.4", linewidth=0.8, linestyle=":")
        axis.set_title(arm, fontsize=10)
        axis.set_ylim(0, 1)
    figure.supxlabel("learner step")
    figure.supylabel("held-out accuracy")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--staleness", type=int, default=16, help="η of every arm but `fresh`")
    parser.add_argument("--steps", type=int, default=80, help="learner steps, a multiple of 20")
    parser.add_argument("--arms", nargs="*", default=["fresh", "uncorrected", *_corrections()])
    parser.add_argument("--out", type=Path, default=Path("staleness-results"))
    parser.add_argument("keys", nargs="*", help="further keys of every run, as launch.py takes them")
    # KEY=VALUE after --arms would be taken for an arm
    args = parser.parse_intermixed_args()
    keys = [*args.keys, *(arm for arm in args.arms if "=" in arm)]
    arms = [arm for arm in args.arms if "=" not in arm]
    given = {key.partition("=")[0] for key in keys}
    setting = [key for key in SETTING if key.partition("=")[0] not in given]
    setting += [f"learner.steps={args.steps}", f"learner.checkpoint_every={args.steps}"]
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(args.seeds):  # seed by seed: an interrupted series is still paired
        for arm in arms:
            row = result(args.out, arm, seed, [*setting, *keys_of(arm, args.staleness), *keys])
            found.append(row)
            say(f"seed {seed} {arm}: {' '.join(f'{a:.3f}' for a in row['accuracy'])}")
    rows = summary(found, arms)
    runs = [
        {"arm": r["arm"], "seed": r["seed"], **{f"step_{20 * i}": a for i, a in enumerate(r["accuracy"])}}
        for r in found
    ]
    for name, table in (("arms", rows), ("seeds", runs)):
        with (args.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    draw(found, arms, args.out / "staleness.png")
    print(
        json.dumps(
            {"benchmark": "staleness", "staleness": args.staleness, "steps": args.steps, "arms": rows, **machine()}
        )
    )


def _corrections() -> list[str]:
    return [name for name in options_of("correction") if name != "uncorrected"]


if __name__ == "__main__":
    main()
