"""Scores into groups: `add` puts what a model says into one; `score_groups` asks every model about many, and waits.

    groups ──► at most AT_ONCE are with a model ──► Scores ──► component NAME, channel NAME, step_ends, scored_by
                                               └─ none ──► component NAME is NaN: no score is made up

Generators take scores in as they come (generator/judges.py); who evaluates has whole groups and nothing else to do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from offtrail.core.protocols import Scorer, Scores
from offtrail.core.types import Group

log = logging.getLogger("offtrail.scores")

AT_ONCE = 16
"""Groups that a model is asked about together: a batch's worth, and not so many that others who ask, or the last of
these, wait long."""


def add(group: Group, scores: Scores) -> None:
    """Put a model's scores into the group. ValueError, before anything is changed, where they do not fit the group, or
    what others said of it.
    """
    ends = group.step_ends
    if scores.step_ends is not None:
        if ends.size and not np.array_equal(ends, scores.step_ends):
            name = next(iter(scores.components))
            raise ValueError(f"{name} cuts the samples into other steps than those that the group has")
        ends = scores.step_ends
    names = (*scores.components, *scores.channels)
    whole = dataclasses.replace(
        group,
        components={**group.components, **scores.components},
        channels={**group.channels, **scores.channels},
        step_ends=ends,
        scored_by=group.scored_by | ({} if scores.by is None else dict.fromkeys(names, scores.by)),
    )
    whole.check()
    group.components, group.channels = whole.components, whole.channels
    group.step_ends, group.scored_by = whole.step_ends, whole.scored_by


def score_groups(groups: Iterable[Group], scorers: Mapping[str, Scorer], wait: Callable[[str], None]) -> None:
    """Add every model's scores to the groups that it applies to. Where a model has none for a group, its component is
    NaN there, and the log says of how many, and why of the first.

    ``wait`` is called with whom is waited for, again and again until all have answered; what it raises ends the asking.
    """
    found = list(groups)
    for name, scorer in scorers.items():
        concerned = [group for group in found if scorer.applies(group)]
        reasons = list[str]()
        for group, answer in _answers(scorer, concerned, wait):
            if why := answer if isinstance(answer, str) else _why_not(group, answer):
                group.components = group.components | {name: np.full(group.size, np.nan, np.float32)}
                reasons.append(f"question {group.group}: {why}")
        if reasons:
            log.warning("%d of %d questions have no score of %s; %s", len(reasons), len(concerned), name, reasons[0])


def _answers(
    scorer: Scorer, groups: Sequence[Group], wait: Callable[[str], None]
) -> Iterator[tuple[Group, Scores | str]]:
    """Each group with what the model says of it, or why it says nothing."""
    waiting, asked = deque(enumerate(groups)), dict[int, Group]()
    while waiting or asked:
        while waiting and len(asked) < AT_ONCE:
            key, group = waiting.popleft()
            try:
                scorer.submit(key, group.problem, group.prompt_tokens, [sample.tokens for sample in group.samples()])
                asked[key] = group
            except ValueError as error:
                yield group, str(error)
        for key, scores in scorer.poll():
            yield asked.pop(key), scorer.reason(key) if scores is None else scores
        if asked:
            wait(scorer.waiting_on)


def _why_not(group: Group, scores: Scores) -> str:
    """Put them into the group; why they do not fit, or ""."""
    try:
        add(group, scores)
    except ValueError as error:
        return str(error)
    return ""
