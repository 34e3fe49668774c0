"""What does not move while a run goes on, or moves the wrong way (hacking.py), each said once: in the broker's log,
the progress view and summary.json.

    broker ── each learner step's row ──► Diagnosis.take ──► new lines ──► log; Status.summary["warnings"] ──► launcher

A finding is a predicate of one row that holds for PATIENCE steps in a row (fewer where the whole run has fewer). It
ends nothing: only the user knows whether a reward that is all zeros for ten steps is a mistake or a hard task. What
cannot work whatever happens is refused before the start (config/learnable.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from offtrail.platform.config.learnable import GROUP_RELATIVE
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.hacking import Watch

PATIENCE = 10
"""Learner steps that show the same thing before it is said."""
CUT = 0.99
"""Share of cut answers from which on hardly any ends by itself."""
STRAY = 0.01
"""Share of sampled tokens without text up to which they are stray ones."""
FAILED = 0.05
"""Share of failed groups up to which a data set has some odd problems."""

Row = Mapping[str, float | None]
Finding = Callable[[Row], str]
"""What a row shows; empty where it does not."""


class Diagnosis:
    """The findings of one run. ``lines``: what was said so far, in order; a restart begins with the rows that stand.
    ``failure``: why the newest of the failed groups has failed.
    """

    def __init__(self, config: Config, rows: Iterable[Row] = (), failure: Callable[[], str] = str) -> None:
        self.lines: list[str] = []
        self._patience = min(PATIENCE, config.steps)
        self._findings = [*_findings(config), _failing(config, failure)]
        self._held = [0] * len(self._findings)
        """How many steps in a row each has held."""
        self._said = [False] * len(self._findings)
        self._watches = [Watch(model) for model in config.scorer.models]
        self._without_room, self._said_without_room = _without_room(config), False
        for row in rows:
            self.take(row)
            self.take_scores(int(row["step"] or 0), row)

    def take(self, row: Row) -> list[str]:
        """Look at the row of one learner step (docs/metrics.md), and say what is new."""
        new, step = [], int(row["step"] or 0)
        for i, finding in enumerate(self._findings):
            shown = finding(row)
            self._held[i] = self._held[i] + 1 if shown else 0
            if self._held[i] >= self._patience and not self._said[i]:
                self._said[i] = True
                new.append(f"steps {step - self._held[i] + 1} to {step}: {shown}")
        for watch in self._watches:
            if words := watch.take(row):
                new.append(f"steps {watch.onset} to {step}: {words}")
        self.lines += new
        return new

    @property
    def onsets(self) -> dict[str, int]:
        """`hacking/MODEL/onset_step`, of the models whose alarm was raised."""
        return {f"hacking/{watch.model}/onset_step": watch.onset for watch in self._watches if watch.found}

    def take_scores(self, version: int, scores: Row) -> list[str]:
        """Look at the scores of one version, if there are any, and say what is new."""
        shown = self._without_room(scores)
        if not shown or self._said_without_room:
            return []
        self._said_without_room = True
        self.lines.append(f"version {version}: {shown}")
        return self.lines[-1:]


def _findings(config: Config) -> list[Finding]:
    scored = [_unearned(name) for name, weight in config.reward.weights.items() if weight > 0]
    return [_alike(config), *scored, _cut(config), _still(config), _no_rate(config), _without_text]


def _alike(config: Config) -> Finding:
    relative = config.algo.advantage in GROUP_RELATIVE and not config.algo.process.channel

    def finding(row: Row) -> str:
        if not relative or row.get("reward/zero_variance_share") != 1.0:
            return ""
        return (
            f"in every group all rewards were equal (reward/mean {row.get('reward/mean') or 0:.3g}): each advantage is "
            "0 and nothing is learned; look at the answers and at what scores them, and take problems that the model "
            "solves sometimes"
        )

    return finding


def _unearned(name: str) -> Finding:
    def finding(row: Row) -> str:
        if row.get(f"reward/{name}") != 0.0:
            return ""
        return (
            f"reward/{name} was 0 for every answer; look at the answers (TensorBoard's texts, trajectories/), at what "
            "the prompt asks for, and at sampling.max_new_tokens"
        )

    return finding


def _cut(config: Config) -> Finding:
    def finding(row: Row) -> str:
        share = row.get("length/truncated_share") or 0.0
        if share < CUT:
            return ""
        return (
            f"{share:.0%} of the answers were cut at sampling.max_new_tokens={config.sampling.max_new_tokens}; raise "
            "it, or see which tokens end an answer (docs/text.md)"
        )

    return finding


def _still(config: Config) -> Finding:
    alike = _alike(config)
    left_out = {
        "offpolicy/rejected_fraction": f"correction={config.correction.name} leaves every token out",
        "policy/masked_fraction": f"algo={config.algo.name} leaves every token out",
    }

    def finding(row: Row) -> str:
        if row.get("policy/grad_norm") != 0.0 or alike(row):  # which says why
            return ""
        causes = [why for name, why in left_out.items() if row.get(name) == 1.0]
        return f"policy/grad_norm was exactly 0: the policy does not move{''.join(f' ({why})' for why in causes)}"

    return finding


def _no_rate(config: Config) -> Finding:
    key = "sft.lr" if config.job == "sft" else "learner.optim.lr"

    def finding(row: Row) -> str:
        return f"policy/lr was 0 ({key}): the policy does not move" if row.get("policy/lr") == 0.0 else ""

    return finding


def _without_text(row: Row) -> str:
    share = row.get("length/beyond_tokenizer_share") or 0.0
    if share <= STRAY:
        return ""
    return (
        f"{share:.1%} of the sampled tokens are beyond the tokenizer and decode to nothing (rows of the embedding that "
        "no text uses); take the model's own tokenizer, or a model that was trained with it"
    )


def _without_room(config: Config) -> Finding:
    """Of held-out prompts, of all sets together."""
    areas = ["eval", *(f"eval/{label}" for label in config.eval.sets)]

    def finding(row: Row) -> str:
        without = sum(row.get(f"{area}/prompts_without_room") or 0 for area in areas)
        asked = sum(row.get(f"{area}/prompts") or 0 for area in areas)
        if not without:
            return ""
        return (
            f"{without:.0f} of {asked:.0f} held-out prompts leave no room for their answers in "
            f"model.max_length={config.model.max_length} and count as wrong; raise it, or lower "
            "sampling.max_new_tokens"
        )

    return finding


def _failing(config: Config, failure: Callable[[], str]) -> Finding:
    def finding(row: Row) -> str:
        failed = (row.get("queue/refused_failed") or 0.0) + (row.get("queue/refused_unscored") or 0.0)
        trained = (row["step"] or 0.0) * config.batch.groups
        made = trained + (row.get("queue/groups") or 0.0) + (row.get("queue/refused") or 0.0)
        if failed <= FAILED * made:
            return ""
        return (
            f"{failed:.0f} of {made:.0f} groups so far were refused as failed or unscored, and nothing is learned from "
            f"their problems; the last: {failure()}"
        )

    return finding
