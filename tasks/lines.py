"""JSON: one object a line, or one array of objects, read strictly, since what is guessed here is trained on.

A line that is no object, holds a key twice, or a number that is none (NaN, Infinity) is an error with its number. A
file of another kind is called what it is, with the command that makes lines of it. Numbers keep the value that is
written: whole ones are int, the others Decimal.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from offtrail.tasks.base import TaskError

OTHER_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the data", "git lfs pull --include"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "unzstd"),
    (b"BZh", "compressed (bzip2)", "bunzip2"),
    (b"\xfd7zXZ", "compressed (xz)", "unxz"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
)
"""How a file of another kind begins, what it is, and what makes lines, or plain bytes, of it."""
BOM = b"\xef\xbb\xbf"
ROWS_OF_JSON = "rows = json.load(open(sys.argv[1]))"
ROWS_OF_TABLE = "import csv; rows = csv.DictReader(open(sys.argv[1]), delimiter={delimiter!r})"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a set. ``number``: its line, or its row, from 1; ``place``: as errors name it, such as `line 3`."""

    number: int
    place: str
    fields: dict[str, Any]


def read_objects(content: bytes, path: Path, key: str) -> list[Row]:
    """Each line that is not blank, or each object of one array. Raises TaskError that opens with ``key=path``."""
    _refuse_other_kinds(content, path, key)
    if content.removeprefix(BOM).lstrip()[:1] == b"[":
        return list(_array(content, path, key))
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines:
        raise TaskError(f"{key}={path}: the file holds no lines; write one JSON object a line")
    rows = []
    for number, line in lines:
        try:
            rows.append(Row(number, f"line {number}", _object(line.removeprefix(BOM) if number == 1 else line)))
        except ValueError as error:
            _refuse_one_document(content, lines, path, key)
            raise TaskError(f"{key}={path}, line {number}: {error}") from None
    return rows


def _object(line: bytes) -> dict[str, Any]:
    try:
        return _as_object(DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON (byte {error.start + 1} of the line is no UTF-8); {MEND}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno}); {MEND}") from None
    except RecursionError:
        raise ValueError(f"not valid JSON (nested too deep); {MEND}") from None


def _array(content: bytes, path: Path, key: str) -> Iterator[Row]:
    """Object by object, so that an error has its number."""
    number = 0
    try:
        text = content.decode("utf-8-sig")
        at = skip(text, text.index("[") + 1)
        while text[at : at + 1] != "]" or number:
            number += 1
            value, at = DECODER.raw_decode(text, at)
            yield Row(number, f"row {number}", _as_object(value))
            at = skip(text, at)
            if (mark := text[at : at + 1]) not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after it", text, at)
            if mark == "]":
                break
            at = skip(text, at + 1)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the array", text, at + 1)
    except UnicodeDecodeError as error:
        raise TaskError(f"{key}={path}: byte {error.start + 1} is no UTF-8; write UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise TaskError(f"{key}={path}, row {number}: not valid JSON ({error.msg}, {where}); mend the array") from None
    except RecursionError:
        raise TaskError(f"{key}={path}, row {number}: not valid JSON (nested too deep); mend the array") from None
    except ValueError as error:
        raise TaskError(f"{key}={path}, row {number}: {error}") from None
    if not number:
        raise TaskError(f"{key}={path}: the array holds nothing; write one object a problem")


def skip(text: str, at: int) -> int:
    """The place of the first character from ``at`` on that is no blank of JSON."""
    return next((place for place in range(at, len(text)) if text[place] not in " \t\n\r"), len(text))


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not an object; write {{…}} with the fields, or delete it")
    return value


def check_text(text: str, where: str) -> None:
    """Raise TaskError that opens with ``where`` (file, line and field) where a text has a fault."""
    if fault := fault_of(text):
        raise TaskError(f"{where} {fault}")


def fault_of(text: str) -> str:
    """What a text holds that nothing is to be trained on, and the way out; empty where it is fine."""
    if HALF.search(text):
        return "holds half a surrogate pair, which is no text; mend or delete the line"
    if MANGLED.search(text):
        return 'holds a control character, which is what "\\frac" or "\\beta" means in JSON; write LaTeX as "\\\\frac"'
    return ""


HALF = re.compile("[\ud800-\udfff]")
MANGLED = re.compile(r"[\b]|\f(?:rac|orall|rak|rown)(?![a-z])")
"""What LaTeX with single backslashes becomes. A form feed elsewhere is a page's end, as in text out of a PDF."""
MEND = "write one object a line, or delete the line"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; write one, or delete the line")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one")
    return found


DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_no_number, object_pairs_hook=_once)


def _refuse_other_kinds(content: bytes, path: Path, key: str) -> None:
    for begins, kind, way in OTHER_KINDS:
        if content.startswith(begins):
            raise TaskError(f"{key}={path}: is {kind}, not JSON lines; {_way_out(path, way)}")
    if b"\0" in content[:1024]:
        what = "UTF-16 text without its mark, or no text at all"
        raise TaskError(f"{key}={path}: is {what}, not JSON lines; {_way_out(path, 'iconv -f UTF-16LE -t UTF-8')}")
    if path.suffix in (".csv", ".tsv") and content[:1] != b"{":
        way = ROWS_OF_TABLE.format(delimiter="\t" if path.suffix == ".tsv" else ",")
        raise TaskError(f"{key}={path}: is a table ({path.suffix}), not JSON lines; {_way_out(path, way)}")


def _refuse_one_document(content: bytes, lines: Sequence[tuple[int, bytes]], path: Path, key: str) -> None:
    """The whole file as one object over several lines is a common other form."""
    if content.strip()[:1] != b"{":
        return
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(whole, dict) and len(lines) > 1:
        inside = [name for name, rows in whole.items() if isinstance(rows, list)]
        way = _way_out(path, f"{ROWS_OF_JSON}[{(inside or ['FIELD'])[0]!r}]")
        raise TaskError(f"{key}={path}: is one JSON object over {len(lines):,} lines, not JSON lines; {way}")


def _way_out(path: Path, way: str) -> str:
    """The command, for a shell."""
    if "rows" not in way:
        return f"make it plain first: {way} {shlex.quote(str(path))}"
    code = f"import json, sys; {way}; [print(json.dumps(row, default=str)) for row in rows]"
    return f'convert it: python -c "{code}" {shlex.quote(str(path))} > {shlex.quote(path.stem)}.lines.jsonl'
