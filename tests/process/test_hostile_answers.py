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
HANGS = r"9^{9 \cdot 9^9}"


@pytest.mark.parametrize(
    ("where", "policy"),
    [
        pytest.param("tags", "strict", marks=pytest.mark.prove),
        pytest.param("tags", "lenient", marks=pytest.mark.prove),
        ("boxed", "lenient"),
    ],
)
def test_each_gets_a_score_or_a_reason_and_the_next_answer_is_judged(where: str, policy: str):
    """HANGS passes the filter: where math-verify is asked, its worker is killed at the deadline and replaced."""
    config = Config(
        task=JsonlConfig(compare="math", compare_policy=policy),  # type: ignore[arg-type]
        reward=RewardConfig(answer=where, deadline_seconds=5.0, on_timeout="refuse"),  # type: ignore[arg-type]
    )
    form = "<think></think><answer>{}</answer>" if where == "tags" else "\\boxed{{{}}}"
    answers = [*HOSTILE, HANGS, r"\frac{2}{4}"]
    found, reasons = {}, {}
    with VerifierPool(config) as pool:
        for key, answer in enumerate(answers):
            pool.submit(key, Problem("jsonl", 0, "q", r"\frac{1}{2}"), [form.format(answer)], [True])
        while pool.pending:
            for key, components in pool.poll(timeout_s=0.5):
                found[key] = components
                if components is None:
                    reasons[key] = pool.reason(key)
    late = [len(HOSTILE)] if policy == "lenient" else []
    assert sorted(found) == list(range(len(answers)))
    assert list(reasons) == late
    assert all("ran past reward.deadline_seconds=5" in reason for reason in reasons.values())
    assert [key for key, c in found.items() if c is not None and c["accuracy"].tolist() == [1.0]] == [len(answers) - 1]
