"""The rows of a set in its usual forms: JSON lines or one JSON array (plain or gzip), Parquet, Arrow, and folders of
such files as `datasets` saves them and the hub holds them. What a file is, its first bytes say. All forms meet in one
Row, so that they have the same checks and refusals.

    tasks/jsonl.py, tasks/examples.py ─► rows_in ─► files_of (a folder's split) ─► lines.py, or pyarrow

Rows come one by one: of a file no more is held than a piece.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from offtrail.tasks.base import TaskError
from offtrail.tasks.lines import Row, read_objects

SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Words in the path of a file that say which split it is of, as the Hugging Face hub reads them."""
EVALUATED = ("eval_path", "decontaminate_against")
"""Ends of the keys that want a folder's test split, or its validation split; all others want train."""
DATA_FILE = re.compile(r"(?!cache-|dataset_infos?\.|dataset_dict\.|state\.).*\.((?:parquet|arrow|jsonl?)(?:\.gz)?)")
SHARD = re.compile(r"(?P<stem>.*)-\d+-of-(?P<total>\d+)\.")
PARQUET, ARROW = b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")
GZIP = b"\x1f\x8b"
PIECE = 1024
"""Rows that are made Python values at a time."""


def read_rows(path: Path, key: str) -> list[Row]:
    """All of ``rows_in``."""
    return list(rows_in(path, key))


def rows_in(path: Path, key: str) -> Iterator[Row]:
    """The rows of a file, or of a folder's split, in the order of the files' names. Raises TaskError that opens with
    ``key=path`` and names file and row.
    """
    if not path.is_dir():
        yield from _rows(path, key)
        return
    number = 0
    for file in files_of(path, key):
        for row in _rows(file, key):
            number += 1
            yield Row(number, f"{file.relative_to(path)}, {row.place}", row.fields)


def files_of(path: Path, key: str) -> list[Path]:
    """The files that ``key=path`` reads: the file itself, or those of the folder's split. Raises TaskError where it
    cannot be said which.
    """
    if not path.is_dir():
        return [path]
    splits = defaultdict[str, list[Path]](list)
    for file in sorted(chain.from_iterable(path.glob(depth) for depth in ("*", "*/*", "*/*/*"))):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if DATA_FILE.fullmatch(file.name) and not hidden and file.is_file():
            splits[split_of(file.relative_to(path))].append(file)
    if not splits:
        raise TaskError(f"{key}={path}: the folder holds no Parquet, Arrow or JSON file; name one that does")
    wanted = ("test", "validation") if key.endswith(EVALUATED) else ("train",)
    split = next(iter(splits)) if len(splits) == 1 else next((name for name in wanted if name in splits), None)
    if split is None:
        names = ", ".join(name or "(no split)" for name in splits)
        raise TaskError(f"{key}={path}: has no {wanted[0]} split, but {names}; name the folder or file of one of them")
    _refuse_a_mixture(splits[split], path, key)
    return splits[split]


def split_of(file: Path) -> str:
    """The split that a path within a folder names last, such as train for main/train-00000-of-00001.parquet; or ""."""
    words = re.findall("[a-z]+", str(file.parent / file.name.partition(".")[0]).lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


def _refuse_a_mixture(files: list[Path], path: Path, key: str) -> None:
    """Several sets in one folder, one set in several forms, or a part of one."""
    sets, totals = set[str](), defaultdict[tuple[str, str], list[Path]](list)
    for file in files:
        parts = file.relative_to(path).parts[:-1]
        sets.add("/".join(part for part in parts if part != "data" and part.lower() not in SPLITS))
        if shard := SHARD.match(str(file)):
            totals[shard["stem"], shard["total"]].append(file)
    if len(sets) > 1:
        names = ", ".join(name or "files of its own" for name in sorted(sets))
        raise TaskError(f"{key}={path}: the folder holds several sets: {names}; name one of them")
    forms = sorted({match[1] for file in files if (match := DATA_FILE.fullmatch(file.name))})
    if len(forms) > 1:
        raise TaskError(f"{key}={path}: holds its split in several forms ({', '.join(forms)}); name one file")
    for (stem, total), shards in totals.items():
        if len(shards) != int(total):
            raise TaskError(f"{key}={path}: holds {len(shards)} of {int(total)} files {stem}-*-of-{total}; fetch all")


def _rows(file: Path, key: str) -> Iterator[Row]:
    try:
        with file.open("rb") as data:
            begins = data.read(8)
    except OSError as error:
        raise TaskError(f"{key}={file}: {error.strerror or error}; name a readable file of rows") from error
    if begins.startswith((PARQUET, *ARROW)):
        yield from _table_rows(file, key, "Parquet" if begins.startswith(PARQUET) else "Arrow")
        return
    try:
        yield from read_objects(partial(_opened, file, packed=begins.startswith(GZIP)), file, key)
    except (EOFError, OSError, zlib.error) as error:
        raise TaskError(f"{key}={file}: is cut or damaged ({error}); fetch it again") from None


def _opened(file: Path, *, packed: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if packed else file.open("rb")


def _table_rows(file: Path, key: str, form: str) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file."""
    import pyarrow  # slow to import, and needed by these forms alone

    number = 0
    try:
        with _batches(file, form) as (schema, batches):
            if twice := next((name for name in schema.names if schema.names.count(name) > 1), None):
                raise TaskError(f"{key}={file}: the column {twice!r} is given twice; keep one")
            single = [field.name for field in schema if field.type in (pyarrow.float16(), pyarrow.float32())]
            for batch in batches:
                table = pyarrow.Table.from_batches([batch])
                for name in single:  # as text they keep the digits that were written
                    place = schema.get_field_index(name)
                    table = table.set_column(place, name, table.column(place).cast(pyarrow.string()))
                for values in _values(table, number, file, key):
                    number += 1
                    values |= {name: Decimal(values[name]) for name in single if values[name] is not None}
                    yield Row(number, f"row {number}", {name: _plain(value) for name, value in values.items()})
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise TaskError(f"{key}={file}: cannot be read as {form} ({why}); fetch or write it again") from None
    if not number:
        raise TaskError(f"{key}={file}: the file holds no rows; name one that does")


@contextlib.contextmanager
def _batches(file: Path, form: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema of a table and its record batches, one after another."""
    import pyarrow
    import pyarrow.parquet

    if form == "Parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table.schema_arrow, table.iter_batches(PIECE)
        return
    with pyarrow.OSFile(str(file)) as data:
        stream = data.read(6) != ARROW[0]
        data.seek(0)
        if stream:
            reader = pyarrow.ipc.open_stream(data)
            yield reader.schema, iter(reader)
        else:
            reader = pyarrow.ipc.open_file(data)
            yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))


def _values(table: Any, before: int, file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Each row as Python values; ``before``: rows of the file that stand before them."""
    for start in range(0, table.num_rows, PIECE):
        piece = table.slice(start, PIECE)
        try:
            yield from piece.to_pylist()
        except ValueError:
            for number in range(piece.num_rows):
                try:
                    piece.slice(number, 1).to_pylist()
                except ValueError as error:
                    why = " ".join(str(error).split())
                    raise TaskError(f"{key}={file}, row {before + start + number + 1}: {why}; mend the row") from None
            raise


def _plain(value: Any) -> Any:
    """A value as JSON lines have it: fractions exact, and a field of a struct that is null is none."""
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value
