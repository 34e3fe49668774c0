"""One text path: what sft, rl, evaluation, chat and serve put to the model is the same, token for token, and a verifier
sees the whole answer. The texts below are written by hand; the tokenizer has one token a character or tag.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offtrail.core.protocols import Request
from offtrail.core.types import Lease, Problem, Sampling
from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.schema import Config, PromptConfig
from offtrail.platform.evaluator import role as evaluator
from offtrail.platform.generator import role as generator
from offtrail.platform.launcher.chat import Conversation
from offtrail.platform.launcher.serve import folder_to_serve, text_of
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.data import Traces
from offtrail.platform.model.policy import load_model
from offtrail.platform.model.text import Text, with_defaults
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import RoleContext
from offtrail.rewards.registry import make_reward
from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask
from offtrail.tasks.templates import task_template

TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
ASK = "{% if add_generation_prompt %}assistant:%s{% endif %}"
QWEN = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


@dataclass(frozen=True)
class Case:
    """A tokenizer, settings, and by hand: what is told of a question, and what of the worked answer is left to say."""

    told: str
    says: str
    template: str | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    special: dict[str, Any] = field(default_factory=dict)


WORKED = "<think></think><answer>12</answer>"
CASES = {
    "plain": Case("find {q}", WORKED),
    "a chat template": Case("user:find {q}\nassistant:", WORKED, TURNS + ASK.replace("%s", "")),
    "a template that opens the thought": Case(
        "user:find {q}\nassistant:<think>\n", "</think><answer>12</answer>", TURNS + ASK.replace("%s", "<think>\n")
    ),
    "a task's own opened thought": Case("find {q}<think>\n", "</think><answer>12</answer>"),
    "keywords and a system prompt": Case(
        "system:be exact 'x'\nuser:find {q}\nassistant:<think>\n\n</think>\n\n",
        "<answer>12</answer>",
        TURNS + ASK.replace("%s", QWEN),
        PromptConfig(system="be exact 'x'", template_kwargs={"enable_thinking": False}),
    ),
    "a template that is left out": Case("find {q}", WORKED, TURNS, PromptConfig(chat="never")),
    "a tokenizer that puts a BOS": Case("<bos>find {q}", WORKED, special={"bos_token": "<bos>", "add_bos_token": True}),
    "a BOS that is asked for": Case("<bos>find {q}", WORKED, None, PromptConfig(bos="always"), {"bos_token": "<bos>"}),
    "a BOS that is left out": Case(
        "find {q}", WORKED, None, PromptConfig(bos="never"), {"bos_token": "<bos>", "add_bos_token": True}
    ),
    "unk, bos and eos are one": Case(
        "<eos>user:find {q}\nassistant:",
        WORKED,
        "{{ bos_token }}" + TURNS + ASK.replace("%s", ""),
        special={"bos_token": "<eos>", "unk_token": "<eos>"},
    ),
}


@pytest.fixture
def make_model(start_dir: Path, tmp_path: Path) -> Callable[[Case], Path]:
    """A model folder with the tokenizer of a case."""

    def make(case: Case) -> Path:
        folder = tmp_path / "model"
        model, tokenizer = load_model(start_dir), AutoTokenizer.from_pretrained(start_dir)
        # Trap: every character is a token, so that a quote must be one before it can be asked for.
        tokenizer.add_tokens(["'"])
        for name, value in case.special.items():
            if name == "bos_token" and value not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({name: value})
            else:
                setattr(tokenizer, name, value)
        tokenizer.backend_tokenizer.model.unk_token = tokenizer.unk_token
        tokenizer.chat_template = case.template
        tokenizer.save_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        return folder

    return make


class AskedError(Exception):
    """The engine has what it is to answer, and this one never does."""


class FakeEngine:
    """Keeps what it is asked."""

    replicas, unfinished, version, vocab_size = 1, 0, 0, 61

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.counters: dict[str, float] = {}

    def generate(self, requests: list[Request]) -> None:
        self.asked += requests

    def lost(self) -> list[int]:
        raise AskedError


def settings(case: Case, tmp_path: Path) -> Config:
    """Training on 7+5=, evaluation on 2+2=."""
    for name, question, answer in (("train", "7+5=", 12), ("eval", "2+2=", 4)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": f"#### {answer}"}))
    config = Config()
    template = "find {prompt}" + ("<think>\n" if case is CASES["a task's own opened thought"] else "")
    config.task = JsonlConfig(
        path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "eval.jsonl"), template=template
    )
    config.prompt, config.eval.prompts = case.prompt, 1
    return config


def rollout_of(config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generator's parts; ``judges`` is what turns an answer's tokens into text for verifiers."""
    for name in ("make_engine", "open_reader", "VerifierPool"):
        monkeypatch.setattr(generator, name, lambda *_: None)
    monkeypatch.setattr(generator, "Judges", lambda pool, scorers, answer_text, rewards: answer_text)
    monkeypatch.setattr(generator, "Rollout", lambda **parts: SimpleNamespace(**parts))
    return generator.open_rollout(RoleContext(config, run_dir, "generator", 0), None)  # type: ignore[arg-type]


