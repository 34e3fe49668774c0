"""Which candidates are kept, in which order they are asked, and that nothing but candidates and settings decides it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtrail.core.problem import Problem
from offtrail.tasks.base import TaskError
from offtrail.tasks.candidates import candidates_in, examples_of_mix, held_index
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.overlap import Held, Index, Item
from offtrail.tasks.rejection import REASONS, Candidate, Sieve, Verdict, draw, mixed_in

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def candidate(question: str, answer: str, reward: float | None = 1.0, finished: bool = True) -> Candidate:
    return Candidate(Problem("file", 0, question, answer, {"place": "line 1"}), "reject.paths=file", reward, finished)


class Sifted(NamedTuple):
    """The places that are kept, and the verdicts on the others."""

    kept: list[int]
    rejected: list[Verdict]

    def counts(self) -> dict[str, int]:
        return dict(Counter(one.reason for one in self.rejected))


def sift(candidates: list[Candidate], config: RejectConfig, seed: int, held: Held | None = None) -> Sifted:
    """All of them, the last one first: their order is that of their places."""
    sieve = Sieve(config, seed, held)
    verdicts = [sieve.judged(place, one) for place, one in reversed(list(enumerate(candidates)))]
    chosen = [one for some in sieve.chosen(lambda place: candidates[place].problem.answer) for one in some]
    assert {one.place for one in chosen} == {one.place for one in verdicts if not one.reason}
    kept = sorted(one.place for one in chosen if not one.reason)
    return Sifted(kept, [one for one in (*verdicts, *chosen) if one.reason])


def kept(candidates: list[Candidate], seed: int = 0, **given: Any) -> list[str]:
    found = sift(candidates, RejectConfig(**given), seed)
    return [candidates[place].problem.answer for place in found.kept]


def test_each_candidate_counts_once_under_the_first_reason_it_meets() -> None:
    held = Held(Index([Item("set", "row 1", "what is three plus four times the square of nine minus six")]), [])
    asked = {
        "unscored": candidate("a", "x", None),
        "wrong": candidate("a", "", 0.0, finished=False),  # it is empty and unfinished, too
        "unfinished": candidate("a", "x", finished=False),
        "empty": candidate("a", " \n"),
        "mixed_language": candidate("a", "и так далее\n```\ncode\n```"),
        "long_paragraph": candidate("a", "so " * 200),
        "code_block": candidate("a", "```\ncode\n``` and {"),
        "unbalanced": candidate("a", "{ \x00"),
        "garbled": candidate("a", "a \x00 b"),
        "repetitive": candidate("a", "again and again " * 9),
        "short": candidate("a", "hm"),
        "long": candidate("a", " ".join(f"word{i}" for i in range(20))),
        "contaminated": candidate("So what is three plus four times the square of nine, minus six?", "about three"),
    }
    settings: dict[str, Any] = {
        "unscored": "drop", "language": "en", "longest_paragraph": 300, "drop_code_blocks": True, "repetition_n": 3,
        "shortest": 3, "longest": 100, "most": 2,
    }  # fmt: skip
    alike = " ".join(WORDS), " ".join([*WORDS[:-1], "thirteen"])  # 7 of 9 5-grams
    same = {
        "kept": candidate("b", alike[0]),
        "duplicate": candidate(" b", alike[0] + " "),
        "near_duplicate": candidate("b", alike[1]),
        "second": candidate("b", "another answer"),
        "surplus": candidate("b", "a third answer"),
        "other question": candidate("c", alike[0]),
    }
    rows = [*asked.values(), *same.values()]
    found = sift(rows, RejectConfig(**settings, near_duplicates=0.75), 0, held=held)
    names = [*asked, *same]
    assert [names[place] for place in found.kept] == ["kept", "second", "other question"]
    assert {names[one.place]: one.reason for one in found.rejected} == {name: name for name in names if name in REASONS}
    assert set(REASONS) == {one.reason for one in found.rejected}
    assert found.counts() == dict.fromkeys(REASONS, 1)
    assert "shares 'what is three plus four times the square of" in next(
        one.why for one in found.rejected if one.reason == "contaminated"
    )
    everything = sift(rows, RejectConfig(
        unscored="keep", min_reward=-1, drop_unfinished=False, drop_unbalanced=False, max_repetition=1,
        drop_duplicates=False, near_duplicates=1,
    ), 0)  # fmt: skip
    assert everything.counts() == {"empty": 2, "garbled": 2}  # what no job could imitate


def test_the_answers_to_a_question_are_chosen_as_asked() -> None:
    rows = [candidate("q", text) for text in ("a long answer", "short", "one of middling size")]
    assert kept(rows, most=1) == ["a long answer"]
    assert kept(rows, most=1, choose="shortest") == ["short"]
    assert kept(rows, most=2, choose="shortest") == ["a long answer", "short"]
    drawn = {kept(rows, seed, most=1, choose="random")[0] for seed in range(40)}
    assert drawn == {row.problem.answer for row in rows}
    assert kept(rows, 3, most=1, choose="random") == kept(rows[::-1], 3, most=1, choose="random")


def test_answers_are_asked_for_where_near_copies_are_compared_alone() -> None:
    """They stand on disk."""
    rows = [candidate("q", text) for text in ("one", "one ", "two", "three")] + [candidate("alone", "four")]
    asked = list[int]()

    def answer(place: int) -> str:
        asked.append(place)
        return rows[place].problem.answer

    for near, wanted in ((0.9, [0, 2]), (1.0, [])):
        sieve = Sieve(RejectConfig(most=2, near_duplicates=near), 0)
        for place, one in enumerate(rows):
            sieve.judged(place, one)
        verdicts = list(sieve.chosen(answer))
        assert [[one.reason for one in some] for some in verdicts] == [["", "duplicate", "", "surplus"], [""]]
        assert asked == wanted
        asked.clear()


def test_of_near_copies_the_better_one_stays_and_a_full_question_asks_no_more() -> None:
    longer, shorter = " ".join(WORDS), " ".join(WORDS[:-1])  # 7 of 8 5-grams
    rows = [candidate("q", longer), candidate("q", shorter)]
    assert kept(rows, near_duplicates=0.8) == [longer]
    assert kept(rows, near_duplicates=0.8, choose="shortest") == [shorter]
    assert kept(rows, near_duplicates=0.9) == [longer, shorter]
    found = sift([*rows, candidate("q", "else")], RejectConfig(most=1, near_duplicates=0.8), 0)
    assert found.counts() == {"surplus": 2}


def test_what_is_kept_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Python's hash of a text is another one in each."""
    code = (
        "from test_tasks_rejection import *\n"
        "rows = [candidate(f'q{i % 7}', ' '.join(WORDS[i % 5 : i % 5 + 6] + [WORDS[i % 11]])) for i in range(60)]\n"
        "print(sift(rows, RejectConfig(most=3, choose='random', near_duplicates=0.6), 5).kept, end=' ')\n"
        "print(draw('m', 90, 9, 5, repeat=False))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert len(json.loads(said.pop().split("] ")[0] + "]")) > 10


