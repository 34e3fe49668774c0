"""Hostile configurations, drawn by seed: whatever is typed or read, `compose` gives a configuration that a run could
mean and that repeats itself, or one line.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offtrail.core.plugins import OUTSIDE
from offtrail.platform.config.compose import compose, options_of, to_yaml
from offtrail.platform.config.errors import LONGEST_ERROR, ConfigError
from offtrail.platform.config.keys import GROUPS, all_paths, flatten, variant_keys
from offtrail.platform.config.schema import Config

NUMBERS = [
    "0", "-1", "1", "nan", "inf", "-inf", "1e308", "1e309", "1e-400", "0x10", "1_000", "٣", "1.0", "1e3", "9" * 25,
    "9" * 400, "9" * 5000, "9223372036854775808", "1e999999999", " 5", "½", "true", "null", "",
]  # fmt: skip
TEXTS = [
    " ", "..", "../../etc", "/etc/passwd", "/dev/zero", "~", "~nobody-of-that-name/x", "a" * 300, "é" * 200,
    "${run.seed}", "${oc.env:HOME}", "${", "\u202eabc", "a\0b", "\ud800", "a\tb\nc", "\x1b[31m", "&a", "*a", "%s",
    "a" * 50_000, "# x", ": ", "my_code:x", ":", "cuda:٣", "cuda:-1", "::1", "256.0.0.1", "http://[",
    "!!python/object/apply:os.getcwd []",
]  # fmt: skip
NESTED = [
    "[]", "{}", "[[]]", "[nan, 0.9]", "[1, 2, 3]", "{a: 1}", "{a: {b: {c: 1}}}", "{a: .inf}", "{chain: nan}",
    "{? [1] : 3}", "{1: 2, 1: 3}", "[&a [*a]]", "{'': 1}", "{a.b: 1}", "[1", "{a: b: c}", "[" * 3000 + "]" * 3000,
    "{a: " * 500 + "1" + "}" * 500, "[&a [x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b], *c, *c]",
    '"a\\0b"', '"\\ud800"', "|\n  many\n  lines", "!!binary aGk=",
]  # fmt: skip
BYTES = [
    b"\xff\xfer\0u\0n\0", b"\xef\xbb\xbfrun: {seed: 1}\n", b"\0" * 50, b"- 1", b"[" * 100_000, b"a: &a [*a]\nrun: *a",
    b"run: {seed: 1}\n---\nrun: {}", b"%YAML 9.9\n---\nrun: {}", b"\t\trun: 1", b"learner:\n  steps: 1\n  steps: 2\n",
]  # fmt: skip
PATHS = sorted(all_paths())
DEFAULTS = flatten(Config())


def key_of(rng: random.Random) -> str:
    known = rng.choice(PATHS)
    strange = [
        "task.weights.a.b",
        "task.settings.chain.noise",
        "run.__class__",
        "_content",
        "a" * 5000,
        "x" + ".y" * 900,
    ]
    return rng.choice([known, known, known, rng.choice(GROUPS), mutated(rng, known), f"{known}.x", rng.choice(strange)])


def value_of(rng: random.Random, key: str) -> str:
    right = rng.choice(options_of(key)) if key in GROUPS else str(DEFAULTS.get(key, "1"))
    return rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(NESTED), mutated(rng, right), right, right])


def mutated(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice([*".=-_[]{}:,'\"\\$&*!%@ \t0aZé", text]) + text[at + rng.randrange(2) :]


def arguments(rng: random.Random, folder: Path) -> list[str]:
    """A command line of one to three overrides, some after a file of settings."""
    keys = [key_of(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    argv = rng.choice([[], [], ["task=countdown"], ["task=mixture"], ["algo=ppo"], ["staleness.mode=exact"]])
    argv = [*argv, *(f"{key}={value_of(rng, key)}" for key in keys)]
    if rng.random() < 0.05:
        argv.append(rng.choice(["nofile.yaml", "/dev/null", "a" * 300, "=x", "", "a==b", "é=1", "a\0b", "\ud800"]))
    return [*argv[: rng.randrange(2)], str(a_file(rng, folder))] if rng.random() < 0.3 else argv


def a_file(rng: random.Random, folder: Path) -> Path:
    path = folder / "hostile.yaml"
    section, _, name = rng.choice(PATHS).rpartition(".")
    written = f"{section or 'run'}:\n  {name}: {rng.choice(NUMBERS + TEXTS + NESTED)}\n"
    text = rng.choice([written, written, mutated(rng, to_yaml(Config()))])
    path.write_bytes(rng.choice([text.encode(errors="surrogatepass")] * 3 + [rng.choice(BYTES), rng.randbytes(200)]))
    return path


def numbers_and_texts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (leaf for item in value.items() for part in item for leaf in numbers_and_texts(part))
    elif isinstance(value, (list, tuple)):
        yield from (leaf for part in value for leaf in numbers_and_texts(part))
    else:
        yield value


def check_meaning(config: Config) -> None:
    """Every number fits 64 bits and is finite, every text can be written, every name stays in its folder."""
    for key, value in flatten(config).items():
        for leaf in numbers_and_texts(value):
            if isinstance(leaf, (int, float)):
                assert math.isfinite(leaf), key
                assert abs(leaf) < 2**63 or key == "run.budget_flops", key
            else:
                assert "\0" not in leaf.encode().decode(), key  # encode: no half of a surrogate pair
    for name in filter(None, (config.run.name, config.model.name)):
        assert Path("/in", name).resolve().parent == Path("/in")
        assert len(name.encode()) <= 255


def check_case(argv: list[str], folder: Path) -> bool:
    """Whether it was accepted; AssertionError, with the command line, for whatever is wrong."""
    try:
        config = compose(argv)
        check_meaning(config)
        saved = folder / "saved.yaml"
        saved.write_text(to_yaml(config), encoding="utf-8", newline="")
        config.run.name, config.run.resume = "", False  # which a saved configuration leaves out
        assert compose([str(saved)]) == config
    except ConfigError as error:
        line = str(error)
        assert line.strip(), argv
        assert line.isprintable(), argv
        assert len(line) <= LONGEST_ERROR + 100, argv
        return False
    except Exception as error:
        raise AssertionError([argument[:200] for argument in argv]) from error
    return True


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("seed", "cases"),
    [
        (0, 60),
        pytest.param(0, 150, marks=pytest.mark.prove),
        pytest.param(1, 5000, marks=[pytest.mark.prove, pytest.mark.timeout(3600)]),
    ],
)
def test_hostile_configurations_are_refused_in_one_line_or_mean_something(tmp_path: Path, seed: int, cases: int):
    rng = random.Random(seed)
    accepted = sum(check_case(arguments(rng, tmp_path), tmp_path) for _ in range(cases))
    assert cases / 100 < accepted < cases / 2  # neither all refused for one reason, nor anything taken


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("value", [*NUMBERS, "..", "a\0b", "\ud800", "${run.seed}", "[]", "{}"])
def test_every_key_of_every_variant_with_every_hostile_value(tmp_path: Path, value: str):
    owners: dict[str, list[str]] = {key: [] for key in DEFAULTS}
    for group, variants in variant_keys().items():
        for name in set(variants) - {OUTSIDE}:
            for key in variants[name]:
                owners.setdefault(key, [f"{group}.name={name}"])
    for key, owner in owners.items():
        check_case([*owner, f"{key}={value}"], tmp_path)
    assert all_paths() - set(owners) == {"search.flexible", "search.settings"}  # of drivers from outside the tree
