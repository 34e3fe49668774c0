"""The split and the data order: what every family promises (tasks/base.py, tasks/split.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import offtrail
from offtrail.tasks.addition import AdditionConfig
from offtrail.tasks.base import GeneratedTask, Task, TaskError
from offtrail.tasks.chain import ChainConfig
from offtrail.tasks.config import GeneratedConfig, TaskConfig
from offtrail.tasks.countdown import CountdownConfig
from offtrail.tasks.mixture import MixtureConfig
from offtrail.tasks.registry import make_task
from offtrail.tasks.split import is_held_out, place, stream
from offtrail.tasks.words import WordsConfig

FAMILIES = (ChainConfig(), AdditionConfig(), CountdownConfig(), WordsConfig())
TASKS = (*FAMILIES, MixtureConfig(weights={"chain": 2.0, "addition": 1.0, "countdown": 1.0}))
ALPHABET = set("0123456789abcdefghijklmnopqrstuvwxyz \n+-*/%=()?.,:;<>#")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def name(config: TaskConfig) -> str:
    return config.name


def test_place_is_fixed_for_all_runs_and_machines():
    # coreutils agree: printf 'chain\\n1+1' | b2sum -l 64 gives 375626e0330649ee, of which the first 53 bits count.
    assert place("chain", "1+1") == (0x375626E0330649EE >> 11) / 2**53


def test_streams_differ_by_key_and_repeat():
    assert stream("a", 1).random() == stream("a", 1).random()
    assert len({stream(*key).random() for key in (("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), (1, "a"))}) == 5


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_a_superset(prompt: str, a: float, b: float):
    assert is_held_out("x", prompt, max(a, b)) or not is_held_out("x", prompt, min(a, b))
    assert not is_held_out("x", prompt, 0.0)


@pytest.mark.parametrize("config", TASKS, ids=name)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_training_prompt_is_ever_evaluated(config: TaskConfig, seed: int):
    task = make_task(config, seed)
    evaluated = {problem.prompt for problem in task.held_out(300)}
    assert len(evaluated) == 300
    assert not evaluated & {task.train(index).prompt for index in range(3000)}


@given(st.integers(0, 2**40), st.integers(0, 2**63), st.floats(0.0, 0.9))
def test_no_training_problem_is_on_the_held_out_side(index: int, seed: int, share: float):
    task = make_task(ChainConfig(held_out_share=share), seed)
    assert not is_held_out("chain", task.train(index).prompt, share)


@pytest.mark.parametrize("config", TASKS, ids=name)
def test_order_depends_on_seed_and_index_alone(config: TaskConfig):
    first, again, other = make_task(config, 3), make_task(config, 3), make_task(config, 4)
    forwards = [first.train(index) for index in range(50)]
    backwards = [again.train(index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert [problem.index for problem in forwards] == list(range(50))
    assert forwards != [other.train(index) for index in range(50)]


@pytest.mark.parametrize("config", TASKS, ids=name)
def test_evaluation_does_not_depend_on_the_seed(config: TaskConfig):
    problems = make_task(config, 0).held_out(64)
    assert problems == make_task(config, 12345).held_out(64)
    assert [problem.index for problem in problems] == list(range(64))


@pytest.mark.parametrize("config", TASKS, ids=name)
def test_the_default_evaluation_fits_every_family(config: TaskConfig):
    assert len(make_task(config, 0).held_out(512)) == 512


def test_another_process_draws_the_same_problems():
    """Python's hash() differs between processes; nothing may depend on it."""
    code = (
        "from offtrail.tasks.registry import make_task; from offtrail.tasks.mixture import MixtureConfig\n"
        "t = make_task(MixtureConfig(), 5)\n"
        "print([t.train(i).prompt for i in range(20)], [p.prompt for p in t.held_out(20)])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(offtrail.__file__).parents[1]), "PYTHONHASHSEED": "77"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    task = make_task(MixtureConfig(), 5)
    assert run.stdout.strip() == f"{[task.train(i).prompt for i in range(20)]} {[p.prompt for p in task.held_out(20)]}"


def test_too_few_held_out_prompts_is_an_error_that_says_so():
    # 1…9 + 1…9, mirrored pairs counted once: 45 prompts, about a tenth of them held out.
    task = make_task(AdditionConfig(min_digits=1, max_digits=1), 0)
    with pytest.raises(
        TaskError, match=r"200 held-out prompts .* task=addition, which has \d+ at .*lower eval.prompts"
    ):
        task.held_out(200)
    with pytest.raises(TaskError, match="which has 0"):
        make_task(ChainConfig(held_out_share=0.0), 0).held_out(1)
    assert make_task(ChainConfig(held_out_share=0.0), 0).held_out(0) == []


def test_every_held_out_prompt_of_a_small_family_is_found():
    identities = {f"{a}+{b}" for a in range(1, 10) for b in range(a, 10)}
    there = sum(is_held_out("addition", identity, 0.3) for identity in identities)
    task = make_task(AdditionConfig(min_digits=1, max_digits=1, held_out_share=0.3), 0)
    assert len(task.held_out(there)) == there
    with pytest.raises(TaskError, match=f"which has {there} "):
        task.held_out(there + 1)


def test_a_family_all_held_out_cannot_be_trained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("offtrail.tasks.base.is_held_out", lambda *_: True)
    with pytest.raises(TaskError, match="all held out; lower the share"):
        make_task(AdditionConfig(), 0).train(0)


@pytest.mark.parametrize("config", FAMILIES, ids=name)
def test_share_of_prompts_is_near_the_setting(config: GeneratedConfig):
    task = make_task(config, 0)
    assert isinstance(task, GeneratedTask)
    draws = {task.draw(stream("share", i)).identity for i in range(4000)}
    held_out = sum(is_held_out(config.name, identity, 0.1) for identity in draws)
    assert abs(held_out / len(draws) - 0.1) < 5 * (0.09 / len(draws)) ** 0.5  # five standard errors


def traces(task: Task, n: int) -> list[tuple[str, str]]:
    rng = stream("traces")
    return [(problem.prompt, task.trace(problem, rng)) for problem in map(task.train, range(n))]


@pytest.mark.parametrize(
    "config",
    [
        *TASKS,
        ChainConfig(styles=3, noise=0.3, words=True),
        AdditionConfig(noise=0.3),
        CountdownConfig(noise=0.3),
        WordsConfig(noise=0.3),
    ],
    ids=name,
)
def test_prompts_and_traces_keep_to_the_alphabet_of_the_small_tokenizer(config: TaskConfig):
    for prompt, trace in traces(make_task(config, 0), 500):
        for tag in TAGS:
            assert trace.count(tag) == 1
            trace = trace.replace(tag, "")
        assert set(prompt) | set(trace) <= ALPHABET


@pytest.mark.parametrize(
    "config",
    [ChainConfig(styles=3, noise=0.3), ChainConfig(words=True), AdditionConfig(noise=0.3), WordsConfig(noise=0.3)],
    ids=name,
)
def test_the_longest_trace_fits_64_tokens(config: TaskConfig):
    for _, trace in traces(make_task(config, 0), 3000):
        for tag in TAGS:
            trace = trace.replace(tag, "#")
        assert len(trace) + 1 <= 64  # one token a character and a tag, one for the end


@pytest.mark.parametrize("config", FAMILIES, ids=name)
def test_worked_share_is_the_share_of_worked_answers_and_all_are_right(config: GeneratedConfig):
    kind = type(config)
    for worked_share in (0.0, 1.0):
        task = make_task(kind(worked_share=worked_share, noise=0.0), 0)
        rng = stream("worked")
        for problem in map(task.train, range(200)):
            trace = task.trace(problem, rng)
            answer = trace.partition("<answer>")[2].removesuffix("</answer>")
            assert trace.startswith("<think></think>") == (worked_share == 0.0)
            assert task.verify(problem, answer)
            assert all(task.check_steps(problem, trace))
    share = sum(t.startswith("<think></think>") for _, t in traces(make_task(kind(worked_share=0.25), 0), 2000)) / 2000
    assert abs(share - 0.75) < 0.05  # five standard errors


@pytest.mark.parametrize("family", [ChainConfig, AdditionConfig])
@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_noise_is_the_chance_of_a_wrong_step_and_the_checker_finds_each(family: type[GeneratedConfig], noise: float):
    task = make_task(family(worked_share=1.0, noise=noise), 0)
    rng = stream("noise")
    verdicts = [
        v for problem in map(task.train, range(1500)) for v in task.check_steps(problem, task.trace(problem, rng))
    ]
    assert abs(verdicts.count(False) / len(verdicts) - noise) <= 5 * (noise * (1 - noise) / len(verdicts)) ** 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChainConfig(min_operations=7), "task.min_operations=7: must be from 1 to task.max_operations=6"),
        (lambda: ChainConfig(styles=4), "task.styles=4"),
        (lambda: ChainConfig(held_out_share=1.0), "task.held_out_share=1.0: must be in [0, 1)"),
        (lambda: ChainConfig(noise=1.5), "task.noise=1.5"),
        (lambda: AdditionConfig(min_digits=0), "task.min_digits=0"),
        (lambda: CountdownConfig(numbers=6), "task.numbers=6: must be in [2, 5]"),
        (lambda: CountdownConfig(max_target=10), "task.max_target=10: must be at least numbers × max_number = 45"),
        (lambda: MixtureConfig(weights={"chains": 1.0}), "task.weights=chains: must be one of addition, chain"),
        (lambda: MixtureConfig(weights={}), "task.weights={}"),
        (lambda: MixtureConfig(weights={"chain": 0.0}), "shares above 0"),
        (lambda: MixtureConfig(settings={"countdown": {}}), "task.settings=countdown"),
    ],
)
def test_settings_out_of_bounds_name_key_value_and_rule(build, message: str):  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
