"""JSON: one object a line, or one array of objects, read strictly, since what is guessed here is trained on.

Rows come one by one, and what was read is not held: a file may be larger than memory. A line that is no object, holds a
key twice, or a number that is none (NaN, Infinity) is an error with its number. A file of another kind is called what
it is, with the command that makes lines of it. Numbers keep the value that is written: whole ones are int, the others
Decimal.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NoReturn

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
HEAD = 1024
"""Bytes of a file by which it is told what it is."""
PIECE = 1 << 20
"""Bytes of an array that are read at a time; of an object that is longer as many again, until it is whole."""
WHITE = b" \t\n\r"
BLANKS = re.compile(r"[ \t\n\r]*")
Opened = Callable[[], IO[bytes]]
"""The file, from its beginning and without its compression, at each call."""
ROWS_OF_JSON = "rows = json.load(open(sys.argv[1]))"
ROWS_OF_TABLE = "import csv; rows = csv.DictReader(open(sys.argv[1]), delimiter={delimiter!r})"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a set. ``number``: its line, or its row, from 1; ``place``: as errors name it, such as `line 3`."""

    number: int
    place: str
    fields: dict[str, Any]


def read_objects(opened: Opened, path: Path, key: str) -> Iterator[Row]:
    """Each line that is not blank, or each object of one array. Raises TaskError that opens with ``key=path``, and what
    reading raises.
    """
    with opened() as file:
        head = file.read(HEAD)
        _refuse_other_kinds(head, path, key)
        begins = head.removeprefix(BOM).lstrip(WHITE)
        while head and not begins:
            head = file.read(HEAD)
            begins = head.lstrip(WHITE)
    return (_array if begins[:1] == b"[" else _lines)(opened, path, key)


def _lines(opened: Opened, path: Path, key: str) -> Iterator[Row]:
    row: Row | None = None
    with opened() as file:
        lines = (line for piece in file for line in piece.splitlines())
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = Row(number, f"line {number}", _object(line.removeprefix(BOM) if number == 1 else line))
            except ValueError as error:
                _refuse_one_document(opened, path, key)
                raise TaskError(f"{key}={path}, line {number}: {error}") from None
            yield row
    if row is None:
        raise TaskError(f"{key}={path}: the file holds no lines; write one JSON object a line")


def _object(line: bytes) -> dict[str, Any]:
    try:
        return _as_object(DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON (byte {error.start + 1} of the line is no UTF-8); {MEND}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno}); {MEND}") from None
    except RecursionError:
        raise ValueError(f"not valid JSON (nested too deep); {MEND}") from None


def _array(opened: Opened, path: Path, key: str) -> Iterator[Row]:
    """Object by object."""
    number = 0
    with opened() as file:
        text = _Text(file)
        try:
            text.pass_over("[")
            while text.mark() != "]" or number:
                number += 1
                yield Row(number, f"row {number}", _as_object(text.value()))
                if (mark := text.mark()) not in (",", "]"):
                    raise text.error("Expecting ',' or ']' after it")
                if mark == "]":
                    break
                text.pass_over(",")
            text.pass_over("]")
            if text.mark():
                raise text.error("Extra data after the array")
        except UnicodeDecodeError as error:
            raise TaskError(f"{key}={path}: byte {text.decoded + error.start + 1} is no UTF-8; write UTF-8") from None
        except json.JSONDecodeError as error:
            why = f"{error.msg}, {text.where(error)}"
            raise TaskError(f"{key}={path}, row {number}: not valid JSON ({why}); mend the array") from None
        except RecursionError:
            raise TaskError(f"{key}={path}, row {number}: not valid JSON (nested too deep); mend the array") from None
        except ValueError as error:
            raise TaskError(f"{key}={path}, row {number}: {error}") from None
    if not number:
        raise TaskError(f"{key}={path}: the array holds nothing; write one object a problem")


class _Text:
    """The text of a file around the place that is next, ``decoded`` bytes of it so far. What was passed over is let go
    of when more is read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._read = self.decoded = 0
        self._text, self._at, self._whole = "", 0, False
        self._line, self._column = 1, 1
        """Where the text begins in the file."""

    def mark(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self._at = self._end_of_blanks()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._whole:
                return ""
            self._more(PIECE)

    def pass_over(self, mark: str) -> None:
        """The mark that is next."""
        assert self.mark() == mark
        self._at += 1

    def value(self) -> Any:
        """The value that is next. Raises JSONDecodeError, and what DECODER raises besides."""
        self.mark()
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError:
                if self._whole:
                    raise
                self._more(max(PIECE, len(self._text)))  # it may only be cut

    def error(self, what: str) -> json.JSONDecodeError:
        """``what`` is wrong at the place that is next."""
        return json.JSONDecodeError(what, self._text, self._at)

    def where(self, error: json.JSONDecodeError) -> str:
        """The place in the file of an error in the text."""
        column = error.colno + (self._column - 1 if error.lineno == 1 else 0)
        return f"line {self._line + error.lineno - 1} column {column}"

    def _end_of_blanks(self) -> int:
        found = BLANKS.match(self._text, self._at)
        assert found is not None
        return found.end()

    def _more(self, n: int) -> None:
        """Read ``n`` bytes more at most; with none the rest of the text is there."""
        piece = self._file.read(n)
        added = self._decoder.decode(piece, final=not piece)
        self._read += len(piece)
        self.decoded = self._read - len(self._decoder.getstate()[0])
        passed = self._text[: self._at]
        lines = passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed)
        self._line += lines
        self._text, self._at, self._whole = self._text[self._at :] + added, 0, not piece


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
MANGLED = re.compile(
    r"\x08(?:eta|inom|ar|egin|ig[a-z]*|oxed|oldsymbol|mod|ullet|ot|f|ecause|ackslash|etween)(?![a-z])"
    r"|\f(?:rac|orall|rak|rown)(?![a-z])"
)
"""What LaTeX with single backslashes becomes. Elsewhere control characters are text: a form feed ends a page of a PDF.
"""
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


def _refuse_other_kinds(head: bytes, path: Path, key: str) -> None:
    for begins, kind, way in OTHER_KINDS:
        if head.startswith(begins):
            raise TaskError(f"{key}={path}: is {kind}, not JSON lines; {_way_out(path, way)}")
    if b"\0" in head:
        what = "UTF-16 text without its mark, or no text at all"
        raise TaskError(f"{key}={path}: is {what}, not JSON lines; {_way_out(path, 'iconv -f UTF-16LE -t UTF-8')}")
    if path.suffix in (".csv", ".tsv") and head[:1] != b"{":
        way = ROWS_OF_TABLE.format(delimiter="\t" if path.suffix == ".tsv" else ",")
        raise TaskError(f"{key}={path}: is a table ({path.suffix}), not JSON lines; {_way_out(path, way)}")


def _refuse_one_document(opened: Opened, path: Path, key: str) -> None:
    """The whole file as one object over several lines is a common other form."""
    with opened() as file:
        content = file.read()
    if content.strip()[:1] != b"{":
        return
    lines = [line for line in content.splitlines() if line.strip()]
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