def eval_tokens(config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    engine = FakeEngine()
    monkeypatch.setattr(evaluator, "make_engine", lambda context, loaded: engine)
    monkeypatch.setattr(evaluator, "VerifierPool", lambda config, sets, nice: SimpleNamespace(counters={}))
    evaluation = evaluator.Evaluation(RoleContext(config, run_dir, "evaluator", 0), Activity())
    with pytest.raises(AskedError):
        evaluation.answers.groups(evaluation.problems, 1, Sampling(max_new_tokens=1))
    [request] = engine.asked
    return list(request.prompt_tokens.tolist())


@pytest.mark.parametrize("name", CASES)
def test_sft_rl_evaluation_chat_and_serve_put_the_same_tokens(
    name: str, make_model: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    model, config = make_model(case), settings(case, tmp_path)
    (tmp_path / "start").symlink_to(model)
    vocabulary = AutoTokenizer.from_pretrained(model)

    def by_hand(question: str) -> list[int]:
        return list(vocabulary.encode(case.told.replace("{q}", question), add_special_tokens=False))

    task = JsonlTask(config.task, 0)
    text = Text(model, config.prompt, task_template=task_template(config.task))
    rows = Traces(task, text, batch_size=1, seed=0, max_length=200).table(0)
    assert rows.prompts[0].tolist() == by_hand("7+5=")
    rollout = rollout_of(config, tmp_path, monkeypatch)
    assert rollout.encode(Lease(0, 0, 1, task.train(0), 1, 0)).tolist() == by_hand("7+5=")
    assert eval_tokens(config, tmp_path, monkeypatch) == by_hand("2+2=")

    # the checkpoint by itself, without its run
    saved = tmp_path / "elsewhere" / "saved"
    saved.mkdir(parents=True)
    policy = load_model(model)
    checkpoint.write_model(saved, policy, text, {n: p.detach() for n, p in policy.named_parameters()})
    chat_config = Config(job="chat", checkpoint=str(saved))
    assert Conversation(text_of(chat_config, saved)).prompt("7+5=", 200).tolist() == by_hand("7+5=")
    served = folder_to_serve(text_of(chat_config, saved), saved, tmp_path / "elsewhere")
    for folder in (saved, served):
        tokenizer, asked = AutoTokenizer.from_pretrained(folder), task.train(0).prompt
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": asked}]
            tokens = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        else:
            tokens = tokenizer.encode(asked)
        assert tokens == by_hand("7+5=")

    # a model whose run says how it was trained, before its first checkpoint
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    from_run = text_of(Config(job="chat", checkpoint=str(tmp_path)), model)
    assert Conversation(from_run).prompt("7+5=", 200).tolist() == by_hand("7+5=")

    # what sft teaches to say next is a right answer to the verifiers
    said = rows.tokens[rows.starts[0] : rows.starts[1]]
    assert vocabulary.decode(said[:-1].tolist()) == case.says
    assert said[-1] == text.stop_token_ids[0]
    whole = rollout.judges(task.train(0), said)
    scores = make_reward(config.reward, task.verify).judge(task.train(0), [whole], [True])
    assert scores == {"accuracy": [1.0], "format": [1.0]}


def test_a_conversation_puts_its_turns_through_the_template(make_model: Callable[[Case], Path]) -> None:
    text = Text(make_model(CASES["a template that opens the thought"]), task_template="find {prompt}")
    talk = Conversation(text)
    talk.note("1+1", "</think>2")
    told = text.tokenizer.decode(talk.prompt("3", 200).tolist())
    assert told == "user:find 1+1\nassistant:<think>\n</think>2\nuser:3\nassistant:<think>\n"


def test_messages_are_told_as_they_are_and_their_system_prompt_wins(make_model: Callable[[Case], Path]) -> None:
    prompt = PromptConfig(system="be exact")
    text = Text(make_model(CASES["a chat template"]), prompt)
    own = ({"role": "system", "content": "be short"}, {"role": "user", "content": "1+1"})
    assert text.told(Problem("t", 0, "", "", messages=own)) == "system:be short\nuser:1+1\nassistant:"
    assert text.told(Problem("t", 0, "", "", messages=own[1:])) == "system:be exact\nuser:1+1\nassistant:"


def test_messages_without_a_chat_template_are_refused(start_dir: Path) -> None:
    problem = Problem("jsonl", 7, "", "", messages=({"role": "user", "content": "1"},))
    with pytest.raises(
        TaskError, match=r"task=jsonl, problem 7: its prompt is a list of messages, and no chat template"
    ):
        Text(start_dir).encode(problem)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (PromptConfig(chat="always"), r"^prompt\.chat=always: the tokenizer of .* has no chat template; take prompt"),
        (PromptConfig(system="be good"), r"^prompt\.system=be good: the tokenizer of .* has no chat template to put"),
        (
            PromptConfig(template_kwargs={"a": 1}),
            r"^prompt\.template_kwargs=\{'a': 1\}: the tokenizer of .* has no chat",
        ),
        (
            PromptConfig(bos="always"),
            r"^prompt\.bos=always: the tokenizer of .* has no BOS token; take prompt\.bos=auto",
        ),
    ],
)
def test_what_a_tokenizer_cannot_do_is_named(prompt: PromptConfig, words: str, start_dir: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Text(start_dir, prompt)


def test_text_that_the_tokenizer_does_not_know_and_an_empty_prompt_are_errors(start_dir: Path) -> None:
    text = Text(start_dir)
    with pytest.raises(TaskError, match=r"task=jsonl, problem 7: the tokenizer does not know all of 'aBc'; choose a m"):
        text.encode(Problem("jsonl", 7, "aBc", "1"))
    with pytest.raises(TaskError, match="problem 3: the prompt is empty"):
        text.encode(Problem("chain", 3, "", "1"))


def test_an_unknown_character_is_found_beside_a_template_that_writes_the_same_token(
    make_model: Callable[[Case], Path],
) -> None:
    text = Text(make_model(CASES["unk, bos and eos are one"]))
    text.encode(Problem("t", 0, "abc", ""))
    with pytest.raises(TaskError, match="does not know all of"):
        text.encode(Problem("t", 0, "aBc", ""))


def test_stop_tokens_are_all_that_anything_names_and_the_checkpoint_names_the_same(
    make_model: Callable[[Case], Path], tmp_path: Path
) -> None:
    """The tokenizer's eos is 1, generation_config.json's 3 and 4, config.json's 5; <pad> = 0 is the template's, after
    an answer.
    """
    model = make_model(Case("", "", TURNS.replace("\n", "<pad>\n")))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"eos_token_id": 5}))
    text = Text(model)
    assert text.stop_token_ids == (0, 1, 3, 4, 5)
    assert text.decode(np.array([8, 9, 4], np.int32)) == text.decode(np.array([8, 9], np.int32))
    policy, saved = load_model(model), tmp_path / "saved"
    saved.mkdir()
    checkpoint.write_model(saved, policy, text, {n: p.detach() for n, p in policy.named_parameters()})
    for name in ("generation_config.json", "config.json"):
        assert json.loads((saved / name).read_text())["eos_token_id"] == [0, 1, 3, 4, 5]
    assert Text(saved).stop_token_ids == (0, 1, 3, 4, 5)


