"""What a configuration's field says of itself beside its type: the range of its numbers, what kind of path it is, and
whether a resumed run may change it. No torch, no I/O; read by platform/config (help, checks, composition).

    steps: int = setting(40, "[1, inf)", resumable=True)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

T = TypeVar("T")

PathKind = Literal["", "file", "model", "either", "folder", "name"]
"""file: made absolute. model: too where such a folder is here, else a name in the Hugging Face cache. either: a file or
a model. folder: only its ``~`` is expanded, so that a saved configuration says what was typed. name: a part of a path,
which stays in its folder.
"""


Resumable = bool | Literal["noted"]
"""Whether a resumed run may change it. noted: it may, though it decides a step's numbers, and the ledger says so."""


def setting(default: T, limits: str = "", *, path: PathKind = "", resumable: Resumable = False) -> T:
    """A field with this default. ``limits``: an interval such as ``[0, 1)``, of each number where there are several."""
    metadata = {"limits": limits, "path": path, "resumable": resumable}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(factory: Callable[[], T], *, resumable: bool = False) -> T:
    """A field that holds the settings of a section; ``resumable``: all of them are."""
    return dataclasses.field(default_factory=factory, metadata={"resumable": resumable})


def told(kind: type, name: str, what: str) -> Any:
    """What the field of a dataclass says of itself, or the nearest base class that says it; None where nobody does.

    A class that only gives a field another default keeps its range.
    """
    for base in kind.__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata.get(what):
            return field.metadata[what]
    return None


def check_limits(settings: Any, name: str) -> None:
    """Raise ValueError, in the words of the command line, at the first number of the section ``name`` out of range."""
    for field in dataclasses.fields(settings):
        if complaint := out_of_limits(getattr(settings, field.name), told(type(settings), field.name, "limits") or ""):
            raise ValueError(f"{name}.{field.name}={complaint}")


def out_of_limits(value: Any, limits: str) -> str:
    """`VALUE: must be …` for a number (or one of several) that is not inside; else empty."""
    several = isinstance(value, (tuple, list))
    for number in value if several else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if limits and not inside(number, limits):
            shown = f"[{', '.join(map(str, value))}]" if several else f"{value}"
            return f"{shown}: {'each ' if several else ''}must be {limits_text(limits)}"
    return ""


def inside(value: float, limits: str) -> bool:
    """Whether a number lies in an interval such as ``(0, 1]``; ``inf)`` is no bound at all."""
    low, high = (float(end) for end in limits[1:-1].split(","))
    above = value >= low if limits[0] == "[" else value > low
    return above and (high == math.inf or (value <= high if limits[-1] == "]" else value < high))


def limits_text(limits: str) -> str:
    """`≥ 1` for ``[1, inf)``; `in [0, 1]` for a bounded interval."""
    low, high = (end.strip() for end in limits[1:-1].split(","))
    if high == "inf":
        return f"{'≥' if limits[0] == '[' else '>'} {low}"
    return f"in {limits}"
