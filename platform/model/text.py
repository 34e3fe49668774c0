"""Between text and tokens, at the edge of an engine: nothing else builds prompts, and inside only tokens travel.

    problem ─► told (chat template, system prompt, template keywords) ─► encode ─► prompt tokens ─► engine
    answer tokens ─► answer_text (with what the template opened) ─► verifiers, format, shown texts

Invariant: sft, rl, evaluation, chat and serve put a problem to the model as the same tokens. What `prompt` adds is
written into the tokenizer itself (its chat template, its BOS rule), so that a saved checkpoint does the same wherever
it is opened: `save_pretrained` is what a checkpoint calls instead of the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from offtrail.core.types import Int32, Problem
from offtrail.platform.config.schema import PromptConfig
from offtrail.platform.model.folder import without_bos, without_rows, without_template
from offtrail.platform.model.refusals import empty_prompt, refused, unknown_text, without_chat
from offtrail.tasks.base import TaskError

TASK_FILE = "offtrail.json"
"""In a checkpoint, beside the tokenizer: how the task wrote its prompts, {"template": "…{prompt}…"}."""
_MARK = "\N{WHITE SQUARE}answer\N{WHITE SQUARE}"
TODAY = date(2024, 7, 26)
"""What a chat template takes for today, as Llama 3's does where nobody tells it: a prompt is the same on every day, or
roles would disagree at midnight and a checkpoint be served with other tokens than it was trained on.
"""
_STRFTIME = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")


class Text:
    """The tokenizer of a Hugging Face directory, how a problem is put to it, and the token ids that end an answer.

    ``vocabulary``: from this id on it has no token; a model's embedding may have more rows, as padding.

    ``chats``: prompts go through the chat template. ``stop_token_ids``: all that generation_config.json, config.json or
    the tokenizer name as eos (one or several each), and the token that the chat template ends an answer with; the first
    is the one that worked answers are taught to end with.

    Raises ValueError, one line with the key, where the tokenizer cannot do what ``prompt`` says or nothing ends an
    answer.
    """

    def __init__(self, model_dir: Path, prompt: PromptConfig | None = None, *, task_template: str = "{prompt}") -> None:
        from transformers import AutoTokenizer  # slow to import: only roles that hold text pay for it

        self.prompt, self.task_template = prompt or PromptConfig(), task_template
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.chats = _wants_chat(self.tokenizer, self.prompt, model_dir)
        if self.chats:
            self.tokenizer.chat_template = with_defaults(self.tokenizer.get_chat_template(), self.prompt)
        else:
            self.tokenizer.chat_template = None
            _set_bos(self.tokenizer, self.prompt.bos, model_dir)
        self._rows = _rows(model_dir)
        if self._rows and (tokens := _tokens_of_text(self.tokenizer)) > self._rows:
            raise ValueError(without_rows(f"model.path={model_dir}", tokens, self._rows))
        self._prefix = [] if self.chats else added_in_front(self.tokenizer)
        self._generation_prompt = self._rendered_generation_prompt() if self.chats else ""
        if self.chats:
            self._check_template(model_dir)
        self.stop_token_ids = self._stop_ids(model_dir)
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1

    # --- to the model ---

    def told(self, problem: Problem) -> str:
        """The text that is put to the model, but for a plain prompt's BOS.

        Raises TaskError for messages without a chat template, and when the template refuses them.
        """
        if not self.chats:
            if problem.messages:
                raise without_chat(problem)
            return problem.prompt
        messages = [dict(m) for m in problem.messages] or [{"role": "user", "content": problem.prompt}]
        return self._render(messages, problem)

    def encode(self, problem: Problem) -> Int32:
        """Prompt tokens [P]. Raises TaskError when the prompt is empty or holds text that the tokenizer lacks."""
        return self.encode_all([problem])[0]

    def encode_all(self, problems: Sequence[Problem]) -> list[Int32]:
        """Prompt tokens [P] of each; see ``encode``."""
        told = [self.told(problem) for problem in problems]
        tokens = self._tokens(told)
        for problem, text, ids in zip(problems, told, tokens, strict=True):
            if not ids:
                raise empty_prompt(problem)
            self._check_known(problem, text, ids)
        return [np.array([*self._prefix, *ids], np.int32) for ids in tokens]

    def encode_answers(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Int32]:
        """Tokens [T] of whole answers such as worked ones, each with its stop token and without the tags that the
        prompt has opened already. Raises TaskError when one holds text that the tokenizer lacks.
        """
        answers = [rest_of(self.opened(problem), text) for problem, text in zip(problems, texts, strict=True)]
        tokens = self._tokens(answers)
        for problem, text, ids in zip(problems, answers, tokens, strict=True):
            self._check_known(problem, text, ids)
        return [np.array([*ids, self.stop_token_ids[0]], np.int32) for ids in tokens]

    def knows(self, text: str, tokens: Sequence[int] | None = None) -> bool:
        """Whether the tokenizer has a token for all of a text (``tokens``, if they are at hand)."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return True
        # Trap: the unknown token may be the BOS or EOS too, which a template writes out: those are no unknown text.
        ids = self._tokens([text])[0] if tokens is None else tokens
        return ids.count(unknown) <= text.count(str(self.tokenizer.unk_token))

    def turn_rest(self) -> tuple[list[int], list[int]]:
        """The tokens that the chat template writes behind an answer: up to the special one that ends it, and after
        that. Both are empty where it writes none.
        """
        if not self.chats:
            return [], []
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            told = self._render(turns, Problem("prompt", 0, "?", ""), generation=False)
        except TaskError:
            return [], []
        _, found, rest = told.rpartition(_MARK)
        tokens, special = self._tokens([rest])[0] if found else [], _special_ids(self.tokenizer)
        end = next((place for place, token in enumerate(tokens, start=1) if token in special), 0)
        return (tokens[:end], tokens[end:]) if end else ([], [])

    # --- from the model ---

    def decode(self, tokens: Int32) -> str:
        """What the model said, without its stop token. Trap: tags such as <think> may be special tokens and must
        stay.
        """
        ids = tokens.tolist()
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def opened(self, problem: Problem) -> str:
        """What the end of the prompt has begun of the answer: from `<think>` on, closed or not; mostly empty."""
        if self.chats:
            _, tag, rest = self._generation_prompt.partition("<think>")
            return tag + rest
        return opened_by(problem.prompt)

    def answer_text(self, problem: Problem, tokens: Int32) -> str:
        """The whole answer for verifiers and readers: what the prompt opened, and what the model said."""
        return self.opened(problem) + self.decode(tokens)

    # --- to a checkpoint ---

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer as it is used here, and this list of stop tokens into generation_config.json and
        config.json where they stand in ``folder``.
        """
        self.tokenizer.save_pretrained(folder)
        ids = list(self.stop_token_ids)
        for name in ("generation_config.json", "config.json"):
            file = folder / name
            if file.is_file():
                settings = json.loads(file.read_text(encoding="utf-8"))
                settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
                file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / TASK_FILE).write_text(json.dumps({"template": self.task_template}) + "\n", encoding="utf-8")

    # --- the rules behind them ---

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def _check_known(self, problem: Problem, text: str, tokens: Sequence[int]) -> None:
        if not self.knows(text, tokens):
            raise unknown_text(problem, text)

    def _render(self, messages: Sequence[dict[str, str]], problem: Problem, generation: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
        except TemplateError as error:
            raise refused(
                problem, f"the chat template refuses its messages ({error}); mend them, or see prompt.system and "
                "prompt.template_kwargs"
            ) from None  # fmt: skip

    def _rendered_generation_prompt(self) -> str:
        """What the template writes after the user's turn to have the answer begin."""
        turn, none = [{"role": "user", "content": _MARK}], Problem("prompt", 0, _MARK, "")
        without, whole = self._render(turn, none, generation=False), self._render(turn, none)
        differs = (i for i, (a, b) in enumerate(zip(without, whole, strict=False)) if a != b)
        return whole[next(differs, len(without)) :]

    def _check_template(self, model_dir: Path) -> None:
        """Raise ValueError where the chat template writes a token that was added without a row for it."""
        turn = self._render([{"role": "user", "content": _MARK}], Problem("prompt", 0, _MARK, ""))
        beyond = [i for i in self._tokens([turn])[0] if self._rows and i >= self._rows]
        if beyond:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise ValueError(
                f"model.path={model_dir}: the chat template writes {token!r}, token {beyond[0]}, but the model has "
                f"{self._rows} (vocab_size); resize its embedding, or take prompt.chat=never"
            )

    def _turn_end(self) -> int | None:
        """The special token that the template writes after an answer, where it does."""
        until_end, _ = self.turn_rest()
        return until_end[-1] if until_end else None

    def _stop_ids(self, model_dir: Path) -> tuple[int, ...]:
        ends: list[Any] = [self._turn_end(), self.tokenizer.eos_token_id]
        for name in ("generation_config.json", "config.json"):
            file = model_dir / name
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            eos = settings.get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]
        known = (int(end) for end in ends if end is not None)
        ids = tuple(dict.fromkeys(end for end in known if not self._rows or end < self._rows))
        if not ids:
            raise ValueError(
                f"model.path={model_dir}: neither generation_config.json, config.json nor the tokenizer names an eos "
                "token that the model has; add eos_token_id to its generation_config.json"
            )
        return ids