def test_defaults_are_written_once_and_a_callers_own_win() -> None:
    prompt = PromptConfig(system='say "%}" and \\n', template_kwargs={"a": None, "b": [True, 1.5]})
    once = with_defaults("x", prompt)
    assert with_defaults(once, prompt) == once
    assert "{%- set a = none %}" in once
    assert "{%- set b = [true, 1.5] %}" in once
    assert with_defaults("x", PromptConfig()) == "x"


def test_tokens_that_the_model_has_no_row_for_are_no_stop_and_no_template(make_model: Callable[[Case], Path]) -> None:
    """Added to the tokenizer without resizing the embedding, as with a base model and another model's template."""
    folder = make_model(Case("", ""))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    new = tokenizer.convert_tokens_to_ids("<turn>")
    described = json.loads((folder / "config.json").read_text()) | {"vocab_size": new}
    (folder / "config.json").write_text(json.dumps(described))
    tokenizer.chat_template = TURNS.replace("\n", "<turn>")  # closes what the user said with it
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=rf"template writes '<turn>', token {new}, but the model has {new} \(vocab_size\)"
    ):
        Text(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [new, 3]}))
    assert Text(folder, PromptConfig(chat="never")).stop_token_ids == (1, 3)


DATED = (
    "{% if date_string is not defined and strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}\n{{ date_string }}" + TURNS + '{{ strftime_now("%d-%B-%Y") }}{{ strftime_now(messages[0].role) }}'
)


