"""Which answers are kept to be imitated (job=reject): candidates in, those that are kept and why each other is not.

    rows ─► Candidate ─► Sieve.judged: each filter in its order (filters.py)
                              └─► Sieve.chosen: of one question copies, near copies, the best k

Pure: no file is read or written. DeepSeek-R1's second fine-tuning rests on data that are made so (arXiv:2501.12948,
§2.3.3). A candidate counts under the first reason that it meets, in the order of REASONS; which are kept is a function
of the candidates, their order and settings alone. Invariant: no text of a candidate is held, so that there may be more
of them than memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from offtrail.core.problem import Problem
from offtrail.rewards.base import RewardError
from offtrail.rewards.components.language import Language
from offtrail.tasks import filters
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.overlap import Held

REASONS = (
    "unscored", "wrong", "unfinished", "empty", "mixed_language", "long_paragraph", "code_block", "unbalanced",
    "garbled", "repetitive", "short", "long", "contaminated", "duplicate", "surplus", "near_duplicate",
)  # fmt: skip
"""Why a candidate is left out, in the order in which it is asked."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row. ``problem`` is the question, its ``answer`` what is to be imitated; ``reward``: of the main component,
    None where the row has none; ``fields``: all that the row says; ``gold``: the answer that it is still to be judged
    by, as a problem of a mixture's ``family`` (empty: of the task). ``source`` is the file as key=path.
    """

    problem: Problem
    source: str
    reward: float | None
    finished: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    gold: str = ""
    family: str = ""

    @property
    def question(self) -> str:
        """Candidates with equal ones answer the same question."""
        return " ".join(self.problem.prompt.split())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a candidate: its place among all, and why it is left out, the reason by name (empty: it is not)
    and what there is to say of it.
    """

    place: int
    reason: str = ""
    why: str = ""


Check = Callable[[Candidate], str]
"""Why a candidate is left out; empty where it is not."""


def language_of(config: RejectConfig) -> Callable[[str], float] | None:
    """Share of words of a text in the wanted language; None where that is not asked. ValueError at a language or a
    setting that is not known.
    """
    if not config.language:
        return None
    try:
        return Language(target=config.language, **config.language_settings).share
    except RewardError as error:
        raise ValueError(str(error).replace("reward.settings.language", "reject.language_settings")) from None
    except TypeError:
        given = config.language_settings
        raise ValueError(f"reject.language_settings={given}: has detector and others alone") from None


def checks(config: RejectConfig, held: Held | None = None) -> list[tuple[str, Check]]:
    """(reason, check) of what is asked of each candidate by itself, in order. ``held``: evaluation problems."""
    found: list[tuple[str, Check]] = []

    def ask(reason: str, on: object, why: Check) -> None:
        if on:
            found.append((reason, why))

    def of_text(judge: Callable[..., str], *settings: Any) -> Check:
        return lambda one: judge(one.problem.answer, *settings)

    share = language_of(config)
    ask("unscored", config.unscored in ("drop", "verify"), lambda one: "it has no reward" if one.reward is None else "")
    ask("wrong", True, lambda one: _low(one.reward, config.min_reward))
    ask("unfinished", config.drop_unfinished, lambda one: "" if one.finished else "it was cut at the longest length")
    ask("empty", True, lambda one: "" if one.problem.answer.strip() else "there is no answer")
    ask("mixed_language", share, of_text(filters.mixed_language, share, config.min_language))
    ask("long_paragraph", config.longest_paragraph, of_text(filters.long_paragraph, config.longest_paragraph))
    ask("code_block", config.drop_code_blocks, of_text(filters.code_block))
    ask("unbalanced", config.drop_unbalanced, of_text(filters.unbalanced))
    ask("garbled", True, of_text(filters.garbled, config.max_marks))
    ask(
        "repetitive", config.max_repetition < 1, of_text(filters.repetitive, config.max_repetition, config.repetition_n)
    )
    ask("short", config.shortest, of_text(filters.short, config.shortest))
    ask("long", config.longest, of_text(filters.long, config.longest))
    ask("contaminated", held, lambda one: _shared(held, one.problem) if held else "")
    return found


def _low(reward: float | None, least: float) -> str:
    return f"its reward is {reward:g}, lower than {least:g}" if reward is not None and reward < least else ""