def _rows(model_dir: Path) -> int:
    """Tokens that the model has, by its config.json; 0: it does not say."""
    file = model_dir / "config.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("vocab_size") or 0) if file.is_file() else 0


def _special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _tokens_of_text(tokenizer: Any) -> int:
    """From this id on, no token of the tokenizer is more than a special one."""
    special = _special_ids(tokenizer)
    return max((i + 1 for i in tokenizer.get_vocab().values() if i not in special), default=0)


def with_defaults(template: str, prompt: PromptConfig) -> str:
    """A chat template (Jinja) that begins with the system prompt and the keywords of ``prompt`` where its caller gives
    none, and takes TODAY for the date.
    """
    # Trap: each line ends in a block and a newline, which transformers' trim_blocks removes, so that the template
    # itself still begins at the beginning of a line.
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in prompt.template_kwargs.items()
    ]
    if prompt.system:
        first = _literal({"role": "system", "content": prompt.system})
        lines.append(
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{%- set messages = [{first}] + (messages | list) %}}{{%- endif %}}\n"
        )
    if formats := [match[1] for match in _STRFTIME.findall(template)]:
        dates = _literal({form: TODAY.strftime(form) for form in formats})
        told = f"{dates}.get(format, {_literal(TODAY.isoformat())})"
        lines.append(f"{{%- macro strftime_now(format) %}}{{{{- {told} }}}}{{%- endmacro %}}\n")
    head = "".join(lines)
    return template if template.startswith(head) else head + template


