"""Reading YAML: every scalar stays the text that was written, and the schema decides what it means.

YAML's own guesses would turn `progress: off` into false, `1e-4` into a string and `name: 0012` into ten.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from offtrail.platform.config.errors import ConfigError

# What a value may be before the schema has seen it: text, or lists and mappings of texts.
Raw = Any

MAX_BYTES = 1 << 20
"""Of a file of settings: one that is longer is something else."""
MAX_DEPTH = 32
"""Of lists and mappings within each other; a recipe's deepest key stands at 6."""
MAX_VALUES = 10_000
"""Of a file or an argument, each alias (`*name`) counted as all that it stands for: a few nested ones could stand for
more than any memory holds."""


class _TextLoader(yaml.BaseLoader):
    """BaseLoader (all scalars are text) that is bounded, and refuses a key given twice, where PyYAML keeps the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._deepest = self._values = 0
        self._extent: dict[str, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """PyYAML's, counting values and depth as they are once every alias is written out."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        depth, deepest, values = self._depth, self._deepest, self._values
        below, more = self._extent.get(str(event.anchor), (0, 0)) if isinstance(event, yaml.AliasEvent) else (0, 1)
        self._depth, self._deepest, self._values = depth + 1, depth + 1 + below, values + more
        if self._deepest > MAX_DEPTH:
            raise _too_much(event, f"nested more than {MAX_DEPTH} deep")
        if self._values > MAX_VALUES:
            raise _too_much(event, f"holds more than {MAX_VALUES:,} values")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.NodeEvent) and event.anchor and not isinstance(event, yaml.AliasEvent):
            self._extent[event.anchor] = (self._deepest - depth - 1, self._values - values)
        self._depth, self._deepest = depth, max(deepest, self._deepest)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep=True)


def _too_much(event: yaml.Event, problem: str) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)  # type: ignore[arg-type]


def read_text(text: str) -> Raw:
    """One value from the command line; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_TextLoader)


def read_file(path: Path) -> dict[str, Raw]:
    """A YAML mapping; an empty file is an empty one. Raises ConfigError that names the file and the line."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{path}: not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: longer than {MAX_BYTES >> 20} MiB, so that it can be no file of settings")
        loaded = read_text(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{yaml_place(error)}: malformed YAML: {yaml_problem(error)}") from None
    if loaded in (None, ""):
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, such as `learner: {{steps: 20}}`, not a {_kind(loaded)}")
    return loaded


def as_text(value: Any) -> Raw:
    """What ``read_text`` makes of a plain value's YAML: texts within lists and mappings."""
    if isinstance(value, dict):
        return {str(name): as_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    if isinstance(value, float):
        text = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, repr(value) if value == value else ".nan")
        return text if "." in text else text.replace("e", ".0e")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def guess(value: Raw) -> Raw:
    """What texts would be in JSON, for the few places where the schema declares no type: numbers, true, false."""
    if isinstance(value, dict):
        return {name: guess(item) for name, item in value.items()}
    if isinstance(value, list):
        return [guess(item) for item in value]
    if not isinstance(value, str):  # of a recipe's stage, which was read with the recipe already
        return value
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            return kind(value)
    return value


def yaml_place(error: yaml.YAMLError) -> str:
    """`, line N` where the parser knows it."""
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def yaml_problem(error: yaml.YAMLError) -> str:
    """The parser's words without the excerpt."""
    return getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"


def _kind(value: Raw) -> str:
    return "list" if isinstance(value, list) else "text"
