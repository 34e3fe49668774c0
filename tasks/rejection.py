"""Which answers are kept to be imitated (job=reject): candidates in, those that are kept and why each other is not.

    rows ─► Candidate ─► each filter in its order (filters.py) ─► of one question: copies, near copies, the best k

Pure: no file is read or written. DeepSeek-R1's second fine-tuning rests on data that are made so (arXiv:2501.12948,
§2.3.3). A candidate counts under the first reason that it meets, in the order of REASONS; what is kept is in the
order of the candidates, and a function of candidates and settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from offtrail.core.problem import Problem
from offtrail.rewards.base import RewardError
from offtrail.rewards.components.language import Language
from offtrail.tasks import filters
from offtrail.tasks.data_config import RejectConfig
from offtrail.tasks.overlap import Index

REASONS = (
    "unscored", "wrong", "unfinished", "empty", "mixed_language", "long_paragraph", "code_block", "unbalanced",
    "garbled", "repetitive", "short", "long", "contaminated", "duplicate", "surplus", "near_duplicate",
)  # fmt: skip
"""Why a candidate is left out, in the order in which it is asked."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row. ``problem`` is the question, its ``answer`` what is to be imitated; ``reward``: of the main component,
    None where the row has none; ``fields``: all that the row says; ``gold``: the answer that it is still to be judged
    by. ``source`` is the file as key=path.
    """

    problem: Problem
    source: str
    reward: float | None
    finished: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    gold: str = ""

    @property
    def question(self) -> str:
        """Candidates with equal ones answer the same question."""
        return " ".join(self.problem.prompt.split())


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that is left out: its place among all, the reason by name, and what there is to say of it."""

    place: int
    reason: str
    why: str


@dataclass
class Sifted:
    """What became of candidates: the places that are kept, in order, and the others."""

    kept: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Reason → how many, in the order of REASONS; those that nobody met are left out."""
        found = [one.reason for one in self.rejected]
        return {reason: found.count(reason) for reason in REASONS if reason in found}


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


def checks(config: RejectConfig, held: Index | None = None) -> list[tuple[str, Check]]:
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
    ask("contaminated", held, lambda one: _shared(held, one.problem.prompt) if held else "")
    return found


def _low(reward: float | None, least: float) -> str:
    return f"its reward is {reward:g}, lower than {least:g}" if reward is not None and reward < least else ""


def _shared(held: Index, question: str) -> str:
    found = held.matches(question)
    return f"it shares {found[0][1]!r} with {found[0][0].source}, {found[0][0].place}" if found else ""


def sift(
    candidates: Sequence[Candidate],
    config: RejectConfig,
    seed: int,
    *,
    held: Index | None = None,
    looked: Callable[[], None] = lambda: None,
) -> Sifted:
    """Judge all candidates; ``looked`` is called after each."""
    asked, found = checks(config, held), Sifted()
    by_question: dict[str, list[int]] = {}
    for place, one in enumerate(candidates):
        reason, why = next(((reason, why) for reason, check in asked if (why := check(one))), ("", ""))
        if reason:
            found.rejected.append(Rejected(place, reason, why))
        else:
            by_question.setdefault(one.question, []).append(place)
        looked()
    for question, places in by_question.items():
        answers = [candidates[place].problem.answer for place in places]
        for i, reason, why in chosen(question, answers, config, seed):
            if reason:
                found.rejected.append(Rejected(places[i], reason, why))
            else:
                found.kept.append(places[i])
    found.kept.sort()
    found.rejected.sort(key=lambda one: one.place)
    return found


def chosen(question: str, answers: Sequence[str], config: RejectConfig, seed: int) -> Iterator[tuple[int, str, str]]:
    """(place, reason, why) of each answer to one question; no reason: it is kept. The better ones come first, so that
    of copies the best stays.
    """
    kept, texts, grams = 0, set[str](), list[frozenset[int]]()
    near = config.near_duplicates if len(answers) > 1 else 1.0
    for i in _by_preference(question, answers, config.choose, seed):
        text = filters.same_text(answers[i])
        if text in texts and config.drop_duplicates:
            yield i, "duplicate", "the same answer to the question is kept already"
            continue
        if config.most and kept >= config.most:
            yield i, "surplus", f"{config.most} answers to the question are kept"
            continue
        if near < 1 and text not in texts:  # copies that are wanted are no near copies
            mine = filters.shingles(text, config.near_n)
            alike = [other for other in grams if filters.most_similar(mine, other) >= near]
            close = max((filters.similarity(mine, other) for other in alike), default=0.0)
            if close >= near:
                yield i, "near_duplicate", f"{close:.2f} of its {config.near_n}-grams are those of one that is kept"
                continue
            grams.append(mine)
        texts.add(text)
        kept += 1
        yield i, "", ""


def _by_preference(question: str, answers: Sequence[str], choose: str, seed: int) -> Iterable[int]:
    places = range(len(answers))
    if choose == "shortest":
        return sorted(places, key=lambda i: len(answers[i]))
    if choose == "random":
        return sorted(places, key=lambda i: (drawn(seed, question, answers[i]), i))
    return places


def drawn(*key: Any) -> bytes:
    """A place in a random order that its key alone decides, in any process."""
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
    order = sorted(range(rows), key=lambda place: drawn(seed, name, place))
    return sorted(place for turn in range(-(-wanted // rows) if rows else 0) for place in order[: wanted - turn * rows])
