"""Examples to imitate: what a step's table holds, and which lines of a file are refused and how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.platform.learner.data import FileExamples
from offtrail.platform.model.text import Text
from offtrail.tasks.base import TaskError
from offtrail.tasks.examples import read_examples


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def examples(path: Path, start: Path, *, batch: int = 2, longest: int = 64, drop: bool = False) -> FileExamples:
    lines = read_examples(path, "prompt", "answer")
    return FileExamples(lines, Text(start), batch_size=batch, seed=0, max_length=longest, drop=drop)


def answers(source: FileExamples, text: Text, step: int) -> list[str]:
    rows = source.table(step)
    return [text.decode(rows.tokens[a:b]) for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True)]


def test_each_epoch_is_a_permutation_of_the_file(tmp_path: Path, start_dir: Path) -> None:
    path, text = write(tmp_path / "f", *({"prompt": f"{i}+1=", "answer": str(i)} for i in range(5))), Text(start_dir)
    source = examples(path, start_dir)
    seen = [answer for step in range(5) for answer in answers(source, text, step)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list("01234")
    assert seen[:5] != seen[5:]
    rows = source.table(3)
    assert np.array_equal(rows.tokens, source.table(3).tokens)
    assert rows.tokens[rows.starts[1] - 1] == text.stop_token_ids[0]
    assert text.decode(rows.prompts[0]).removesuffix("+1=") == seen[6]


def test_long_lines_are_refused_by_name_or_left_out_and_counted(tmp_path: Path, start_dir: Path) -> None:
    """`12+34=` is 6 tokens, and `46` with its stop token 3: 9."""
    path = write(tmp_path / "f", {"prompt": "1=", "answer": "1"}, "", {"prompt": "12+34=", "answer": "46"})
    assert examples(path, start_dir, longest=9).dropped == 0
    with pytest.raises(TaskError, match=r"f, line 3: .* take 9 tokens, more than model\.max_length=8 \(1 of 2"):
        examples(path, start_dir, longest=8)
    source = examples(path, start_dir, longest=8, drop=True)
    assert source.dropped == 1
    assert answers(source, Text(start_dir), 7) == ["1", "1"]
    with pytest.raises(TaskError, match=r"all 2 examples are longer than model\.max_length=3"):
        examples(path, start_dir, longest=3, drop=True)


MESSAGES = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def test_a_line_may_hold_messages_whose_last_is_the_answer(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f",
        {"messages": MESSAGES},
        {"prompt": MESSAGES[:1], "answer": "2"},
        {"messages": MESSAGES[:1], "answer": "2"},
    )
    for line in read_examples(path, "prompt", "answer"):
        assert line.messages == (MESSAGES[0],)
        assert line.answer == "2"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: holds list, not an object"),
        ({"prompt": "1="}, "line 2: field 'answer' is missing (fields: 'prompt'); mend"),
        ({"prompt": None, "answer": "1"}, "line 2: field 'prompt' is null (fields: 'prompt', 'answer'); mend"),
        ({"prompt": " ", "answer": "1"}, "line 2: field 'prompt' is empty"),
        ({"prompt": 3, "answer": "1"}, "line 2: field 'prompt' is not text"),
        ({"messages": [{"role": "robot", "content": ""}]}, "line 2: messages must be a list of"),
        ({"messages": MESSAGES[:1]}, "line 2: field 'answer' is missing"),
        ({"prompt": "1=", "answer": "1\ud83d"}, "line 2: field 'answer' holds half a surrogate pair"),
        ({"prompt": "1\frac=", "answer": "1"}, "line 2: field 'prompt' holds a control character"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "line 2: a message's content holds half a surr"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    path = write(tmp_path / "f", {"prompt": "1=", "answer": "1"}, line)
    with pytest.raises(TaskError, match=re.escape(f"sft.path={path}, {complaint}")):
        read_examples(path, "prompt", "answer")


@pytest.mark.parametrize("code", range(0x20))
def test_what_json_can_hold_an_example_can(tmp_path: Path, code: int) -> None:
    """Text out of PDFs, terminals and chats has such characters; refused is what LaTeX becomes."""
    text = f"one{chr(code)}two{chr(code)}"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    one, two = read_examples(
        write(tmp_path / "f", {"prompt": text, "answer": text}, {"messages": turns}), "prompt", "answer"
    )
    assert (one.prompt, one.answer, two.messages[0]["content"], two.answer) == (text, text, text, text)
    for command in ("beta", "binom{n}", "bar x", "boxed{1}", "bigl(", "bf x", "frac12", "forall"):
        with pytest.raises(TaskError, match="holds a control character, which is what"):
            read_examples(
                write(tmp_path / "g", {"prompt": "1", "answer": json.loads(f'"$\\{command}$"')}), "prompt", "answer"
            )


def test_a_file_that_is_not_there_or_empty_and_text_that_the_tokenizer_lacks(tmp_path: Path, start_dir: Path) -> None:
    with pytest.raises(TaskError, match="No such file or directory; name a readable"):
        read_examples(tmp_path / "none", "prompt", "answer")
    with pytest.raises(TaskError, match="the file holds no lines"):
        read_examples(write(tmp_path / "f", ""), "prompt", "answer")
    with pytest.raises(TaskError, match=r"^sft\.path=.*/g, line 1: the tokenizer does not know all of 'Größe'"):
        examples(write(tmp_path / "g", {"prompt": "Größe", "answer": "1"}), start_dir)
