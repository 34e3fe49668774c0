"""Sets in every form: what is read, in what order, and what is refused by file and row."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from offtrail.tasks import lines as lines_of_json
from offtrail.tasks import rows as rows_of_files
from offtrail.tasks.base import TaskError
from offtrail.tasks.examples import read_examples
from offtrail.tasks.jsonl import JsonlConfig, JsonlTask
from offtrail.tasks.rows import files_of, read_rows, rows_in

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"question": f"{i}+1=?", "answer": f"#### {i + 1}", "level": i, "share": 0.1, "note": None if i else "first"}
    for i in range(4)
]


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def arrow_file(path: Path, rows: Rows) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


FORMS: dict[str, Callable[[Path, Rows], object]] = {
    "lines.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "bom.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows)),
    "lines.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "array.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "pretty.json": lambda path, rows: path.write_text("\n" + json.dumps(rows, indent=2) + "\n"),
    "array.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "table.parquet": parquet,
    "table.arrow": arrow_file,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    FORMS[form](tmp_path / form, ROWS)
    rows = read_rows(tmp_path / form, "task.path")
    assert [row.fields for row in rows] == [row | {"share": Decimal("0.1")} for row in ROWS]
    assert [row.number for row in rows] == [1, 2, 3, 4]
    task = JsonlTask(JsonlConfig(path=str(tmp_path / form), held_out_share=0.0), 0)
    assert [problem.answer for problem in task.training()] == ["1", "2", "3", "4"]


def test_a_saved_dictionary_of_datasets_and_a_folder_of_the_hub_have_splits(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    hub = tmp_path / "hub"
    parquet(hub / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    parquet(hub / "data" / "train-00001-of-00002.parquet", ROWS[2:3])
    parquet(hub / "data" / "test-00000-of-00001.parquet", ROWS[3:])
    (hub / "README.md").write_text("a card")
    (hub / ".cache").mkdir()
    (hub / ".cache" / "train.jsonl").write_bytes(lines(ROWS))
    for folder in (tmp_path / "saved", hub):
        task = JsonlTask(JsonlConfig(path=str(folder), eval_path=str(folder)), 0)
        assert [problem.answer for problem in task.training()] == ["1", "2", "3"]
        assert [problem.answer for problem in task.held_out(1)] == ["4"]
    assert [row.place for row in read_rows(hub, "task.path")][1:] == [
        "data/train-00000-of-00002.parquet, row 2",
        "data/train-00001-of-00002.parquet, row 1",
    ]
    validation = hub / "data" / "test-00000-of-00001.parquet"
    validation.rename(hub / "data" / "validation.parquet")
    assert [file.name for file in files_of(hub, "task.eval_path")] == ["validation.parquet"]


def test_a_folder_with_one_split_is_read_whole_by_any_key(tmp_path: Path) -> None:
    parquet(tmp_path / "test.parquet", ROWS)
    assert len(read_rows(tmp_path, "task.path")) == len(read_rows(tmp_path, "task.eval_path")) == 4


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ((), "the folder holds no Parquet, Arrow or JSON file; name one that does"),
        (("test.parquet", "other.parquet"), "has no train split, but (no split), test; name the folder or file"),
        (("main/train.parquet", "socratic/train.parquet"), "the folder holds several sets: main, socratic; name one"),
        (("train.parquet", "train.jsonl"), "holds its split in several forms (jsonl, parquet); name one"),
        (("train-00001-of-00003.parquet",), "holds 1 of 3 files "),
        (("train-00000-of-00001.parquet", "train-00000-of-00002.parquet"), "holds 1 of 2 files "),
    ],
)
def test_a_folder_that_leaves_open_what_is_meant_is_refused(tmp_path: Path, files: tuple[str], complaint: str) -> None:
    for name in files:
        parquet(tmp_path / name, ROWS)
    with pytest.raises(TaskError, match=re.escape(f"task.path={tmp_path}: {complaint}")):
        read_rows(tmp_path, "task.path")


def bad_bytes(path: Path, rows: Rows) -> None:
    text = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": text, "answer": ["#### 1", "#### 2"]}), path)


DAMAGED: dict[str, tuple[Callable[[Path, Rows], object], str]] = {
    "cut.parquet": (lambda path, rows: path.write_bytes(b"PAR1" + b"\0" * 40), ": cannot be read as Parquet ("),
    "cut.arrow": (lambda path, rows: path.write_bytes(b"ARROW1" + b"\0" * 40), ": cannot be read as Arrow ("),
    "cut.gz": (lambda path, rows: path.write_bytes(gzip.compress(lines(rows))[:-9]), ": is cut or damaged ("),
    "empty.parquet": (
        lambda path, rows: pyarrow.parquet.write_table(pyarrow.table({"question": pyarrow.array([], "str")}), path),
        ": the file holds no rows; name one that does",
    ),
    "twice.parquet": (
        lambda path, rows: pyarrow.parquet.write_table(
            pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["question", "question"]), path
        ),
        ": the column 'question' is given twice; keep one",
    ),
    "bytes.parquet": (bad_bytes, ", row 2: 'utf-8' codec can't decode"),
    "empty.json": (lambda path, rows: path.write_text("[ ]"), ": the array holds nothing; write one object"),
    "numbers.json": (lambda path, rows: path.write_text("[1, 2]"), ", row 1: holds int, not an object"),
    "cut.json": (lambda path, rows: path.write_text('[{"a": 1}, {"a": '), ", row 2: not valid JSON (Expecting value,"),
    "comma.json": (lambda path, rows: path.write_text('[{"a": 1} {"a": 1}]'), ", row 1: not valid JSON (Expecting ','"),
    "after.json": (lambda path, rows: path.write_text('[{"a": 1}] x'), ", row 1: not valid JSON (Extra data after"),
    "key.json": (lambda path, rows: path.write_text('[{"a": 1, "a": 2}]'), ", row 1: the key 'a' is given twice"),
    "nan.json": (lambda path, rows: path.write_text('[{"a": NaN}]'), ", row 1: NaN is no number in JSON"),
    "deep.json": (lambda path, rows: path.write_text('[{"a": ' + "[" * 100_000), ", row 1: not valid JSON (nested too"),
}


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
def test_an_array_is_the_same_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Pieces end within blanks, marks, escapes, numbers and characters of several bytes."""
    monkeypatch.setattr(lines_of_json, "PIECE", piece)
    made = [{"a": 'é“\\n\\"', "n": 12.5e3, "b": [1, {"c": None}]}, {"a": "x" * 50}, {}]
    for text in (json.dumps(made), json.dumps(made, indent=3, ensure_ascii=False), "\ufeff \r\n" + json.dumps(made)):
        path = tmp_path / "array.json"
        path.write_text(text)
        found = read_rows(path, "task.path")
        assert [(row.number, row.place, row.fields) for row in found] == [
            (i, f"row {i}", one) for i, one in enumerate(made, start=1)
        ]
    for text, complaint in (
        ('[{"a": 1},\n {"é": 2}\n, {"b": x}]', ", row 3: not valid JSON (Expecting value, line 3 column 9)"),
        ('[\n{"a": "1"}\n\n 3.5]', ", row 1: not valid JSON (Expecting ',' or ']' after it, line 4 column 2)"),
        ('[{"a": 1}]\n\n  [', ", row 1: not valid JSON (Extra data after the array, line 3 column 3)"),
        ('[{"a": 1}, {"é": "', ", row 2: not valid JSON (Unterminated string starting at, line 1 column 18)"),
        ('[{"a": 1}, 17]', ", row 2: holds int, not an object"),
    ):
        path.write_text(text)
        with pytest.raises(TaskError, match=re.escape(f"task.path={path}{complaint}")):
            read_rows(path, "task.path")
    path.write_bytes('[{"é": "'.encode() + b'\xff"}]')
    with pytest.raises(TaskError, match=re.escape(f"task.path={path}: byte 10 is no UTF-8")):
        read_rows(path, "task.path")


