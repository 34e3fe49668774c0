"""Programs as answers: taken out of the text, put together, judged through the component; tasks from local files."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offtrail.core.problem import Problem
from offtrail.core.settings import told
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.validate import validate
from offtrail.platform.verifier.keeper import descendants
from offtrail.platform.verifier.pool import VerifierPool
from offtrail.rewards.base import Answered, RewardError
from offtrail.rewards.components.code import Code
from offtrail.rewards.config import RewardConfig
from offtrail.rewards.format import parse
from offtrail.rewards.program import program_in, whole
from offtrail.rewards.registry import make_reward
from offtrail.rewards.sandbox import bubblewrap
from offtrail.rewards.sandbox.box import Box
from offtrail.rewards.sandbox.judge import judge
from offtrail.rewards.sandbox.runs import Limits
from offtrail.rewards.sandbox.walls import landlock_abi
from offtrail.rewards.total import Scored
from offtrail.tasks.base import TaskError
from offtrail.tasks.programs import ProgramsConfig
from offtrail.tasks.registry import make_task, remarks_on

SANDBOX = pytest.mark.skipif(
    landlock_abi() < 1 and not bubblewrap.found(), reason="neither Landlock nor bubblewrap: nothing is run here"
)
DATA = os.environ.get("OFFTRAIL_DATA", "")
PLENTY = Limits(seconds=120, cpu_seconds=60)

COMPLETED = {
    "task_id": "Own/0",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Of half a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return half(math.pi * r * r)\n",
    "test": "def check(candidate):\n    assert abs(candidate(2) - half(12.566)) < 1e-3\n    assert candidate(0) == 0\n",
}
ASSERTED: list[dict[str, Any]] = [
    {
        "text": "Reverse a list.",
        "code": "def back(a):\n    return a[::-1]",
        "test_list": ["assert back([1, 2]) == [2, 1]", "assert back([]) == []"],
    },
    {"text": "Add two numbers.", "code": "def sum(a, b):\n    return a + b", "test_list": ["assert sum(1, 2) == 3"]},
    {
        "text": "Size of a tuple.",
        "code": "import sys\ndef size(t):\n    '\\w'\n    return sys.getsizeof(t)",
        "test_list": ["assert size((1, 2)) == sys.getsizeof((1, 2))"],
    },
    {
        "text": "Largest of three.",
        "code": "def top(*a):\n    return max(a)",
        "test_setup_code": "low = 1",
        "test_list": ["assert top(low, 2, 3) == 3"],
    },
]
CASES = {"question": "Add the numbers.", "io": {"inputs": ["1 2\n", "3\n"], "outputs": ["3", "3\n"]}}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def config_of(variant: str, path: str, **others: Any) -> ProgramsConfig:
    config = compose([f"task={variant}", f"task.path={path}", "reward=code"]).task
    assert isinstance(config, ProgramsConfig)
    for name, value in others.items():
        setattr(config, name, value)
    return config


def problems(config: ProgramsConfig) -> list[Problem]:
    return make_task(config, 0).training()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box(limits=PLENTY) as box:
        yield box


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>```python\nno\n```</think><answer>```python\na = 1\n```</answer>", "a = 1"),
        ("<think></think><answer>Here:\n```python\na\n```\nor\n```py\nb\n```\n</answer>", "b"),
        ("<think></think><answer>\n```text\nx\n```\n```\nc\n```</answer>", "c"),
        ("<think></think><answer>\n    return 1\n</answer>", "    return 1"),
        ("Sure!\n```python\nd\n```\nIt works.", "d"),
        ("thought </think>```python\ne\n", "e"),
        ("plain = 1\n", "plain = 1"),
        ("<answer>```Python3\nf\n```", None),
        ("<answer>1</answer><answer>2</answer>", None),
        ("", ""),
    ],
)
def test_the_program_of_an_answer(text: str, program: str | None):
    assert program_in(text) == program


def test_a_prefix_goes_before_what_continues_it_and_what_defines_it_anew():
    meta = {"prefix": "import math\ndef f(x):\n    '''Doc.'''\n", "functions": ["f"]}
    for program in ("    return math.pi", "def f(x):\n    return math.pi"):
        space: dict[str, Any] = {}
        exec(whole(program, meta), space)
        assert space["f"](0) > 3
    first = "from __future__ import annotations\ndef f(x): return 1"
    assert whole(first, meta) == first
    assert whole("x", {"functions": ["f"]}) == "x"


def answered(problem: Problem, text: str) -> Answered:
    return Answered(problem, text, True, parse(text), None, lambda problem, answer: False)


@SANDBOX
def test_all_kinds_of_sets_are_judged(tmp_path: Path, box: Box):
    completed = problems(config_of("humaneval", write(tmp_path / "h.jsonl.gz", [COMPLETED]), held_out_share=0.0))
    asserted = problems(config_of("mbpp", write(tmp_path / "m.jsonl", ASSERTED), held_out_share=0.0))
    io = {"prompt_field": "question", "tests_field": "io", "tests": "cases", "held_out_share": 0.0}
    cases = problems(config_of("programs", write(tmp_path / "c.jsonl", [CASES]), **io))
    for problem in (*completed, *asserted):
        assert judge(box, whole(problem.answer, problem.meta), problem.meta).reason == "ok"
        assert judge(box, whole("pass", problem.meta), problem.meta).score == 0
    assert judge(box, "print(sum(map(int, input().split())))", cases[0].meta).reason == "ok"
    assert judge(box, "print(3)", cases[0].meta).reason == "ok"
    assert judge(box, "print(4)", cases[0].meta).reason == "wrong: output of test 1"
    assert judge(box, COMPLETED["canonical_solution"], completed[0].meta).reason.startswith("syntax")
    assert judge(box, whole(COMPLETED["canonical_solution"], completed[0].meta), completed[0].meta).reason == "ok"


@SANDBOX
def test_a_program_cannot_take_the_place_of_what_its_tests_use(tmp_path: Path, box: Box):
    row = {"text": "Same.", "code": "def f(x):\n    return x", "test_list": ["assert set(f([1])) == set([1])"]}
    [problem] = problems(config_of("mbpp", write(tmp_path / "m.jsonl", [row]), held_out_share=0.0))
    assert problem.meta["functions"] == ["f"]
    assert judge(box, "def f(x): return [2]\ndef set(x): return 0", problem.meta).score == 0


@SANDBOX
def test_the_component(tmp_path: Path):
    path = write(tmp_path / "m.jsonl", ASSERTED)
    first, second, *_ = problems(config_of("mbpp", path, held_out_share=0.0))
    reward = make_reward(
        RewardConfig(weights={"code": 1.0}, settings={"code": {"partial": True, "seconds": 60.0, "cpu_seconds": 20}}),
        lambda problem, answer: False,
    )
    texts = [
        f"<think></think><answer>```python\n{first.answer}\n```</answer>",
        f"```python\n{first.answer}\n```",
        "<answer>def back(a): return []</answer>",
        "<answer><answer>def back(a): return []</answer>",
        "I do not know.",
        "",
    ]
    assert reward.judge(first, texts, [True] * 6)["code"] == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    found = {"code/ok": 2, "code/wrong": 1, "code/malformed": 2, "code/syntax": 1}
    others = ("raised", "timeout", "memory", "died", "reply")
    assert reward.counts == found | {f"code/{why}": 0 for why in others}
    reward.judge(first, texts[:1], [True])
    assert (sum(reward.counts.values()), reward.counts["code/ok"]) == (1, 1)  # of the answers judged last
    code = Code(seconds=60)
    assert code(answered(Problem("chain", 0, "1+1", "2"), "<answer>2</answer>")) is None
    assert code.judged(answered(first, texts[3])).reason == "malformed: the answer tags are not one pair"
    assert code.judged(answered(first, "")).reason == "malformed: no program"
    assert code.judged(answered(second, texts[0])).reason.startswith("raised: NameError: name 'sum'")


@SANDBOX
def test_verifier_workers_judge_programs_and_leave_nothing(tmp_path: Path):
    path = write(tmp_path / "m.jsonl", ASSERTED)
    config = compose(["task=mbpp", f"task.path={path}", "reward=code", "reward.settings.code.seconds=15"])
    first = problems(config_of("mbpp", path, held_out_share=0.0))[0]
    right, wrong = (f"<think></think><answer>{code}</answer>" for code in (first.answer, "def back(a): return 0"))
    loops = "<answer>while 1: pass</answer>"
    before = set(descendants(os.getpid()))
    with VerifierPool(config) as pool:
        pool.submit(7, first, [right, wrong, loops], [True] * 3)
        [(key, components)] = pool.poll(120)
        assert key == 7
        assert components is not None
        assert components["code"].tolist() == [1, 0, 0]
        assert isinstance(components, Scored)
        found = {name: n for name, n in components.counts.items() if name.startswith("code/") and n}
        assert found == {"code/ok": 1, "code/wrong": 1, "code/timeout": 1}
        assert len(set(descendants(os.getpid())) - before) >= 3
    assert set(descendants(os.getpid())) <= before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wall": "none"}, "wall=none: must be one of auto, bwrap, landlock"),
        ({"seconds": 0}, r"seconds=0: must be in \(0, 3600\]"),
        ({"cpu_seconds": 1.5}, "cpu_seconds=1.5: must be whole seconds"),
        ({"memory_mb": 64}, r"memory_mb=64: must be a whole number in \[128"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(RewardError, match=rf"reward.settings.code.{words}"):
        Code(**settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reward=code", "reward.deadline_seconds=20"], r"reward.deadline_seconds=20.*must be ≥ .*batch.group_size"),
        (
            ["reward=code", "reward.settings.code.memory_mb=2048"],
            r"reward.memory_mb=1024.*must be ≥ reward.settings.code",
        ),
        (
            ["job=sample", "reward=code", "sample.samples=64"],
            r"reward.deadline_seconds=.*must be ≥ .*sample.samples=64",
        ),
        (["task=mbpp", "task.path=PATH"], "judged by running: reward=code"),
        (["task=mbpp", "reward=code"], "task.path="),
    ],
)
def test_configurations_that_cannot_work(arguments: list[str], words: str, tmp_path: Path):
    path = write(tmp_path / "m.jsonl", ASSERTED)
    with pytest.raises(ConfigError, match=words):
        validate(compose([argument.replace("PATH", path) for argument in arguments]))


def test_verify_runs_nothing_and_is_never_wrongly_right(tmp_path: Path):
    config = config_of("mbpp", write(tmp_path / "m.jsonl", ASSERTED), held_out_share=0.0)
    task = make_task(config, 0, load=False)
    problem = problems(config)[0]
    assert task.verify(problem, "```python\ndef back( a ): # so\n  return a[::-1]\n```")
    assert not task.verify(problem, "def back(a): return list(reversed(a))")
    assert not task.verify(problem, "def back(")
    assert not task.verify(Problem("programs", 0, "p", ""), "")
    assert task.verify(problem, parse(task.trace(problem, random.Random(0))).answer)  # type: ignore[union-attr]
    assert task.check_steps(problem, "x") == []


def test_sides_prompts_and_order(tmp_path: Path):
    rows = [dict(ASSERTED[0], text=f"Reverse a list, way {i}.") for i in range(200)]
    config = config_of("mbpp", write(tmp_path / "m.jsonl", rows), held_out_share=0.2)
    task = make_task(config, 3)
    held_out = {problem.prompt for problem in task.held_out(20)}
    assert len(held_out) == 20
    trained = [task.train(i) for i in range(170)]
    assert not held_out & {problem.prompt for problem in trained}
    again = make_task(config, 3)
    assert trained == [again.train(i) for i in reversed(range(170))][::-1]
    assert "assert back([1, 2]) == [2, 1]" in trained[0].prompt
    assert "```python block inside <answer>" in trained[0].prompt
    json.dumps(dict(trained[0].meta))
    with pytest.raises(TaskError, match=r"eval.prompts"):
        task.held_out(200)
    assert told(ProgramsConfig, "path", "path") == "file"


def test_a_template_may_be_a_name_as_for_every_set(tmp_path: Path):
    config = config_of("mbpp", write(tmp_path / "m.jsonl", ASSERTED), held_out_share=0.0, template="boxed")
    assert problems(config)[0].prompt == (
        "Reverse a list.\n\nYour program must pass these tests:\n\nassert back([1, 2]) == [2, 1]\nassert back([]) == []"
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    with pytest.raises(ValueError, match=r"template='x': must be r1_zero, boxed, tags, or a text that contains \{pro"):
        ProgramsConfig(template="x")


def test_problems_whose_tests_need_classes_of_the_program_are_left_out_and_said(tmp_path: Path):
    node = "class Node:\n    pass\ndef f(x):\n    return 1"
    rows = [
        ASSERTED[0],
        {"text": "A", "code": node, "test_list": ["assert f(Node()) == 1"]},
        {"text": "B", "code": node, "test_setup_code": "root = Node()", "test_list": ["assert f(root) == 1"]},
    ]
    task = make_task(config_of("mbpp", path := write(tmp_path / "m.jsonl", rows), held_out_share=0.0), 0)
    assert [problem.index for problem in task.training()] == [1]  # type: ignore[attr-defined]
    [said] = remarks_on(task)
    assert said.startswith(f"task.path={path}: 2 of its 3 problems are left out, line 2 first")


@pytest.mark.parametrize(
    ("variant", "row", "words"),
    [
        ("mbpp", {"text": "T", "code": "x", "test_list": []}, "field 'test_list' must be a list of tests"),
        ("mbpp", {"text": "T", "code": "x", "test_list": ["assert len([]) == 0"]}, "call no function of a program"),
        ("mbpp", {"text": "T", "code": "def f(:", "test_list": ["assert f()"]}, "are no Python"),
        ("mbpp", {"text": "", "code": "x", "test_list": ["f()"]}, "field 'text' is empty"),
        (
            "humaneval",
            {"prompt": "def f(x):\n", "canonical_solution": " return 1", "test": "x"},
            "no field 'entry_point'",
        ),
    ],
)
def test_rows_that_cannot_be_used(variant: str, row: dict[str, Any], words: str, tmp_path: Path):
    path = write(tmp_path / "m.jsonl", [row])
    with pytest.raises(TaskError, match=rf"task.path={path}, line 1: .*{words}"):
        make_task(config_of(variant, path), 0)


@pytest.mark.prove
@SANDBOX
@pytest.mark.skipif(not DATA, reason="OFFTRAIL_DATA is not set: names a folder with HumanEval.jsonl.gz")
def test_every_reference_of_humaneval_passes_and_no_stub(box: Box):
    found = problems(config_of("humaneval", str(Path(DATA, "HumanEval.jsonl.gz")), held_out_share=0.0))
    assert len(found) == 164
    failed = {p.index: r for p in found if (r := judge(box, whole(p.answer, p.meta), p.meta).reason) != "ok"}
    stubs = [p.index for p in found if judge(box, whole("    pass", p.meta), p.meta).score > 0]
    assert (failed, stubs) == ({}, [])


@pytest.mark.prove
@SANDBOX
@pytest.mark.skipif(not DATA, reason="OFFTRAIL_DATA is not set: names a folder with mbpp_all974.jsonl")
def test_the_references_of_mbpp(box: Box):
    """Of 974 problems 367, 601 and 927 hand over objects of the program's own classes; all others pass."""
    found = problems(config_of("mbpp", str(Path(DATA, "mbpp_all974.jsonl")), held_out_share=0.0))
    assert set(range(1, 975)) - {p.index for p in found} == {367, 601, 927}
    failed = {p.index: r for p in found if (r := judge(box, whole(p.answer, p.meta), p.meta).reason) != "ok"}
    assert failed == {}
