"""Pairs of answers to one question (job=prefer): which are put side by side, and what a judge's words come to.

    rows ─► answers_in ─► Candidate ─► Answer, by question ─► drawn ─► a pair ─► the higher reward | verdict of a judge

Invariant: which pairs are drawn follows from the rows, the settings and run.seed alone, and in a pair the row that came
first is the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from offtrail.tasks.base import TaskError
from offtrail.tasks.candidates import family_of, gold_of, reward_of, text_of_answer
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import PreferConfig
from offtrail.tasks.examples import question_and_answer
from offtrail.tasks.preferences import answer_part
from offtrail.tasks.rejection import Candidate, digest
from offtrail.tasks.rows import rows_in

VERDICT = re.compile(r"\[\[([ABC])\]\]")
ALONE = re.compile(r"\W*([ABC])\W*")


class Answer(NamedTuple):
    """What is held of a row: its place among all, its reward, and a digest of what stands behind its thought."""

    place: int
    reward: float
    read: bytes


class Pair(NamedTuple):
    """Two answers to one question, of which ``first`` stands before ``second`` in the data."""

    first: Answer
    second: Answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge replied when the first answer stood before the second, and when they had changed places."""

    straight: str
    turned: str

    @property
    def preferred(self) -> int | None:
        """0 or 1, the answer that is better in both orders; −1 where there is none; None where one reply says nothing.

        Only what holds in both orders counts (arXiv:2306.05685, §3.4).
        """
        one, other = said(self.straight), said(self.turned)
        if not one or not other:
            return None
        return {"AB": 0, "BA": 1}.get(one + other, -1)

    @property
    def by_place(self) -> bool:
        """Whether both times the answer won that stood in the same place."""
        one, other = said(self.straight), said(self.turned)
        return one == other and one in "AB" and one != ""


def said(reply: str) -> str:
    """A, B, C (neither), or empty where a reply is no verdict: its last [[…]], or a letter that is all it says."""
    text = answer_part(reply)
    if found := VERDICT.findall(text):
        return str(found[-1])
    alone = ALONE.fullmatch(text)
    return alone[1] if alone else ""


def answers_in(config: PreferConfig, main: str, task: TaskConfig) -> Iterator[Candidate]:
    """The rows of every file. Raises TaskError with file and row where one cannot be read, or has no reward or gold
    answer where there must be one.
    """
    for path in config.paths:
        name = f"prefer.paths={path}"
        for row in rows_in(Path(path), "prefer.paths"):
            problem, answer = question_and_answer(row, name, config.prompt_field, config.answer_field)
            where = f"{name}, {row.place}"
            answer = text_of_answer(answer, config.answer_field, where, "prefer")
            reward, gold, family = reward_of({"reward": row.fields.get("reward")}, main, where), "", ""
            if config.by == "reward" and reward is None:
                raise TaskError(
                    f"{where}: has no `reward`, which prefer.by=reward compares; sample with a reward, or say "
                    "prefer.by=verify or judge"
                )
            if config.by == "verify":
                gold = gold_of(row.fields, config.gold_field, where, "prefer")
                family = family_of(row.fields, task, where, "prefer")
            finished = row.fields.get("finish") in (None, "stop")
            yield Candidate(replace(problem, answer=answer), name, reward, finished, row.fields, gold, family)


def drawn(answers: Sequence[Answer], config: PreferConfig, seed: int) -> tuple[list[Pair], str]:
    """The pairs of one question that are put side by side; and where there are none, why: one_answer, equal_answers
    (behind their thoughts), equal_rewards.
    """
    if len(answers) < 2:
        return [], "one_answer"
    pairs = [Pair(*sorted(pair)) for pair in combinations(answers, 2) if pair[0].read != pair[1].read]
    if not pairs:
        return [], "equal_answers"
    if config.by != "judge":
        pairs = [pair for pair in pairs if abs(pair.first.reward - pair.second.reward) > config.margin]
    if config.most:
        pairs = sorted(pairs, key=lambda pair: digest(seed, pair.first.place, pair.second.place))[: config.most]
    return pairs, "" if pairs else "equal_rewards"
