"""`launch.py --help [SECTION …]`: the command and its groups with the sections of keys; or a section's (a variant's, a
key's) keys with type, default and one line, as wide as the terminal. `--help all` lists every key.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import offtrail
from offtrail.core.plugins import OUTSIDE
from offtrail.core.settings import limits_text
from offtrail.platform.config.compose import options_of
from offtrail.platform.config.errors import ConfigError, nearest_text, show
from offtrail.platform.config.keys import GROUPS, VARIANTS, Key, keys_of
from offtrail.platform.config.schema import Config

USAGE = """\
offtrail {version}: asynchronous off-policy RL for LLM reasoning

  python launch.py                                 # the embedded default: learns on two CPU cores in minutes
  python launch.py task=addition staleness.max=8   # group=option and key=value, in any order
  python launch.py settings.yaml learner.steps=80  # a YAML file of keys is merged; the command line wins
  python launch.py runs/NAME/config.yaml           # repeat a run
  python launch.py run.name=NAME run.resume=true   # go on with a run
  python launch.py job=chat checkpoint=runs/NAME   # talk with its newest checkpoint in the terminal
  python launch.py job=serve checkpoint=runs/NAME  # put it behind an OpenAI-compatible API (SGLang)
  python launch.py algo=ppo --dry-run              # print the resolved configuration, start nothing
  python launch.py --help algo learner.optim       # the keys of sections; algo=ppo: of a variant; all: every key
  python launch.py --version

A mistake is one line on stderr and exit code 2.
"""
NARROWEST, WIDEST = 60, 120
UNBROKEN = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True)
class Part:
    """What is listed together: a section, or one variant of it."""

    section: str
    title: str
    summary: str
    keys: list[Key]
    variant: str = ""


def help_text(topics: Sequence[str] = (), width: int = 100) -> str:
    """The page for ``topics`` (sections, group=variant, keys, all), or the overview; lines of at most ``width``
    characters. ConfigError for a topic that there is not.
    """
    width = min(max(width, NARROWEST), WIDEST)
    lines = list(_overview(width)) if not topics else []
    for topic in topics:
        for part in _parts_of(topic):
            lines += [*_wrapped(f"{part.title}: {part.summary}", width), *_rows(part.keys, width), ""]
    return "\n".join(lines).rstrip() + "\n"


def _overview(width: int) -> Iterator[str]:
    config = Config()
    yield USAGE.format(version=offtrail.__version__)
    yield "Groups and their options (configs/GROUP/OPTION.yaml):"
    for group in GROUPS:
        default = getattr(config, group).name
        yield from _wrapped(f"  {group + '=':<12} {' | '.join(_options(group))}   (default {default})", width, 15)
    yield from ["", "Sections of keys (python launch.py --help SECTION):"]
    kinds = typing.get_type_hints(Config)
    for name, _ in _sections(config):
        yield from _wrapped(f"  {name:<12} {_summary(kinds[name]).partition('. ')[0].rstrip('.')}.", width, 15)
    yield from ["", "Keys without a section:"]
    yield from _rows(_own(config), width)


def _parts_of(topic: str) -> list[Part]:
    parts = list(_parts())
    if topic == "all":
        return parts
    name, _, variant = topic.partition("=")
    chosen = [part for part in parts if part.section == name and part.variant in (variant, "")]
    if variant and any(part.variant == variant for part in chosen):
        return chosen
    found = [] if chosen else [part for part in parts if any(_within(key, name) for key in part.keys)]
    if chosen or found:
        whole = [part for part in parts if part.section == name] or found
        return [dataclasses.replace(p, keys=[k for k in p.keys if _within(k, name)] or p.keys) for p in whole]
    near = nearest_text(name, {part.section for part in parts} | {key.path for part in parts for key in part.keys})
    raise ConfigError(f"--help {topic}: no such section or key{near}; python launch.py --help lists the sections")


def _within(key: Key, name: str) -> bool:
    return key.path == name or key.path.startswith(f"{name}.")


def _parts() -> Iterator[Part]:
    config = Config()
    yield Part("", "offtrail", "keys without a section", list(_own(config)))
    for name, section in _sections(config):
        variants = VARIANTS.get(name, {"": type(section)})
        common = _common(name, variants)
        if common:
            yield Part(name, name, "what all have", list(common.values()))
        for label, variant in variants.items():
            own = [key for path, key in keys_of(variant(), f"{name}.").items() if common.get(path) != key]
            title = f"{name} ({name}={label})" if common else name
            yield Part(name, title, _summary(variant), own, label if common else "")


def _sections(config: Config) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            yield field.name, section


def _own(config: Config) -> Iterator[Key]:
    return (key for path, key in keys_of(config).items() if "." not in path)


def _common(section: str, variants: Mapping[str, type]) -> dict[str, Key]:
    """The keys that stand the same in most variants of a section; a variant repeats only what it has otherwise."""
    if len(variants) < 2:
        return {}
    tables = [keys_of(variant(), f"{section}.") for variant in variants.values()]
    shared = [path for path in tables[0] if all(path in table for table in tables)]
    found = {path: Counter(repr(table[path]) for table in tables).most_common(1)[0][0] for path in shared}
    return {path: next(t[path] for t in tables if repr(t[path]) == most) for path, most in found.items()}


def _options(group: str) -> list[str]:
    return options_of(group) + [OUTSIDE] * (OUTSIDE in VARIANTS.get(group, {}))


def _rows(keys: Iterable[Key], width: int) -> Iterator[str]:
    for key in keys:
        kind = f"{key.type_text} = {show(key.default) if key.default != '' else '(empty)'}"
        kind = kind if len(kind) <= width - 34 else kind.replace("|", " | ")
        limit = f" ({limits_text(key.limits).replace(' ', UNBROKEN)})" if key.limits else ""
        yield from _wrapped(f"  {key.path:<30} {kind}", width, 33)
        yield from _wrapped(f"      {key.line}{limit}", width, 6)


def _wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    lines = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)
    return [line.replace(UNBROKEN, " ") for line in lines]


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())
