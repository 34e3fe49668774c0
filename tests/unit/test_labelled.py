"""Labelled answers as batches, and what a model that scores is worth on held-out ones: labels stand where the text has
its steps, measures are those by hand, and whoever reads the saved model gets the same numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from offtrail.platform.config.compose import compose
from offtrail.platform.config.schema import Config
from offtrail.platform.learner import checkpoint, held_out
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.learner.labelled import Item, Labelled
from offtrail.platform.learner.make import load_trained, make_head_trainer
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.reader import Question, Reader
from offtrail.platform.model.scores import ScoreSpec, spec_of
from offtrail.platform.model.text import Text
from offtrail.platform.model.tiny import save_start
from offtrail.platform.runtime.activity import Activity
from offtrail.tasks.base import TaskError

ALONE = World(0, 1, torch.device("cpu"))
PAIR = {"prompt": "1+1=?", "chosen": "<think>a</think>2", "rejected": "<think>b</think>7"}
CHAIN = {"prompt": "1;+1=?", "answer": "<think>1+1=2;2+2=4</think><answer>4</answer>", "labels": [1, 0]}
CUT = "prm.cut={by: separator, separator: ;, within: thought}"
JOBS = {
    "pairwise": ("reward_model", ["reward_model.of=response"]),
    "answers": ("reward_model", []),
    "pointwise": ("reward_model", ["reward_model.objective=pointwise"]),
    "steps": ("prm", [CUT]),
    "implicit": ("prm", [CUT, "prm.objective=implicit", "prm.beta=0.5"]),
}


def rows_for(kind: str, n: int = 6) -> list[dict[str, Any]]:
    """The first of a kind, and others to other prompts."""
    if JOBS[kind][0] == "prm":
        return [{**CHAIN, "prompt": f"{i};+1=?", "labels": [1, i % 2]} for i in range(n)]
    if kind == "pointwise":
        return [{"prompt": f"{i}+1=?", "answer": "23"[i % 2] * (1 + i), "label": i % 2} for i in range(n)]
    return [{**PAIR, "prompt": f"{i}+1=?", "chosen": f"<think>a</think>{i}{i}"} for i in range(n)]


def config_of(kind: str, folder: Path, *more: str, rows: list[dict[str, Any]] | None = None) -> Config:
    job, own = JOBS[kind]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_for(kind)))
    given = [f"job={job}", f"{job}.path={path}", f"{job}.held_out_share=0.5", f"{job}.batch_size=2"]
    given += [*own, *(option.replace("JOB", job) for option in more)]
    return compose(list({option.partition("=")[0]: option for option in given}.values()))


def trainer_of(config: Config, start: Path) -> Trainer[Any]:
    """With weights that say something."""
    trainer = make_head_trainer(config, ALONE, load_trained(config, None, start), start, Activity())
    with torch.no_grad():
        for name, p in trainer.module.named_parameters():
            scale = 1.0 if "score" in name else 0.02
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return trainer


# --- tokens


def test_a_pair_is_a_group_of_two_answers_of_which_the_thought_is_not_read(tmp_path: Path, start_dir: Path) -> None:
    text = Text(start_dir)
    for kind, begins in (("answers", ""), ("pairwise", "<think>b</think>")):
        data = Labelled(config_of(kind, tmp_path), text)
        batch = data.table(0)
        assert batch.scores.tolist() == [1.0, 0.0] * 2
        assert batch.rows.group_of.tolist() == [0, 0, 1, 1]
        for item in data.items:
            assert text.decode(item.outputs[1]) == f"{begins}7"
            assert [output[-1] for output in item.outputs] == [text.stop_token_ids[0]] * 2


def test_labels_stand_at_the_last_token_of_each_step(tmp_path: Path, start_dir: Path) -> None:
    text = Text(start_dir)
    data = Labelled(config_of("steps", tmp_path), text)
    batch = data.table(0)
    for start, stop in zip(batch.rows.starts[:-1], batch.rows.starts[1:], strict=True):
        tokens, labels = batch.rows.tokens[start:stop], batch.labels[start:stop]
        at = torch.nonzero(~labels.isnan()).flatten().tolist()
        assert [text.decode(tokens[: end + 1]) for end in at] == ["<think>1+1=2;", "<think>1+1=2;2+2=4"]
        assert labels[at[0]] == 1.0


STEP = st.text(st.sampled_from("abc 0123+=.,"), min_size=1, max_size=9).filter(str.strip)


@given(st.lists(STEP, min_size=1, max_size=5), st.sampled_from(["newline", "separator", "sentence"]))
@settings(max_examples=40, deadline=None)
def test_steps_that_are_given_one_by_one_end_where_their_text_does(
    tmp_path_factory: Any, start_dir: Path, steps: list[str], by: str
) -> None:
    rows = [{"prompt": f"{i}=?", "steps": steps, "labels": [1] * len(steps)} for i in range(3)]
    config = config_of(
        "implicit", tmp_path_factory.mktemp("x"), f"JOB.cut={{by: {by}}}", "JOB.held_out_share=0", rows=rows
    )
    text = Text(start_dir)
    (item, *_) = Labelled(config, text).items
    parts = np.split(item.outputs[0], item.ends)
    assert [text.decode(part).strip() for part in parts[:-1]] == [step.strip() for step in steps]
    assert text.decode(parts[-1]) == ""


def test_every_item_is_trained_once_an_epoch_whatever_the_batch(tmp_path: Path, start_dir: Path) -> None:
    data = Labelled(config_of("pointwise", tmp_path, "JOB.held_out_share=0"), Text(start_dir))
    epoch = [prompt.tolist() for step in range(3) for prompt in data.table(step).rows.prompts]
    assert sorted(epoch) == sorted(item.prompt.tolist() for item in data.items)
    again = data.table(1)
    assert np.array_equal(again.rows.tokens, data.table(1).rows.tokens)


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        ("pointwise", [{"prompt": "a", "answer": "é", "label": 1}], "line 1: the tokenizer does not know all of 'é'"),
        ("pointwise", [{"prompt": "a", "answer": "a" * 300, "label": 1}], "line 1: prompt and answer take 302 tokens"),
        ("steps", [{**CHAIN, "prompt": f"{i}"} for i in range(2)], ""),
    ],
)
def test_what_the_tokenizer_cannot_take_is_one_line(
    kind: str, rows: Any, said: str, tmp_path: Path, start_dir: Path
) -> None:
    config = config_of(kind, tmp_path, "JOB.held_out_share=0", rows=rows)
    if not said:
        assert len(Labelled(config, Text(start_dir)).items) == 2
        return
    with pytest.raises(TaskError, match=said):
        Labelled(config, Text(start_dir))


def test_long_rows_are_dropped_where_that_is_asked_for(tmp_path: Path, start_dir: Path) -> None:
    rows = [{"prompt": "a", "answer": "a" * n, "label": 1} for n in (3, 300)]
    config = config_of("pointwise", tmp_path, "JOB.held_out_share=0", "JOB.long=drop", rows=rows)
    assert [len(item.outputs[0]) for item in Labelled(config, Text(start_dir)).items] == [4]


# --- measures


def item(ends: list[int], labels: list[float], n: int = 6) -> Item:
    tokens = np.ones(n, np.int32)
    return Item(tokens, (tokens,), (1.0,), np.array(ends, np.int32), np.array(labels, np.float32))


def test_the_measures_of_steps_by_hand() -> None:
    """Three answers: the error found at its place, the error taken for right, and a right one called so."""
    items = [item([1, 2, 3], [1, 0, math.nan]), item([2, 4], [0, 1]), item([5], [1])]
    p = [np.array([0.9, 0.2, 0.1]), np.array([0.7, 0.6]), np.array([0.8])]
    found = held_out.of_steps(p, items)
    # of five labelled steps one is judged wrongly; good 0.9 0.6 0.8 against bad 0.2 0.7: 5 of 6 pairs in order
    assert found["eval/accuracy"] == pytest.approx(4 / 5)
    assert found["eval/auc"] == pytest.approx(5 / 6)
    assert found["eval/auc_depth_0"] == 1.0
    assert found["eval/auc_depth_1"] == 1.0
    assert "eval/auc_depth_2" not in found
    assert (found["eval/first_error_wrong"], found["eval/first_error_right"]) == (0.5, 1.0)
    assert found["eval/first_error_f1"] == pytest.approx(2 / 3)


def test_an_implicit_reward_of_a_step_is_the_sum_over_its_tokens() -> None:
    numbers = np.array([1.0, 2.0, -4.0, 0.5, 0.5, 9.0])
    assert held_out.of_each_step(numbers, item([2, 5], [1, 1])).tolist() == [3.0, -3.0]


# --- the saved model says what was measured


@pytest.mark.parametrize("kind", list(JOBS))
def test_whoever_reads_the_saved_model_gets_the_numbers_that_were_measured(
    kind: str, tmp_path: Path, start_dir: Path
) -> None:
    """By reader.py, and by transformers' own class; and its scores.json says how it is read."""
    config = config_of(kind, tmp_path)
    text = Text(start_dir)
    data, trainer = Labelled(config, text), trainer_of(config, start_dir)
    path = checkpoint.save(tmp_path, ALONE, TrainerState.of(1, trainer), trainer.module.model, text, trainer, {})
    assert path is not None
    spec = spec_of(path, "x", "x")
    assert (
        spec
        == {
            "pairwise": ScoreSpec("outcome", "response"),
            "answers": ScoreSpec("outcome", "answer"),
            "pointwise": ScoreSpec("outcome", "response", squash="sigmoid"),
            "steps": ScoreSpec("steps", steps=config.prm.cut, squash="sigmoid"),
            "implicit": ScoreSpec("steps", steps=config.prm.cut, beta=0.5, reference=str(start_dir.resolve())),
        }[kind]
    )
    said = trainer.ask(held_out.table(data.held)).numpy()
    bounds = np.cumsum([0, *(len(output) for one in data.held for output in one.outputs)])
    each = iter([said[a:b] for a, b in itertools.pairwise(bounds)])
    reader = Reader.open(path, longest=256)
    questions = [Question(one.prompt, one.outputs, [one.ends] * len(one.outputs)) for one in data.held]
    model = opened(kind, path)
    for one, answers in zip(data.held, reader.ask(questions, 4096), strict=True):
        for output, told in zip(one.outputs, answers, strict=True):
            mine = next(each)
            if kind == "implicit":
                expected = 0.5 * held_out.of_each_step(mine.astype(np.float64), one)
            else:
                expected = mine[one.ends - 1] if kind == "steps" else mine[-1:]
                assert own_numbers(model, one, output) == pytest.approx(expected, abs=1e-5)
            assert told == pytest.approx(expected, abs=1e-5)
    scores = held_out.scores(config, trainer, data.held)
    assert all(math.isfinite(value) for value in scores.values())
    assert ("eval/outcome_accuracy" in scores) == (kind == "implicit")


def opened(kind: str, path: Path) -> Any:
    if kind == "implicit":
        return AutoModelForCausalLM.from_pretrained(path)
    classes = {"steps": AutoModelForTokenClassification}
    return classes.get(kind, AutoModelForSequenceClassification).from_pretrained(path).eval()


@torch.no_grad()
def own_numbers(model: Any, one: Item, output: Any) -> list[float]:
    """Of a classifier: at each step's end, or at the end of the answer."""
    ids = torch.from_numpy(np.concatenate([one.prompt, output]).astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0]
    return logits.flatten().tolist() if logits.ndim == 1 else logits[len(one.prompt) + one.ends - 1, 0].tolist()


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path, start_dir: Path) -> None:
    other = tmp_path / "other"
    save_start(other, compose(["model.characters=é"]).model, 0)
    config = config_of("implicit", tmp_path, f"prm.reference={other}")
    with pytest.raises(ValueError, match=rf"prm\.reference={other}: its tokenizer is not that of model\.path="):
        make_head_trainer(config, ALONE, load_trained(config, None, start_dir), start_dir, Activity())
