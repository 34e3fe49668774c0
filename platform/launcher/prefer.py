"""job=prefer: of answers to one question pairs of a better and a worse one, by their rewards or by a judge.

    rows of prefer.paths ─► (verify: reject.scored) ─► Answers of each question ─► pairs (tasks/pairs.py)
        ─► the higher reward | judge.py ⇄ verdicts.jsonl ─► data.jsonl, for reward_model.path

A judge sees only what stands behind the thoughts. Invariant: a verdict is on disk before it counts, so that a job that
was cut asks what is missing, and its data are those of the verdicts that stand there, in the order of the pairs.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.asking import COLUMNS, Bar, Outcome, check_same, run_reading
from offtrail.platform.launcher.dataset import as_line, write_about, write_data
from offtrail.platform.launcher.inputs import hashes, inputs_of
from offtrail.platform.launcher.judge import Shown, judge
from offtrail.platform.launcher.reject import asked, place_of, scored
from offtrail.platform.launcher.spool import Spool, spooled
from offtrail.platform.tracking.summary import read_summary, write_summary
from offtrail.rewards.total import columns, total
from offtrail.tasks.pairs import Answer, Pair, Verdict, answers_in, drawn
from offtrail.tasks.preferences import answer_part
from offtrail.tasks.rejection import Candidate, digest

VERDICTS_FILE = "verdicts.jsonl"
SECTIONS = ("prefer", "reward", "task")


@dataclass
class Found:
    """What came of the rows: counted while pairs are made of them."""

    rows: int = 0
    questions: int = 0
    pairs: int = 0
    ties: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → rows (no_answer, unjudged), questions (one_answer, equal_answers, equal_rewards) or pairs (unreadable,
    tie) that are no line."""
    judged: int = 0
    by_place: int = 0
    agreed: list[bool] = field(default_factory=list)
    """Of each pair that a judge decided and whose rewards differ, whether it prefers the higher one."""

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        by_judge = {"prefer/judged": self.judged, "prefer/by_place_share": self.by_place / max(1, self.judged)}
        agreed = {"prefer/agrees_with_reward": sum(self.agreed) / len(self.agreed)} if self.agreed else {}
        return {
            "prefer/rows": self.rows,
            "prefer/questions": self.questions,
            "prefer/pairs": self.pairs,
            "prefer/ties": self.ties,
            **(by_judge if self.judged else {}),
            **agreed,
            "data/lines": self.pairs + self.ties,
            "data/left_out": dict(self.left_out),
        }

    def table(self) -> Table:
        """For the terminal."""
        told, shown = self.summary(), Table.grid(padding=(0, 2))
        rows = {
            "pairs": f"{self.pairs:,} of {self.questions:,} questions, {self.rows:,} answers",
            "ties kept": f"{self.ties:,}" if self.ties else "",
            "judged": f"{self.judged:,} pairs, {told.get('prefer/by_place_share', 0):.3f} by place"
            if self.judged
            else "",
            "the judge prefers the higher reward": f"{told['prefer/agrees_with_reward']:.3f} of {len(self.agreed):,}"
            if self.agreed
            else "",
            "left out": ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.left_out.items())),
        }
        for name, value in rows.items():
            if value:
                shown.add_row(name, value)
        return shown