@pytest.mark.parametrize("form", FORMS)
def test_rows_come_before_the_file_is_read_to_its_end(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the last row is found there."""
    monkeypatch.setattr(lines_of_json, "PIECE", 64)
    monkeypatch.setattr(rows_of_files, "PIECE", 2)
    FORMS[form](tmp_path / form, ROWS)
    rows = rows_in(tmp_path / form, "task.path")
    assert next(rows).fields["question"] == "0+1=?"
    assert [row.fields["question"] for row in rows] == [f"{i}+1=?" for i in (1, 2, 3)]
    if form in ("lines.jsonl", "array.json"):
        path = tmp_path / form
        path.write_bytes(path.read_bytes()[:-20])
        rows = rows_in(path, "task.path")
        assert [next(rows).number for _ in range(3)] == [1, 2, 3]
        with pytest.raises(TaskError, match="not valid JSON"):
            next(rows)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_one_line_with_the_file_and_the_row(tmp_path: Path, name: str) -> None:
    make, complaint = DAMAGED[name]
    make(tmp_path / name, ROWS)
    with pytest.raises(TaskError) as caught:
        read_rows(tmp_path / name, "task.path")
    assert str(caught.value).startswith(f"task.path={tmp_path}/{name}{complaint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "bom.jsonl"])
@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": None, "answer": "#### 4"}, "field 'question' is null; fill it"),
        ({"question": " ", "answer": "#### 4"}, "field 'question' is empty"),
        ({"question": "\\frac", "answer": "it is 4"}, "no answer: 'answer' lacks the mark '####'"),
        ({"question": "\frac", "answer": "#### 4"}, "field 'question' holds a control character"),
    ],
)
def test_every_form_has_the_same_refusals(tmp_path: Path, form: str, row: dict[str, Any], complaint: str) -> None:
    FORMS[form](tmp_path / form, [ROWS[0], row | {key: ROWS[1][key] for key in ("level", "share", "note")}])
    where = r".*, (line 2|row 2|data-\S+\.arrow, row 1): "
    with pytest.raises(TaskError, match=re.escape(f"task.path={tmp_path}/{form}") + where + re.escape(complaint)):
        JsonlTask(JsonlConfig(path=str(tmp_path / form)), 0)


def test_messages_and_numbers_of_a_table(tmp_path: Path) -> None:
    """A struct has every field in every row, null where there is none; a float32 is the number that was written."""
    messages = [{"role": "user", "content": "1/10?", "name": None}]
    table = pyarrow.Table.from_pylist([{"turns": messages, "answer": 0.1}] * 2)
    table = table.set_column(1, "answer", table.column("answer").cast(pyarrow.float32()))
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    config = JsonlConfig(path=str(tmp_path / "chat.parquet"), messages_field="turns", answer_after="", held_out_share=0)
    problem = JsonlTask(config, 0).train(0)
    assert problem.messages == ({"role": "user", "content": "1/10?"},)
    assert problem.answer == "0.1"
    nan = pyarrow.table({"question": ["q"], "answer": [float("nan")]})
    pyarrow.parquet.write_table(nan, tmp_path / "nan.parquet")
    with pytest.raises(TaskError, match=r"nan.parquet, row 1: field 'answer' is NaN, no number; mend"):
        JsonlTask(JsonlConfig(path=str(tmp_path / "nan.parquet"), answer_after=""), 0)


def test_examples_to_imitate_come_in_every_form(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}])
    found = read_examples(tmp_path / "train.parquet", "prompt", "answer")
    assert [(one.prompt, one.answer, one.index, one.meta) for one in found] == [
        ("1+1=", "2", 1, {"place": "row 1"}),
        ("1+2=", "3", 2, {"place": "row 2"}),
    ]
    parquet(tmp_path / "train.parquet", [{"prompt": "1+1=", "answer": None}])
    with pytest.raises(TaskError, match=r"sft.path=.*, train.parquet, row 1: field 'answer' is null"):
        read_examples(tmp_path, "prompt", "answer")
