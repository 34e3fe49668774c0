"""`launch.py --help`: the command, the groups with their options, and every key with its type, default and one line."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import offtrail
from offtrail.core.plugins import OUTSIDE
from offtrail.core.settings import limits_text
from offtrail.platform.config.compose import options_of
from offtrail.platform.config.errors import show
from offtrail.platform.config.keys import GROUPS, VARIANTS, Key, keys_of
from offtrail.platform.config.schema import Config

USAGE = """\
offtrail {version}: asynchronous off-policy RL for LLM reasoning

  python launch.py                                 the embedded default: learns on two CPU cores in minutes
  python launch.py task=addition staleness.max=8   group=option and key=value, in any order
  python launch.py settings.yaml learner.steps=80  a YAML file of keys is merged; the command line wins
  python launch.py runs/NAME/config.yaml           repeat a run
  python launch.py run.name=NAME run.resume=true   go on with a run
  python launch.py job=chat checkpoint=runs/NAME   talk with its newest checkpoint in the terminal
  python launch.py job=serve checkpoint=runs/NAME  put it behind an OpenAI-compatible API (SGLang)
  python launch.py … --dry-run                     print the resolved configuration, start nothing
  python launch.py --help | --version

A mistake is one line on stderr and exit code 2.
"""


def help_text() -> str:
    """The whole help page."""
    config = Config()
    lines = [USAGE.format(version=offtrail.__version__), "Groups and their options (configs/GROUP/OPTION.yaml):"]
    for group in GROUPS:
        default = getattr(config, group).name
        lines.append(f"  {group + '=':<12} {' | '.join(_options(group))}   (default {default})")
    lines += ["", "Keys, with type = default:"]
    own = {key: value for key, value in keys_of(config).items() if "." not in key}
    lines += [*_rows(own.values()), ""]
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if not dataclasses.is_dataclass(section):
            continue
        variants = VARIANTS.get(field.name, {"": type(section)})
        common = _common(field.name, variants)
        if common:
            lines += [f"{field.name}: what all have", *_rows(common.values()), ""]
        for name, variant in variants.items():
            title = f"{field.name}" + (f" (name={name})" if name and len(variants) > 1 else "")
            keys = keys_of(variant(), f"{field.name}.")
            lines.append(f"{title}: {_summary(variant)}")
            lines += [*_rows(key for path, key in keys.items() if common.get(path) != key), ""]
    return "\n".join(lines).rstrip() + "\n"


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


def _rows(keys: Iterable[Key]) -> Iterable[str]:
    for key in keys:
        kind = f"{key.type_text} = {show(key.default) if key.default != '' else '(empty)'}"
        limit = f" ({limits_text(key.limits)})" if key.limits else ""
        yield f"  {key.path:<30} {kind:<36} {key.line}{limit}".rstrip()


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())
