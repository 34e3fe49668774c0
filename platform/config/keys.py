"""Every key of the schema as a flat table: dotted path, type, default, one line. Read from the dataclasses themselves.

The one line is the string below an attribute (Python keeps no such docstring, so the source is parsed).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from offtrail.algos.config import ALGOS
from offtrail.algos.correction_config import CORRECTIONS
from offtrail.core.plugins import OUTSIDE, is_plugin
from offtrail.core.settings import PathKind, Resumable, told
from offtrail.platform.config.schema import Config, LocalConfig, SglangConfig
from offtrail.search.config import SEARCHES
from offtrail.tasks.registry import families

# Groups whose keys depend on `name`: the dataclass is chosen here first, so a key of another variant is an error.
VARIANTS: dict[str, Mapping[str, type[Any]]] = {
    "task": {name: family.Config for name, family in families().items()},
    "algo": ALGOS,
    "correction": CORRECTIONS,
    "engine": {"local": LocalConfig, "sglang": SglangConfig},
    "search": SEARCHES,
}
SUPERVISED = ("sft", "reward_model", "prm")
"""The jobs that learn from examples; their settings have their names."""
QUESTIONING = ("eval", "sample", "label")
"""The jobs that ask a checkpoint through the engines of a run, in the way that it was trained."""
# Groups with options in configs/; `recipe`, `model`, `reward` and `eval` have one dataclass each and a free name.
GROUPS = ("recipe", "model", "reward", "eval", *VARIANTS)


def variant_of(group: str, name: object) -> type[Any] | None:
    """The dataclass of a group's variant; where a group takes code from outside, `module:function` has one for all."""
    variants = VARIANTS[group]
    outside = isinstance(name, str) and is_plugin(name)
    return variants.get(OUTSIDE if outside else str(name))


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    path: str
    type: Any
    default: Any
    line: str
    limits: str = ""
    path_kind: PathKind = ""
    resumable: Resumable = False

    @property
    def is_text(self) -> bool:
        """Whether the value is the text itself, so that nothing may be read out of it (`run.name=1e3`)."""
        return self.type is str or typing.get_origin(self.type) is typing.Literal

    @property
    def has_upper_end(self) -> bool:
        """Whether its range ends at a number."""
        return bool(self.limits) and not self.limits.endswith("inf)")

    @property
    def meaning(self) -> str:
        """What it is, in brackets, for the end of a message."""
        return f" ({self.line.rstrip('.')})" if self.line else ""

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping with free names."""
        return typing.get_origin(self.type) is dict

    @property
    def type_text(self) -> str:
        """The type as a user reads it: `int`, `bound|exact`, `[float, float]`, `{name: float}`."""
        return type_text(self.type)


def type_text(kind: Any) -> str:
    """A type as a user reads it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return f"[{type_text(arguments[0])}, …]"
    if origin is tuple:
        return "[" + ", ".join(map(type_text, arguments)) + "]"
    if origin is dict:
        return f"{{name: {type_text(arguments[1])}}}"
    return {str: "text", Any: "value"}.get(kind, "") or str(kind.__name__)


def keys_of(instance: Any, prefix: str = "") -> dict[str, Key]:
    """The leaves of a dataclass instance, in the order of the source; its values are the defaults."""
    return {key.path: key for key in _walk(instance, prefix)}


def _walk(instance: Any, prefix: str, resumable: Resumable = False) -> Iterator[Key]:
    owner: Any = type(instance)  # to mypy `type[Any]` is not hashable
    for key in _fields_of(owner):
        value, path = getattr(instance, key.path), f"{prefix}{key.path}"
        may_change = resumable or key.resumable
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{path}.", may_change)
        else:
            yield Key(path, key.type, value, key.line, key.limits, key.path_kind, may_change)


@functools.cache
def _fields_of(owner: type[Any]) -> tuple[Key, ...]:
    """What the class says of its fields: keys by their name alone, without a value."""
    kinds, lines = typing.get_type_hints(owner), attribute_lines(owner)
    limits, path_kind, resumable = (
        {field.name: told(owner, field.name, what) for field in dataclasses.fields(owner)}
        for what in ("limits", "path", "resumable")
    )
    return tuple(
        Key(n, kinds[n], None, lines.get(n, ""), limits[n] or "", path_kind[n] or "", resumable[n] or False)
        for n in limits
    )


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key → value of a resolved configuration."""
    return {path: key.default for path, key in keys_of(config).items()}


def noted_settings(config: Config) -> dict[str, Any]:
    """Key → value of what decides the job's numbers (a recipe's: any stage's) and may change at a resume all the same,
    so that a diverged run can be saved; the ledger notes each change.
    """
    several = config.recipe.stages or config.job == "distill"
    idle = [f"{job}." for job in SUPERVISED if job != config.job and not several]
    idle += ["learner.optim.lr", "algo."] if config.job in SUPERVISED else []
    keys = keys_of(config).values()
    return {key.path: key.default for key in keys if key.resumable == "noted" and not key.path.startswith(tuple(idle))}


def deciding_settings(config: Config) -> dict[str, Any]:
    """Key → value of what no resume may change, but for paths: what their files hold is compared in their place
    (launcher/inputs.py), so that they may be moved.
    """
    may_change = noted_settings(config).keys()
    return {
        key.path: key.default
        for key in keys_of(config).values()
        if key.resumable is not True and key.path not in may_change and key.path_kind not in ("file", "model", "either")
    }


@functools.cache
def variant_keys() -> dict[str, dict[str, dict[str, Key]]]:
    """Group → variant name → its keys."""
    return {
        group: {name: keys_of(kind(), f"{group}.") for name, kind in variants.items()}
        for group, variants in VARIANTS.items()
    }


@functools.cache
def all_paths() -> frozenset[str]:
    """Every key of every variant: what a misspelt key is compared with."""
    paths = set(keys_of(Config()))
    for variants in variant_keys().values():
        for keys in variants.values():
            paths |= set(keys)
    return frozenset(paths)


def attribute_lines(kind: type) -> dict[str, str]:
    """Attribute → the string below it, inherited ones too."""
    lines: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            lines |= _lines_of_module(base.__module__).get(base.__name__, {})
    return lines


@functools.cache
def _lines_of_module(module: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _lines_of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _lines_of_class(node: ast.ClassDef) -> dict[str, str]:
    lines = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(line))):
                lines[name] = " ".join(line.split())
    return lines
