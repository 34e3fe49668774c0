"""job=reject as a whole, without a model: what it leaves in its run directory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.rundir import prepare
from offtrail.platform.launcher.command import main, require_inputs
from offtrail.platform.launcher.reject import run_rejection
from offtrail.platform.launcher.spool import spooled
from offtrail.platform.runtime import contents
from offtrail.tasks import lines as lines_of_json
from offtrail.tasks import rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rejection(folder: Path, *keys: str, interrupted: tuple[int, ...] = ()) -> tuple[tuple[str, str], Path]:
    config = compose([f"run.dir={folder}", "run.name=kept", "job=reject", *keys])
    run_dir, lock = prepare(config)
    with lock:
        return run_rejection(config, run_dir, list(interrupted)), run_dir


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [{"prompt": f"what is {i} plus {i}?", "answer": f"it is {2 * i}", "reward": i % 2, "id": i} for i in range(40)]


def test_what_is_kept_is_mixed_with_other_data_by_their_share_and_says_where_it_is_from(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples.jsonl", ROWS)
    general = written(tmp_path / "general.jsonl", [{"q": f"say {i} in a word", "answer": "so"} for i in range(30)])
    against = written(tmp_path / "exam.jsonl", [{"problem": "say 7 in a word"}, {"question": "what is 3 plus 3?"}])
    mix = f"{{general: {{path: {general}, share: 0.25, prompt_field: q}}}}"
    keys = (f"reject.paths=[{samples}]", f"reject.mix={mix}", f"reject.decontaminate_against=[{against}]")
    outcome, run_dir = rejection(tmp_path, *keys)
    assert outcome == ("completed", "")
    made = lines(run_dir / "data.jsonl")
    kept, mixed = [one for one in made if "mix" not in one], [one for one in made if "mix" in one]
    assert [one["id"] for one in kept] == [i for i in range(40) if i % 2 and i != 3]
    assert len(mixed) == 6  # a quarter of 19 + 6, as nearly as rows can
    assert all(one["prompt"] != "say 7 in a word" for one in mixed)
    assert kept[0]["from"] == f"{samples}, line 2"
    about = json.loads((run_dir / "data.json").read_text())
    assert about["counts"]["rejected"] == {"wrong": 20, "contaminated": 1}
    assert about["counts"]["mixed_contaminated"] == {"general": 1}
    assert about["sources"] == {str(samples): {"rows": 40, "kept": 19}}
    assert set(about["inputs"]) == {"reject.paths", "reject.mix.general.path", "reject.decontaminate_against"}
    assert [one["reason"] for one in lines(run_dir / "rejected.jsonl")] == ["wrong", "contaminated"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["data/kept"], summary["data/lines"], summary["data/mixed"]) == (19, 25, {"general": 6})


def test_where_nothing_is_kept_it_says_why_and_shows_an_example_of_each(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples.jsonl", ROWS[:3])
    (status, why), run_dir = rejection(tmp_path, f"reject.paths=[{samples}]", "reject.longest=3")
    assert status == "failed"
    assert why.startswith(f"reject.paths=[{samples}]: none of 3 rows is kept: 2 wrong, 1 long; rejected.jsonl has one")
    assert [one["why"] for one in lines(run_dir / "rejected.jsonl")] == [
        "its reward is 0, lower than 1", "7 characters, more than 3",
    ]  # fmt: skip
    assert not (run_dir / "data.jsonl").exists()


@pytest.mark.parametrize(
    ("keys", "interrupted", "outcome"),
    [
        ((), (2,), ("interrupted", "stopped by signal 2; run.resume=true begins it anew")),
        (
            ("reject.mix.more={path: PATH, share: 0.9}",), (),
            ("failed", "reject.mix.more: its share is 9 rows, and its file has 2 that can be taken; lower the share, "
             "give a larger file, or say repeat: true"),
        ),
    ],
)  # fmt: skip
def test_an_end_before_the_end_leaves_no_data(
    tmp_path: Path, keys: tuple[str, ...], interrupted: tuple[int, ...], outcome: tuple[str, str]
) -> None:
    samples = written(tmp_path / "samples.jsonl", ROWS[:2])
    given = [key.replace("PATH", str(samples)) for key in keys]
    found, run_dir = rejection(tmp_path, f"reject.paths=[{samples}]", *given, interrupted=interrupted)
    assert found == outcome
    assert not (run_dir / "data.jsonl").exists()


def test_what_a_rejection_began_with_stands_under_its_own_name(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples.jsonl", ROWS)
    outcome, run_dir = rejection(tmp_path, f"reject.paths=[{samples}]")
    assert outcome == ("completed", "")
    assert set(json.loads((run_dir / "begun_with.json").read_text())) == {"reject.paths"}
    left = {"begun_with.json", "config.yaml", "data.json", "data.jsonl", "rejected.jsonl", "summary.json"}
    assert {path.name for path in run_dir.iterdir() if path.name[0] != "."} == left
    written(samples, ROWS[:3])
    (status, why), _ = rejection(tmp_path, f"reject.paths=[{samples}]", "run.resume=true")
    assert status == "failed"
    assert why.startswith("reject.paths: its files hold something else than when this rejection began")


def test_lines_on_disk_are_found_by_number(tmp_path: Path) -> None:
    with spooled(tmp_path) as spool:
        for number in (3, 0, 5):
            spool.put(number, f"line {number} with \ud83d and \u2028\n")
        assert [spool.line(number) for number in (5, 0, 3)] == [
            f"line {number} with \ud83d and \u2028\n" for number in (5, 0, 3)
        ]
        for missing in (1, 6, -1):
            with pytest.raises(KeyError):
                spool.line(missing)
        assert list(tmp_path.iterdir()) == []  # a kill leaves nothing


LONG_ROW = 4_000


def long_rows(folder: Path, form: str, n: int) -> Path:
    """``n`` rows of LONG_ROW characters and more, two answers to a question in two halves of the file, every third row
    wrong, some equal.
    """
    made = (
        {
            "prompt": f"what is {i % (n // 2)} plus 1, {'and so on ' * 10}?",
            "answer": f"{i % 7}{i % 5}" * (LONG_ROW // 2),  # one word: it is memory that is measured
            "reward": int(i % 3 > 0),
        }
        for i in range(n)
    )
    path = folder / f"{n}.{form}"
    if form == "parquet":
        with pq.ParquetWriter(path, pa.schema({"prompt": "string", "answer": "string", "reward": "int64"})) as file:
            while some := list(islice(made, 500)):
                file.write_table(pa.Table.from_pylist(some))
        return path
    opened = gzip.open if form.endswith("gz") else open
    with opened(path, "wt", encoding="utf-8") as file:  # type: ignore[operator]
        for i, row in enumerate(made):
            file.write((form == "json") * (",["[not i]) + json.dumps(row) + "\n")
        file.write((form == "json") * "]")
    return path


@pytest.mark.parametrize("form", [pytest.param("jsonl", marks=pytest.mark.prove), "jsonl.gz", "json", "parquet"])
def test_no_more_memory_is_held_for_more_rows_than_their_number_takes(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak of Python's own memory, with 9 times the rows; near copies are compared, and a file is mixed in."""
    for room, piece in ((contents, 1 << 14), (lines_of_json, 1 << 14), (rows, 32)):
        monkeypatch.setattr(room, "PIECE", piece)  # what is read at a time must not be more than the smaller file
    keys = ("reject.max_repetition=1", "reject.drop_unbalanced=false", "reject.near_duplicates=0.99")

    def peak(n: int) -> int:
        path = long_rows(tmp_path, form, n)
        mix = f"reject.mix={{more: {{path: {path}, share: 0.25}}}}"
        config = compose([f"run.dir={tmp_path}", f"run.name=r{n}", "job=reject", f"reject.paths=[{path}]", mix, *keys])
        run_dir, lock = prepare(config)
        tracemalloc.start()
        try:
            with lock:
                assert run_rejection(config, run_dir, []) == ("completed", "")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(100), peak(900)
    assert large - small < 800 * LONG_ROW / 4, f"{small:,} and {large:,} bytes"