def saved_template(folder: Path) -> str:
    """How the task wrote its prompts, where a checkpoint says it."""
    file = folder / TASK_FILE
    return str(json.loads(file.read_text(encoding="utf-8"))["template"]) if file.is_file() else "{prompt}"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _wants_chat(tokenizer: Any, prompt: PromptConfig, model_dir: Path) -> bool:
    """Whether prompts go through the chat template. ValueError where that is asked for and there is none."""
    if prompt.chat == "never":
        return False
    if tokenizer.chat_template:
        return True
    if reason := without_template(prompt, model_dir):
        raise ValueError(reason)
    return False


def added_in_front(tokenizer: Any) -> list[int]:
    """The special tokens, such as BOS, that a tokenizer puts before a text when it is asked to add them."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:start])


def _set_bos(tokenizer: Any, bos: str, model_dir: Path) -> None:
    """Make the tokenizer put a BOS before a text, or none, when it is asked to add special tokens."""
    begins = tokenizer.bos_token_id in added_in_front(tokenizer)
    if bos == "auto" or begins == (bos == "always"):
        return
    if tokenizer.bos_token_id is None:
        raise ValueError(without_bos(model_dir))
    tokenizer.add_bos_token = bos == "always"


def opened_by(prompt: str) -> str:
    """What the end of a plain prompt has begun of the answer; see Text.opened."""
    match = _OPENED.search(prompt)
    return match[0] if match else ""


def rest_of(opened: str, answer: str) -> str:
    """A whole answer without the think tag that the prompt has opened, or without the block that it has closed."""
    if "</think>" in opened:
        return re.sub(r"\A\s*<think>.*?</think>\s*", "", answer, flags=re.DOTALL)
    return re.sub(r"\A\s*<think>", "", answer) if opened else answer
