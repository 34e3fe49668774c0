"""Answers made to hang or to break the comparison, through the real pool and the real worker."""

from __future__ import annotations

import pytest

from offtrail.core.types import Problem
from offtrail.platform.config.schema import Config
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.rewards.config import RewardConfig
from offtrail.tasks.jsonl import JsonlConfig

HOSTILE = [
    "",
    "\0",
    "9^9^9^9",
    "10^10^10",
    "123456789!",
    r"\sqrt{" * 3000,
    "(" * 3000 + ")" * 3000,
    r"\frac{1}{",
    r"\left( \begin{pmatrix} 1",
    "}{" * 500,
    "\\" * 1999,
    "x" * 10_000_000,
    "1 " * 5_000_000,
    "\\boxed{" * 1_500_000,
    "½ ≤ ∑ 🙂 \u202e\ud7ff",
    "+".join(["x"] * 900),
]


@pytest.mark.parametrize(("where", "policy"), [("tags", "strict"), ("tags", "lenient"), ("boxed", "lenient")])
def test_each_gets_a_score_or_a_reason_and_the_next_answer_is_judged(where: str, policy: str):
    """9^{9·9^9} passes the filter: a worker that hangs on it is replaced, one that runs out of memory gives 0."""
    config = Config(
        task=JsonlConfig(compare="math", compare_policy=policy),  # type: ignore[arg-type]
        reward=RewardConfig(answer=where, deadline_seconds=5.0, on_timeout="refuse"),  # type: ignore[arg-type]
    )
    form = "<think></think><answer>{}</answer>" if where == "tags" else "\\boxed{{{}}}"
    texts = [
        form.format(answer) for answer in [*HOSTILE, r"9^{9 \cdot 9^9}", r"\frac{2}{4}" if where == "tags" else "1/2"]
    ]
    with VerifierPool(config) as pool:
        for key, text in enumerate(texts):
            pool.submit(key, Problem("jsonl", 0, "q", r"\frac{1}{2}" if where == "tags" else "1/2"), [text], [True])
        found, reasons = {}, {}
        while pool.pending:
            for key, components in pool.poll(timeout_s=0.5):
                found[key] = components
                if components is None:
                    reasons[key] = pool.reason(key)
    assert sorted(found) == list(range(len(texts)))
    assert all("reward.deadline_seconds=5" in reason for reason in reasons.values())
    assert len(reasons) <= 1
    assert [key for key, c in found.items() if c is not None and c["accuracy"].tolist() == [1.0]] == [len(texts) - 1]