def test_mixed_data_have_their_share_of_the_result_by_examples() -> None:
    general = {"general": {"path": "x", "share": 0.25}}
    assert mixed_in(600_000, RejectConfig(mix=general)) == {"general": 200_000}  # R1's 600k and 200k
    both = {"a": {"path": "x", "share": 0.2}, "b": {"path": "x", "share": 0.3}}
    assert mixed_in(50, RejectConfig(mix=both)) == {"a": 20, "b": 30}
    once = draw("general", 100, 40, 7, repeat=False)
    assert len(set(once)) == 40
    assert once == sorted(once)
    assert once != draw("general", 100, 40, 8, repeat=False) != draw("other", 100, 40, 8, repeat=False)
    assert sorted(set(draw("a", 3, 8, 0, repeat=True))) == [0, 1, 2]
    assert len(draw("a", 3, 8, 0, repeat=True)) == 8
    with pytest.raises(ValueError, match=r"^reject.mix.a: its share is 8 rows, and its file has 3 that can be taken"):
        draw("a", 3, 8, 0, repeat=False)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"language": "xx"}, "reject.language_settings: xx is not known"),
        ({"language": "en", "language_settings": {"detektor": "lingua"}}, "reject.language_settings={'detektor'"),
        ({"longest": 3, "shortest": 4}, "reject.longest=3: must be ≥ reject.shortest=4"),
        ({"mix": {"a": {"path": "x"}}}, "reject.mix.a={'path': 'x'}: must be {path: FILE, share: NUMBER}"),
        ({"mix": {"a": {"path": "", "share": 0.1}}}, "reject.mix.a.path=: must be"),
        ({"mix": {"a": {"path": "x", "share": 0.1, "n": 3}}}, "reject.mix.a.n=3: unknown; must be one of path, share"),
        ({"mix": {"a": {"path": "x", "share": True}}}, "reject.mix.a.share=True: must be a share of the result"),
        ({"mix": {"a": {"path": "x", "share": 0.6}, "b": {"path": "x", "share": 0.4}}}, "reject.mix=['a', 'b']: their"),
        ({"min_reward": 1e10}, "reject.min_reward=10000000000.0: must be in [-1e9, 1e9]"),
        ({"paths": [""]}, "reject.paths=['']: an empty path"),
    ],
)
def test_settings_that_cannot_be_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(says)}"):
        RejectConfig(**given)