def run_preferring(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """job=prefer: how it ended, and why."""
    return run_reading(prefer, config, run_dir, interrupted, "goes on")


def prefer(config: Config, run_dir: Path, interrupted: list[int]) -> Outcome:
    """Read, put side by side, have judged what was not judged yet, write."""
    check_same(config, run_dir, "comparison")
    given, found = config.prefer, Found()
    with spooled(run_dir) as spool:
        pairs = pairs_of(config, spool, interrupted, found)
        by_judge = given.by == "judge"
        verdicts = verdicts_of(config, run_dir, pairs, spool, interrupted) if by_judge else [None] * len(pairs)
        lines = lines_of(config, zip(pairs, verdicts, strict=True), spool, found)
        data = write_data(run_dir, lines)
    told = found.summary()
    if not data["lines"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in found.left_out.items())
        return "failed", f"prefer.paths={given.paths}: {found.rows:,} rows make no pair ({reasons})"
    write_about(run_dir, config, SECTIONS, {"counts": told, "data": data, "inputs": hashes(inputs_of(config, run_dir))})
    write_summary(run_dir, read_summary(run_dir) | told)
    Console().print(found.table(), highlight=False)
    return "completed", ""


def pairs_of(config: Config, spool: Spool, interrupted: list[int], found: Found) -> list[Pair]:
    """The pairs that are put side by side, question by question in the order in which they come; ``spool`` has the
    texts of all answers. Raises TaskError, and StoppedError after a signal.
    """
    questions: defaultdict[bytes, list[Answer]] = defaultdict(list)
    for place, one in rows_of(config, interrupted):
        found.rows += 1
        if not answer_part(one.problem.answer).strip():
            found.left_out["no_answer"] += 1
            continue
        if config.prefer.by == "verify" and one.reward is None:
            found.left_out["unjudged"] += 1
            continue
        spool.put(place, as_line({**asked(one.problem), "answer": one.problem.answer, "from": place_of(one)}))
        reward = float("nan") if one.reward is None else one.reward
        questions[digest(one.question)].append(Answer(place, reward, digest(answer_part(one.problem.answer).split())))
    found.questions, pairs = len(questions), list[Pair]()
    for answers in sorted((sorted(one) for one in questions.values()), key=lambda one: one[0].place):
        some, why = drawn(answers, config.prefer, config.run.seed)
        pairs += some
        found.left_out.update([why] if why else [])
    return pairs


def rows_of(config: Config, interrupted: list[int]) -> Iterator[tuple[int, Candidate]]:
    """(place, row) of each, with the reward by which it is compared."""
    candidates = answers_in(config.prefer, config.reward.main, config.task)
    for place, one in scored(config, candidates, interrupted):
        if config.prefer.by != "verify" or one.reward is None:
            yield place, one
            continue
        told = columns({name: [value] for name, value in one.fields["rewards"].items()})
        of_task = one.family or config.task.name
        reward = float(total(config.reward, told, task=of_task, step=config.learner.steps)[0])
        yield place, Candidate(one.problem, one.source, reward, one.finished, one.fields, one.gold, one.family)


def verdicts_of(
    config: Config, run_dir: Path, pairs: Sequence[Pair], spool: Spool, interrupted: list[int]
) -> list[Verdict]:
    """Of each pair what the judge has said of it, now or before this job was cut."""
    file, known = run_dir / VERDICTS_FILE, dict[int, Verdict]()
    numbers = {(pair.first.place, pair.second.place): number for number, pair in enumerate(pairs)}
    for line in whole_lines(file):
        told = json.loads(line)
        if (number := numbers.get(tuple(told["pair"]))) is None:
            raise ValueError(f"{file}: {told['pair']} is no pair of these rows; take another run.name")
        known[number] = Verdict(told["straight"], told["turned"])
    console = Console(stderr=True)
    with (
        file.open("ab") as written,
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as shown,
    ):
        bar = Bar(shown, len(pairs), len(known), lambda: None, quiet=console.is_terminal)
        bar.say("pairs")

        def note(number: int, verdict: Verdict) -> None:
            first, second = (answer.place for answer in pairs[number])
            told = {"pair": [first, second], "straight": verdict.straight, "turned": verdict.turned}
            written.write(as_line(told).encode("utf-8", "backslashreplace"))
            written.flush()
            known[number] = verdict
            bar.answered(1)

        todo = ((number, shown_of(pair, spool)) for number, pair in enumerate(pairs) if number not in known)
        judge(config.prefer.judge, todo, note, interrupted)
    return [known[number] for number in range(len(pairs))]


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that was written to its end; what a kill has cut short is cut off."""
    data = file.read_bytes() if file.exists() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with file.open("r+b") as torn:
            torn.truncate(end)
    return data[:end].splitlines()


def shown_of(pair: Pair, spool: Spool) -> Shown:
    """What the judge sees of a pair."""
    first, second = (json.loads(spool.line(answer.place)) for answer in pair)
    prompt = first["prompt"]
    question = (
        prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )
    return Shown(question, *(answer_part(one["answer"]).strip() for one in (first, second)))


def lines_of(
    config: Config, judged: Iterator[tuple[Pair, Verdict | None]], spool: Spool, found: Found
) -> Iterator[str]:
    """The lines of data.jsonl, in the order of the pairs; ``found`` is told of them."""
    for pair, verdict in judged:
        better = by_reward(pair) if verdict is None else verdict.preferred
        if verdict is not None and better is not None:
            found.judged += 1
            found.by_place += verdict.by_place
        if better is None or (better < 0 and config.prefer.ties == "drop"):
            found.left_out["unreadable" if better is None else "tie"] += 1
            continue
        rewards = {"chosen": pair[max(better, 0)].reward, "rejected": pair[1 - max(better, 0)].reward}
        differ = rewards["chosen"] != rewards["rejected"] and all(value == value for value in rewards.values())
        if verdict is not None and better >= 0 and differ:
            found.agreed.append(rewards["chosen"] > rewards["rejected"])
        found.ties += better < 0
        found.pairs += better >= 0
        chosen, rejected = (json.loads(spool.line(pair[i].place)) for i in (max(better, 0), 1 - max(better, 0)))
        yield as_line(
            {
                "prompt": chosen["prompt"],
                "chosen": chosen["answer"],
                "rejected": rejected["answer"],
                **({"tie": True} if better < 0 else {}),
                "rewards": {name: round(value, 6) for name, value in rewards.items()},
                "preferred_by": config.prefer.by,
                "from": {"chosen": chosen["from"], "rejected": rejected["from"]},
            }
        )


def by_reward(pair: Pair) -> int:
    """0 or 1, the answer whose reward is higher."""
    return int(pair.second.reward > pair.first.reward)
