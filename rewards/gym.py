"""reasoning-gym's items and their verifiers, by what a problem's meta says of them: generator, options, level, item.

Source: reasoning-gym 0.1.25 (Apache-2.0), arXiv:2505.24760. Trap: it keys an item by seed + number, so that
neighbouring seeds have nearly all items in common. There is one seed here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from typing import Any

from offtrail.core.problem import Problem

SEED = 0
ITEMS = 2**30
"""Numbers of items. pool_matrix hands seed + number to NumPy, which takes 32 bits."""
LISTED = {"gsm_symbolic": 10_000}
"""Generators that make a list as long as the dataset when it is created."""


class GymError(ValueError):
    """A generator that cannot be made; one line that names the key, the value and the way out."""


def raw_score(problem: Problem, answer_text: str) -> float:
    """What the generator's verifier gives a text without the blanks around it, from 0 to 1; one that raises gives 0."""
    meta = problem.meta
    asked = meta["generator"], meta["options"], meta["level"]
    try:
        score = float(dataset(*asked).score_answer(answer_text.strip(), entry(*asked, meta["item"])))
    except GymError:
        raise
    except Exception:  # prime_factorization raises ValueError on a text that is no product
        return 0.0
    return min(max(score, 0.0), 1.0) if score == score else 0.0


@functools.lru_cache(maxsize=1024)
def entry(generator: str, options: str, level: int, item: int) -> dict[str, Any]:
    """An item as reasoning-gym has it: question, answer, metadata."""
    found: dict[str, Any] = dataset(generator, options, level)[item]
    return found


@functools.lru_cache(maxsize=64)
def dataset(generator: str, options: str, level: int) -> Any:
    """The generator with its settings, ``options`` a JSON object. Raises GymError."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import CURRICULA, DATASETS
    except ImportError:
        raise GymError("task=gym needs the package reasoning-gym: pip install offtrail[gym]") from None
    if generator not in DATASETS:
        near = difflib.get_close_matches(generator, DATASETS, n=3) or sorted(DATASETS)
        raise GymError(f"task.generator={generator}: no such generator; nearest: {', '.join(near)}")
    given = json.loads(options)
    known = [field.name for field in dataclasses.fields(DATASETS[generator][1]) if field.name not in ("seed", "size")]
    for name in given:
        if name not in known:
            raise GymError(f"task.options.{name}: no setting of {generator}; choose one of {', '.join(known)}")
    given |= {"seed": SEED, "size": LISTED.get(generator, ITEMS)}
    try:
        if level:
            given = _of_level(generator, CURRICULA.get(generator), given, level)
        return reasoning_gym.create_dataset(generator, **given)
    except (AssertionError, TypeError, ValueError) as error:
        if isinstance(error, GymError):
            raise
        raise GymError(f"task.options={options}: {generator} takes no such values ({error})") from None


def _of_level(generator: str, curriculum: Any, given: dict[str, Any], level: int) -> dict[str, Any]:
    """The settings of a level of the generator's curriculum, and the given ones that it leaves open."""
    if curriculum is None:
        raise GymError(f"task.level={level}: {generator} has no curriculum; set task.options")
    made = curriculum()
    highest = max(len(attribute.levels) for attribute in made.attributes.values())
    if level > highest:
        raise GymError(f"task.level={level}: the curriculum of {generator} has {highest} levels")
    made.set_global_level(level - 1)
    settings = dataclasses.asdict(made.generate_configuration(given))
    for name, value in given.items():
        if settings[name] != value:
            raise GymError(f"task.options.{name}={value}: task.level sets it; leave it out, or take task.level=0")
    return settings
