"""What a stage of a recipe may say beside its job and where it starts: when it is there at all, what it has where the
model is made, whose FLOPs it may spend, how many epochs it trains, its seed.

    given ─ taken ─► the stage's settings, and Extra ─ launcher/recipe.py ─► keys that are known once others are done
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from offtrail.platform.config.errors import refuse

Raw = Any

MADE = "made"
"""`only: made`: left out where model.path names the base model; whoever starts from it starts from that. `made: {…}`:
keys for the model that offtrail makes itself, over the stage's own."""
TEACHER = "distill.teacher"
"""`instead: distill.teacher`, with `only: made`: that stands for the stage where it is left out, not model.path."""
BUDGET_KEYS = ("flops_of", "less")


@dataclass(frozen=True)
class Extra:
    """``budget_of``: run.budget_flops is what that stage has spent, less what those of ``charged`` have; "" = none.
    ``epochs``: how often the stage's data is trained on; 0 = sft.steps says it. ``mix``: (stage, share) of what is
    mixed with the data.
    """

    budget_of: str = ""
    charged: tuple[str, ...] = ()
    epochs: int = 0
    mix: tuple[tuple[str, float], ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """The keys that are known once earlier stages are done."""
        found = {"run.budget_flops": self.budget_of, "sft.steps": self.epochs, "reject.mix": self.mix}
        return frozenset(key for key, given in found.items() if given)


NOTHING = Extra()


def is_there(given: Mapping[str, Raw], key: str, model_path: str) -> bool:
    """Whether a stage is there, by its `only`. ConfigError at another value."""
    only = given.get("only", "")
    if only not in ("", MADE):
        raise refuse(f"{key}.only", only, f"must be {MADE}: the stage is left out where model.path names a model")
    return not (only and model_path)


def stands_for_it(given: Mapping[str, Raw], key: str, teacher: str) -> str:
    """What a stage that is left out would have made, by its `instead`: "" = model.path. ConfigError where it is not
    given.
    """
    instead = given.get("instead", "")
    if instead not in ("", TEACHER):
        raise refuse(f"{key}.instead", instead, f"must be {TEACHER}, or left out: model.path stands for it")
    if instead and not teacher:
        raise refuse(TEACHER, teacher, f"with model.path no {key} is made: name the model that stands for it")
    return teacher if instead else ""


def taken(
    own: dict[str, Raw], key: str, job: str, earlier: Mapping[str, str], absent: Collection[str], model_path: str
) -> Extra:
    """Take these keys out of a stage's ``own``, which is left with its settings. ``earlier``: stage → job; ``absent``:
    those that are left out. ConfigError on a value that cannot be.
    """
    for name in ("only", "instead"):
        own.pop(name, "")
    made = own.pop(MADE, {})
    if not isinstance(made, dict):
        raise refuse(f"{key}.{MADE}", made, "must be a mapping of keys, such as {learner: {steps: 20}}")
    if not model_path:
        overlay(own, made)
    extra = Extra(
        *_budget(own.pop("budget", ""), key, earlier),
        _epochs(own.pop("epochs", ""), key, job),
        _mix(own.pop("mix_from", {}), key, job, earlier, absent),
    )
    for section in ("run", "recipe"):
        if section in own:
            raise refuse(f"{key}.{section}", own[section], "belongs to the whole recipe; leave it out of the stage")
    if seed := own.pop("seed", ""):
        own["run"] = {"seed": seed}
    return extra


def overlay(under: dict[str, Raw], over: Mapping[str, Raw]) -> None:
    """Lay a tree of keys over another one."""
    for name, value in over.items():
        below = under.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            under[name] = dict(below)
            overlay(under[name], value)
        else:
            under[name] = value


def _budget(given: Raw, key: str, earlier: Collection[str]) -> tuple[str, tuple[str, ...]]:
    if given == "":
        return "", ()
    if not isinstance(given, dict) or not set(given) <= set(BUDGET_KEYS) or not given.get("flops_of"):
        raise refuse(f"{key}.budget", given, "must be {flops_of: STAGE, less: [STAGE, …]}, both earlier ones")
    less = given.get("less", [])
    charged = [less] if isinstance(less, str) else list(less)
    for name in (given["flops_of"], *charged):
        if name not in earlier:
            raise refuse(f"{key}.budget", name, f"must be an earlier stage, one of {', '.join(earlier) or 'none'}")
    return given["flops_of"], tuple(charged)


def _mix(
    given: Raw, key: str, job: str, earlier: Mapping[str, str], absent: Collection[str]
) -> tuple[tuple[str, float], ...]:
    if given and job != "reject":
        raise refuse(f"{key}.mix_from", given, "only job=reject mixes data; leave it out")
    if not isinstance(given, dict):
        raise refuse(f"{key}.mix_from", given, "must be {STAGE: SHARE}, such as {general: 0.25}")
    found = []
    for name, share in given.items():
        if name in absent:
            continue
        if earlier.get(name) not in ("sample", "reject"):
            raise refuse(f"{key}.mix_from", name, "must be an earlier stage of job=sample or reject")
        try:
            found.append((name, float(share)))
        except (TypeError, ValueError):
            raise refuse(f"{key}.mix_from.{name}", share, "must be a share of the result, in (0, 1)") from None
        if not 0 < found[-1][1] < 1:
            raise refuse(f"{key}.mix_from.{name}", share, "must be a share of the result, in (0, 1)")
    return tuple(found)


def _epochs(given: Raw, key: str, job: str) -> int:
    if given == "":
        return 0
    if job != "sft":
        raise refuse(f"{key}.epochs", given, "only job=sft goes through its data in epochs; leave it out")
    if not str(given).isdecimal() or not 1 <= int(given) <= 1000:
        raise refuse(f"{key}.epochs", given, "must be a whole number from 1 to 1000")
    return int(given)