def rows_in(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_the_usual_forms_are_candidates(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    path = rows_in(
        tmp_path,
        {"prompt": "1+1?", "answer": "2", "reward": 1.1, "rewards": {"accuracy": 0.5, "format": 1}, "finish": "length"},
        {"messages": [*turns, {"role": "assistant", "content": "Ho."}], "reward": -1},
        {"prompt": turns, "answer": None, "rewards": {"format": 1}},
    )
    config = RejectConfig(paths=[path], unscored="keep")
    one, two, three = candidates_in(config, "accuracy", ChainConfig())
    assert (one.question, one.problem.answer, one.reward, one.finished) == ("1+1?", "2", 0.5, False)
    assert (two.problem.messages, two.problem.answer, two.reward) == (tuple(turns), "Ho.", -1.0)
    assert (three.problem.messages, three.problem.answer, three.reward) == (tuple(turns), "", None)
    assert one.fields["rewards"] == {"accuracy": 0.5, "format": 1}
    table, nan, none = tmp_path / "rows.parquet", [float("nan"), 1.0], [None, None]
    pq.write_table(pa.table({"prompt": ["1+1?", "2?"], "answer": ["2", "2"], "reward": nan, "finish": none}), table)
    config = RejectConfig(paths=[str(table)], unscored="keep")
    read = candidates_in(config, "accuracy", ChainConfig())
    assert [(one.reward, one.finished) for one in read] == [(None, True), (1.0, True)]
    path = rows_in(tmp_path, {"problem": "1+1?"})
    compared = RejectConfig(decontaminate_against=[path])
    held = held_index(compared, ChainConfig(), [Problem("chain", 3, "5;+1;%10=?", "6")])
    assert held is not None
    found = held.matches(Problem("x", 0, "so 1+1? or 5;+1;%10=?", ""))
    assert [item.place for item, _ in found] == ["held-out problem 3", "line 1"]
    assert held.matches(Problem("x", 0, "so 1-1? or 5;-1;%10=?", "")) == []
    assert held_index(RejectConfig(), ChainConfig(), []) is None


LONG = (
    "Below stands a problem of arithmetic, as they are asked in schools of all kinds. Read it with care, then answer: "
    "{prompt} Write your answer on the last line, with nothing else on it, and no full stop behind it."
)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_template_is_no_part_of_a_question_however_few_evaluation_problems_there_are(
    tmp_path: Path, n: int, form: str
) -> None:
    """Below three evaluation problems nothing says that its words stand in all of them."""
    asked = ["What is the sum of 3 and 4*2?", "How much is 17 less 9, and then 5 more?"]
    path = rows_in(tmp_path, *({"problem": LONG.replace("{prompt}", question)} for question in asked[:n]))

    def problem(question: str) -> Problem:
        text = LONG.replace("{prompt}", question)
        turns = ({"role": "system", "content": LONG}, {"role": "user", "content": text})
        told = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        return Problem("jsonl", 0, text, "") if form == "text" else Problem("jsonl", 0, told, "", messages=turns)

    config: TaskConfig = JsonlConfig(template=LONG)
    for given, task in (
        (RejectConfig(decontaminate_against=[path]), config),
        (RejectConfig(), config),
        (RejectConfig(), MixtureConfig(weights={"jsonl": 1.0}, settings={"jsonl": {"template": LONG}})),
    ):
        held = held_index(given, task, [problem(question) for question in asked[:n]])
        assert held is not None
        assert held.matches(problem("Ann has 5 pens and buys 7; how many?")) == []
        assert held.matches(problem("What is the sum of 3 and 4/2?")) == []
        for question in asked[:n]:
            assert held.matches(problem(f"So: {question.upper()} Say it.")) != []
            assert held.matches(Problem("other", 0, f"{question} Be quick.", "")) != []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "2"}, "field 'prompt' is missing (fields: 'answer'); mend the line, or set reject.prompt_field"),
        ({"prompt": "1", "answer": 2}, "field 'answer' is not text; mend the line, or set reject.answer_field"),
        ({"prompt": "1", "answer": "2", "reward": "good"}, "its reward is 'good', no number"),
        ({"prompt": "1", "answer": "2", "reward": True}, "its reward is True, no number"),
        ({"prompt": "1", "answer": "2"}, "has no reward ('accuracy' in `rewards`, or `reward`)"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = rows_in(tmp_path, {"prompt": "1", "answer": "2", "reward": 1}, row)
    with pytest.raises(TaskError, match=rf"^reject.paths={path}, line 2: {re.escape(says)}"):
        list(candidates_in(RejectConfig(paths=[path]), "accuracy", ChainConfig()))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "has no field 'task' that names one of the families chain, addition, by whose verifiers reject.unscored"),
        ({"task": "gsm8k"}, "field 'task' is 'gsm8k', none of the families chain, addition, by whose verifiers"),
        ({"task": ["chain"]}, "field 'task' is ['chain'], none of the families chain, addition"),
        ({"task": "addition"}, ""),
        ({"task": "gsm8k", "reward": 1}, ""),  # it is judged already
    ],
)
def test_a_row_is_verified_by_its_own_family_of_a_mixture_or_refused(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    given = {"prompt": "1", "answer": "2", "gold": "3"}
    path = rows_in(tmp_path, {**given, "task": "chain"}, given | row)
    read = candidates_in(RejectConfig(paths=[path], unscored="verify"), "accuracy", MixtureConfig())
    if not says:
        judged_by = ("", "") if "reward" in row else ("3", "addition")
        assert [(one.gold, one.family) for one in read] == [("3", "chain"), judged_by]
        return
    with pytest.raises(TaskError, match=rf"^reject.paths={path}, line 2: {re.escape(says)}"):
        list(read)


def test_a_row_of_further_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = rows_in(tmp_path, {"question": "1", "answer": "2"})
    with pytest.raises(
        TaskError, match=r"^reject.mix.more.path=\S+, line 1: field 'prompt' is missing .*set reject.mix"
    ):
        list(examples_of_mix("more", {"path": path}))
    [row] = examples_of_mix("more", {"path": path, "prompt_field": "question"})
    assert (row.prompt, row.answer) == ("1", "2")