@pytest.mark.parametrize(
    ("keys", "row", "says"),
    [
        (("reject.paths=[ROWS]",), {"promt": "2"}, "reject.paths=ROWS, line 2: field 'prompt' is missing"),
        (("reject.paths=[ROWS]",), {"prompt": "2", "answer": "1"}, "reject.paths=ROWS, line 2: has no reward"),
        (
            ("reject.paths=[FINE]", "reject.mix={more: {path: ROWS, share: 0.5}}"), {"prompt": "2"},
            "reject.mix.more.path=ROWS, line 2: field 'answer' is missing",
        ),
        (
            ("reject.paths=[FINE]", "reject.decontaminate_against=[ROWS]"), {"answer": "2"},
            "reject.decontaminate_against=ROWS, line 2: no field 'question'",
        ),
        (
            ("job=distill", "distill.teacher=ROWS"), {"prompt": "2", "answer": 1, "reward": 1},
            "job=distill, stage reject: reject.paths=ROWS, line 2: field 'answer' is not text",
        ),
        (
            ("job=rl", "recipe.stages={sift: {job: reject, reject: {paths: [ROWS]}}}"), {},
            "recipe.stages.sift: reject.paths=ROWS, line 2: field 'prompt' is missing",
        ),
    ],
)  # fmt: skip
def test_a_dry_run_reads_the_rows_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], row: dict[str, Any], says: str
) -> None:
    fine = {"prompt": "1", "answer": "1", "reward": 1}
    paths = {"ROWS": str(written(tmp_path / "rows.jsonl", [fine, row]))}
    paths["FINE"] = str(written(tmp_path / "fine.jsonl", [fine]))
    given = ["job=reject", *keys] if not keys[0].startswith("job=") else [*keys]
    for name, path in paths.items():
        given, says = [key.replace(name, path) for key in given], says.replace(name, path)
    given += [f"run.dir={tmp_path}/runs"]
    assert main([*given, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.startswith(f"offtrail: error: {says}")) == ("", True), told.err
    with pytest.raises(ConfigError) as error:
        require_inputs(compose(given))
    assert str(error.value).startswith(says)
    written(tmp_path / "rows.jsonl", [fine])
    assert main([*given, "--dry-run"]) == 0
    assert "job: " in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
