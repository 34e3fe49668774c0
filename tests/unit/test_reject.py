"""job=reject as a whole, without a model: what it leaves in its run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offtrail.platform.config.compose import compose
from offtrail.platform.config.rundir import prepare
from offtrail.platform.launcher.reject import run_rejection


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