def test_a_template_that_writes_todays_date_is_the_same_on_every_day(
    make_model: Callable[[Case], Path], tmp_path: Path
) -> None:
    expected = "26 Jul 2024user:1+1\n26-July-20242024-07-26"
    text = Text(make_model(Case("", "", DATED)))
    assert text.told(Problem("t", 0, "1+1", "")) == expected
    text.save_pretrained(tmp_path)
    turn = [{"role": "user", "content": "1+1"}]
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turn, tokenize=False) == expected
    assert with_defaults(text.tokenizer.chat_template, PromptConfig()) == text.tokenizer.chat_template
    pinned = PromptConfig(template_kwargs={"date_string": "1 jan"})
    (tmp_path / "again").mkdir()
    assert Text(tmp_path, pinned).told(Problem("t", 0, "1+1", "")).startswith("1 januser:1+1")


def byte_level(template: str = "<|begin|> $A") -> Tokenizer:
    """As Llama 3's and GPT-2's: bytes, merges, and a BOS that a post-processor puts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|begin|>", 0)])
    return made


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Mistral's: a blank in front of a text, bytes for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<|begin|>", "<|end|>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return made


TEXTS = ["what is 12+7? <think>12+7=19</think> <answer>19</answer>", "find the sum of 3 and 4"] * 20


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", ["byte-level", "byte-level without BOS", "sentencepiece"])
def test_the_common_kinds_of_tokenizers_put_and_save_a_bos_as_they_are_told(
    kind: str, bos: Literal["auto", "always", "never"], tmp_path: Path
) -> None:
    made = {
        "byte-level": byte_level,
        "byte-level without BOS": lambda: byte_level("$A"),
        "sentencepiece": sentencepiece,
    }
    whole = PreTrainedTokenizerFast(tokenizer_object=made[kind](), bos_token="<|begin|>", eos_token="<|end|>")
    for folder in (tmp_path / "model", tmp_path / "saved"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    whole.save_pretrained(tmp_path / "model")
    problem, answer = Problem("t", 0, "what is 12+7?", "19"), "<think>12+7=19</think> <answer>19</answer>"
    text = Text(tmp_path / "model", PromptConfig(bos=bos))
    tokens = text.encode(problem).tolist()
    puts = bos == "always" or (bos == "auto" and kind != "byte-level without BOS")
    assert tokens == [0] * puts + whole.encode(problem.prompt, add_special_tokens=False)
    text.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(problem.prompt) == tokens
    assert Text(tmp_path / "saved").encode(problem).tolist() == tokens
    [said] = text.encode_answers([problem], [answer])
    assert text.decode(said) == answer
    assert said[-1] == text.stop_token_ids[0] == 1


def test_the_keys_are_read_from_the_command_line() -> None:
    line = ["prompt.system=be exact", "prompt.template_kwargs={enable_thinking: false, level: 2}", "prompt.bos=never"]
    config = compose(line)
    assert config.prompt.template_kwargs == {"enable_thinking": False, "level": 2}
    assert compose(["prompt.template_kwargs.enable_thinking=false"]).prompt.template_kwargs == {
        "enable_thinking": False
    }
    with pytest.raises(
        ValueError, match=r"prompt\.system=hello: needs a chat template, which prompt\.chat=never leaves"
    ):
        PromptConfig(chat="never", system="hello")
    with pytest.raises(ValueError, match=r"prompt\.template_kwargs\.messages: must be a keyword"):
        PromptConfig(template_kwargs={"messages": 1})


def test_a_file_may_hold_message_lists(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2"}],
        [{"role": "user", "content": "2+2"}],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"talk": row, "answer": "4"}) for row in rows))
    config = JsonlConfig(path=str(path), messages_field="talk", answer_after="", template="{prompt}?", held_out_share=0)
    task = JsonlTask(config, 0)
    long = next(p for p in map(task.train, range(2)) if len(p.messages) == 3)
    assert long.messages == (*rows[0][:2], {"role": "user", "content": "2+2?"})
    assert long.prompt == "user: 1+1\nassistant: 2\nuser: 2+2?"
    path.write_text(json.dumps({"talk": rows[0][:2], "answer": "4"}))
    with pytest.raises(TaskError, match=r"line 1: field 'talk' ends with the assistant's message"):
        JsonlTask(config, 0)
    path.write_text(json.dumps({"talk": "1+1", "answer": "4"}))
    with pytest.raises(TaskError, match=r'line 1: field .talk. must be a list of {"role": …, "content": …}'):
        JsonlTask(config, 0)


def test_a_task_without_a_template_of_its_own_puts_problems_as_they_stand() -> None:
    assert task_template(TaskConfig()) == "{prompt}"
