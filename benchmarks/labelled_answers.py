"""Labelled answers out of a task's worked ones, some of them spoiled, for job=prm and job=reward_model.

    python benchmarks/labelled_answers.py steps --rows 4000 --out steps.jsonl task=chain task.noise=0.1
    python launch.py job=prm prm.path=steps.jsonl 'prm.cut={by: separator, separator: ";", within: thought}'

``steps``: {prompt, answer, labels}, each step judged by the task's exact step checker; ``pairs``: {prompt, chosen,
rejected}, a right answer before a wrong one; ``judged``: {prompt, answer, label}, right or not. An answer is spoiled by
task.noise, whose error is carried on to the end, or by another digit in one place (--spoiled, a share of the answers).
Prompts are training problems of the task, each once.

Beside FILE stands FILE.json, where it is from: the command, the task's settings, counts, the hash of the file. The last
line of the output is the same as one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from offtrail.core.problem import Problem
from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.tracking.summary import git_commit
from offtrail.rewards.format import parse
from offtrail.tasks.base import GeneratedTask
from offtrail.tasks.registry import make_task

Row = dict[str, Any]


def answers(task: GeneratedTask[Any], problem: Problem, rng: random.Random, spoiled: float) -> Iterator[str]:
    """Worked answers to one problem without end."""
    while True:
        answer = task.trace(problem, rng)
        digits = [match.start() for match in re.finditer(r"\d", answer)]
        if digits and rng.random() < spoiled:
            at = rng.choice(digits)
            other = rng.choice([digit for digit in "0123456789" if digit != answer[at]])
            answer = answer[:at] + other + answer[at + 1 :]
        yield answer


def is_right(task: GeneratedTask[Any], problem: Problem, answer: str) -> bool:
    """By the task's verifier."""
    parts = parse(answer)
    return parts is not None and bool(task.verify(problem, parts.answer))


def steps(task: GeneratedTask[Any], problem: Problem, rng: random.Random, spoiled: float) -> Row | None:
    """One answer and a label a step; None of one that has no steps."""
    answer = next(answers(task, problem, rng, spoiled))
    labels = task.check_steps(problem, answer)
    return {"prompt": problem.prompt, "answer": answer, "labels": labels} if labels else None


def judged(task: GeneratedTask[Any], problem: Problem, rng: random.Random, spoiled: float) -> Row:
    """One answer, right or not."""
    answer = next(answers(task, problem, rng, spoiled))
    return {"prompt": problem.prompt, "answer": answer, "label": is_right(task, problem, answer)}


def pairs(task: GeneratedTask[Any], problem: Problem, rng: random.Random, spoiled: float) -> Row | None:
    """A right answer and a wrong one; None where none of 200 is of one kind."""
    found: dict[bool, str] = {}
    for answer in islice(answers(task, problem, rng, spoiled), 200):
        found.setdefault(is_right(task, problem, answer), answer)
    return {"prompt": problem.prompt, "chosen": found[True], "rejected": found[False]} if len(found) == 2 else None


KINDS = {"steps": steps, "pairs": pairs, "judged": judged}


def make(kind: str, config: Config, rows: int, spoiled: float) -> list[Row]:
    """``rows`` rows of the task's training problems, in their order, but for prompts that came before."""
    task, found, seen = make_task(config.task, config.run.seed), list[Row](), set[str]()
    if not isinstance(task, GeneratedTask):
        raise SystemExit(
            f"task={config.task.name}: has no worked answers made by program; take chain, addition or words"
        )
    for index in count():
        if len(found) == rows:
            return found
        problem = task.train(index)
        row = KINDS[kind](task, problem, random.Random(f"{kind}-{config.run.seed}-{index}"), spoiled)
        if row is not None and problem.prompt not in seen:
            seen.add(problem.prompt)
            found.append(row)
        if index > 100 * rows + 10_000:
            raise SystemExit(f"task={config.task.name}: {index} problems gave {len(found)} rows only; ask for fewer")
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--spoiled", type=float, default=0.3, help="share of answers with another digit in one place")
    parser.add_argument("--out", type=Path, required=True)
    given, settings = parser.parse_known_args()
    config = compose(["task.worked_share=1", *settings])
    rows = make(given.kind, config, given.rows, given.spoiled)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    given.out.write_text(text, encoding="utf-8")
    labels = [label for row in rows for label in row.get("labels", [row["label"]] if "label" in row else [])]
    told = {
        "kind": given.kind,
        "rows": len(rows),
        "labels": len(labels),
        "good_share": round(sum(labels) / len(labels), 4) if labels else None,
        "spoiled": given.spoiled,
        "seed": config.run.seed,
        "task": dataclasses.asdict(config.task),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "git_commit": git_commit(),
    }
    Path(f"{given.out}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
