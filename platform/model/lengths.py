"""How many tokens prompts take, counted in a process of its own: transformers is slow to import, and large.

launcher/prompts.py ── Asked ──► python -m offtrail.platform.model.lengths ──► a length, or what is wrong, of each
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from offtrail.core.problem import Problem
from offtrail.platform.config.schema import PromptConfig
from offtrail.tasks.base import TaskError


@dataclass
class Asked:
    """Prompts for the tokenizer of a Hugging Face folder; ``answered``: with their answers, as they are imitated."""

    folder: str
    prompt: PromptConfig
    problems: list[Problem]
    answered: bool = False


def lengths(asked: Asked) -> list[int | str]:
    """Of each problem its tokens, or why it has none. Empty where the process failed: the roles, which
    have the same to do, say why.
    """
    command = [sys.executable, "-m", "offtrail.platform.model.lengths"]
    done = subprocess.run(command, input=msgspec.msgpack.encode(asked), capture_output=True, check=False)
    try:
        return [] if done.returncode else msgspec.msgpack.decode(done.stdout, type=list[int | str])
    except msgspec.MsgspecError:  # a library has printed into it
        return []


def count(asked: Asked) -> list[int | str]:
    """The same, here."""
    from offtrail.platform.model.text import Text

    text = Text(Path(asked.folder), asked.prompt)

    def one(problem: Problem) -> int | str:
        try:
            tokens = len(text.encode(problem))
            return tokens + len(text.encode_answers([problem], [problem.answer])[0]) if asked.answered else tokens
        except TaskError as error:
            return str(error)

    return [one(problem) for problem in asked.problems]


def main() -> None:
    """Asked in, lengths out."""
    asked = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Asked)
    sys.stdout.buffer.write(msgspec.msgpack.encode(count(asked)))


if __name__ == "__main__":
    main()