def _shared(held: Held, problem: Problem) -> str:
    found = held.matches(problem)
    return f"it shares {found[0][1]!r} with {found[0][0].source}, {found[0][0].place}" if found else ""


@dataclass(frozen=True, slots=True)
class Fit:
    """What is held of a candidate that is fit by itself: its place, what tells its answer from others up to blanks, and
    by what it is liked, the least first.
    """

    place: int
    text: bytes
    rank: bytes


class Sieve:
    """Candidates go through one by one, in any order; then those that are fit are chosen from, question by question.
    ``held``: evaluation problems.
    """

    def __init__(self, config: RejectConfig, seed: int, held: Held | None = None) -> None:
        self._config, self._seed, self._checks = config, seed, checks(config, held)
        self._fit: dict[bytes, list[Fit]] = {}
        """Question, by its hash → candidates."""

    def judged(self, place: int, one: Candidate) -> Verdict:
        """Whether the candidate at a place is fit by itself; it is noted if it is."""
        for reason, check in self._checks:
            if why := check(one):
                return Verdict(place, reason, why)
        text = digest(filters.same_text(one.problem.answer))
        self._fit.setdefault(digest(one.question), []).append(Fit(place, text, self._rank(one)))
        return Verdict(place)

    def chosen(self, answer: Callable[[int], str]) -> Iterator[list[Verdict]]:
        """The verdicts on all that are fit, those on one question together. ``answer``: that of the candidate at a
        place, for which it is asked where near copies are compared.
        """
        for fit in self._fit.values():
            yield list(chosen(fit, answer, self._config))

    def _rank(self, one: Candidate) -> bytes:
        match self._config.choose:
            case "shortest":
                return len(one.problem.answer).to_bytes(8)
            case "random":
                return digest(self._seed, one.question, one.problem.answer)
            case _:
                return b""


def chosen(fit: Sequence[Fit], answer: Callable[[int], str], config: RejectConfig) -> Iterator[Verdict]:
    """The verdict on each answer to one question. The better ones come first, so that of copies the best stays."""
    kept, texts, grams = 0, set[bytes](), list[frozenset[int]]()
    near = config.near_duplicates if len(fit) > 1 else 1.0
    for one in sorted(fit, key=lambda one: (one.rank, one.place)):
        if one.text in texts and config.drop_duplicates:
            yield Verdict(one.place, "duplicate", "the same answer to the question is kept already")
            continue
        if config.most and kept >= config.most:
            yield Verdict(one.place, "surplus", f"{config.most} answers to the question are kept")
            continue
        if near < 1 and one.text not in texts:  # copies that are wanted are no near copies
            mine = filters.shingles(filters.same_text(answer(one.place)), config.near_n)
            alike = [other for other in grams if filters.most_similar(mine, other) >= near]
            close = max((filters.similarity(mine, other) for other in alike), default=0.0)
            if close >= near:
                why = f"{close:.2f} of its {config.near_n}-grams are those of one that is kept"
                yield Verdict(one.place, "near_duplicate", why)
                continue
            grams.append(mine)
        texts.add(one.text)
        kept += 1
        yield Verdict(one.place)


def digest(*key: Any) -> bytes:
    """What tells keys apart, in any process the same; and a random order of them."""
    return blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def mixed_in(kept: int, config: RejectConfig) -> dict[str, int]:
    """Name → rows that are drawn of it, so that each has its share of the result: share × kept / (1 − all shares)."""
    left = 1 - sum(entry["share"] for entry in config.mix.values())
    return {name: round(kept * entry["share"] / left) for name, entry in config.mix.items()}


def draw(name: str, rows: int, wanted: int, seed: int, *, repeat: bool) -> list[int]:
    """Places of ``wanted`` of ``rows`` rows, by ``seed``, in their order; with ``repeat`` all of them as often as they
    go in, and so many more. ValueError where there are too few.
    """
    if wanted > rows and not (repeat and rows):
        raise ValueError(
            f"reject.mix.{name}: its share is {wanted:,} rows, and its file has {rows:,} that can be taken; lower the "
            "share, give a larger file, or say repeat: true"
        )
    order = sorted(range(rows), key=lambda place: digest(seed, name, place))
    return sorted(place for turn in range(-(-wanted // rows) if rows else 0) for place in order[: wanted - turn * rows])
