"""With this folder on PYTHONPATH a role runs the fake of its role (fakes/roles.py), forked or started by itself.

Nothing of torch or transformers is imported, so that a run is up in a second.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

PROCESSES = {f"offtrail.platform.runtime.{name}" for name in ("process", "forkserver")}
FAKES = {f"offtrail.platform.{role}.role": role for role in ("learner", "generator", "evaluator")}
EMPTY = (
    "transformers",
    "transformers.models",
    "transformers.models.auto",
    "transformers.models.auto.tokenization_auto",
)


class Fakes(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the roles, and what the fork server imports for them; none is the real one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        known = name in FAKES or name in EMPTY
        return importlib.util.spec_from_loader(name, self, is_package=name in EMPTY) if known else None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in FAKES:
            from fakes import roles

            module.main = getattr(roles, FAKES[module.__name__])  # type: ignore[attr-defined]


if PROCESSES & set(sys.orig_argv):
    sys.meta_path.insert(0, Fakes())
