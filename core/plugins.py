"""Code from outside the tree: `package.module:attribute` in a setting names a function or class of the user's own.

Who calls: the registries of rewards, tasks, drivers, losses and advantages. A module is looked for where Python looks
(installed packages, PYTHONPATH), and last in the current directory: that of the launch, which every role and every
verifier process inherits. Last, so that a file of the user's named like a module of Python never takes its place.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OUTSIDE = "module:function"
"""How a table of variants lists code from outside the tree, whatever its name."""
PLUGIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PluginError(ValueError):
    """A plug-in that cannot be loaded; one line that names the key, the value and the way out."""


def is_plugin(name: str) -> bool:
    """Whether a name means code from outside the tree: those of the tree hold no colon."""
    return ":" in name


def load(name: str, *, what: str) -> Any:
    """The object that ``name``=`package.module:attribute` means; ``what`` is the key that holds it.

    Raises PluginError.
    """
    module_name, attribute = _parts(name, what)
    _look_in_current_directory()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise _no_module(name, module_name, what) from None
        raise _broken(name, module_name, what, error) from error
    except Exception as error:
        raise _broken(name, module_name, what, error) from error
    if not hasattr(module, attribute):
        raise _no_attribute(name, module_name, attribute, what, vars(module))
    return getattr(module, attribute)


def source_of(name: str) -> Path | None:
    """The Python file of the module of ``name``=`package.module:attribute`; None where there is none, or no module."""
    _look_in_current_directory()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # of the packages that it stands in; `load` says it better
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.has_location else None


def check(name: str, *, what: str) -> None:
    """Raise PluginError when ``load`` would find no such module or attribute; the module itself is not imported.

    For code that imports torch, where nothing else may. Attributes are read from the source, where there is one.
    """
    module_name, attribute = _parts(name, what)
    defined = _defined(_find(name, what))
    if defined is not None and attribute not in defined:
        raise _no_attribute(name, module_name, attribute, what, defined)


def check_settings(
    source: str,
    settings: Mapping[str, Any],
    *,
    what: str,
    name: str = "",
    given: int = 1,
    given_to_class: int = 0,
    unless: str = "",
) -> None:
    """Raise PluginError when ``bind`` would, as far as the source tells: the module itself is not imported.

    ``source``: `package.module:attribute`, called ``name`` in messages. ``given_to_class``: like ``given``, of a
    class's `__init__`. A function with a parameter ``unless`` is called in another way, and left to its caller. What is
    decorated or made by a call shows its parameters only when it is loaded.
    """
    attribute = source.rpartition(":")[2]
    node = (_defined(_find(source, what)) or {}).get(attribute)
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        original = next((alias.name for alias in node.names if attribute in (alias.asname, alias.name)), attribute)
        origin, name = f"{node.module}:{original}", name or source
        check_settings(
            origin, settings, what=what, name=name, given=given, given_to_class=given_to_class, unless=unless
        )
        return
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        node, given = (made[0] if made else None), given_to_class + 1
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.decorator_list:
        return
    a = node.args
    named = [*a.posonlyargs, *a.args]
    needed = dict.fromkeys((arg.arg for arg in named), True)
    needed |= dict.fromkeys((arg.arg for arg in named[len(named) - len(a.defaults) :]), False)
    before = {arg.arg for arg in named[: max(given, len(a.posonlyargs))]}
    needed |= {arg.arg: default is None for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)}
    if unless in needed:
        return
    known = {key: n for key, n in needed.items() if key not in before}
    _check_fit(known, settings, a.kwarg is not None, name or source, what)


def bind(
    target: Callable[..., Any], settings: Mapping[str, Any], *, name: str, what: str, given: int = 1
) -> Callable[..., Any]:
    """``target`` with its settings: a function's parameters after the ``given`` first, all of a class's `__init__`.

    ``name`` is the target's, ``what`` the key that holds the settings. Raises PluginError at an unknown or missing one.
    """
    parameters = list(inspect.signature(target).parameters.values())[0 if isinstance(target, type) else given :]
    known = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    _check_fit({p.name: p.default is p.empty for p in known}, settings, anything, name, what)
    return partial(target, **settings)


def _check_fit(known: Mapping[str, bool], settings: Mapping[str, Any], anything: bool, name: str, what: str) -> None:
    """``known``: parameter → whether it must be given. ``anything``: others are taken too."""
    for key, value in settings.items():
        if key not in known and not anything:
            takes, hint = ", ".join(known) or "none", _nearest(key, known)
            raise PluginError(f"{what}.{key}={value}: no such setting; {name} takes {takes}{hint}")
    for key, needed in known.items():
        if needed and key not in settings:
            raise PluginError(f"{what}.{key}: is needed by {name}; set it")


def _find(name: str, what: str) -> ModuleSpec:
    """Where the module of ``name`` is. Raises PluginError where it is nowhere."""
    module_name, _ = _parts(name, what)
    _look_in_current_directory()
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    except Exception as error:  # of the packages that it stands in
        raise _broken(name, module_name, what, error) from error
    if spec is None:
        raise _no_module(name, module_name, what)
    return spec


def _parts(name: str, what: str) -> tuple[str, str]:
    if not PLUGIN.fullmatch(name):
        raise PluginError(f"{what}={name}: must be package.module:attribute, such as my_code:{what.rpartition('.')[2]}")
    module_name, _, attribute = name.partition(":")
    return module_name, attribute


def _look_in_current_directory() -> None:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # a file written since the last look is found


def _defined(spec: ModuleSpec) -> dict[str, ast.stmt] | None:
    """Names that a module's source binds at its top level, and what binds each last; None where the source cannot
    tell.
    """
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return _bound(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError):
        return None  # importing it says it better


@lru_cache(maxsize=64)
def _bound(source: bytes) -> dict[str, ast.stmt] | None:
    tree = ast.parse(source)
    names: dict[str, ast.stmt] = {}
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names[name] = node
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name.partition(".")[0]: node for alias in aliases}
            case ast.Assign() | ast.AnnAssign():
                bound = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
                names |= {part.id: node for part in bound if isinstance(part.ctx, ast.Store)}
            case ast.Expr():
                pass
            case _:  # bound under a condition, in a loop, …
                return None
    return None if names.keys() & {"*", "__getattr__"} else names


def _no_module(name: str, module_name: str, what: str) -> PluginError:
    return PluginError(
        f"{what}={name}: no module {module_name} in this Python, on PYTHONPATH or in the current directory "
        f"({os.getcwd()}): launch from the folder that holds it, or install it"
    )


def _broken(name: str, module_name: str, what: str, error: Exception) -> PluginError:
    words = " ".join(str(error).split())
    return PluginError(f"{what}={name}: importing {module_name} raised {type(error).__name__}: {words}; mend it")


def _no_attribute(name: str, module_name: str, attribute: str, what: str, names: Iterable[str]) -> PluginError:
    public = sorted(known for known in names if not known.startswith("_"))
    return PluginError(f"{what}={name}: {module_name} has no {attribute}{_nearest(attribute, public)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; nearest: {', '.join(near)}" if near else ""
