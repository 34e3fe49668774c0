"""The scorer: its desk, what it serves and answers, and what a group is shown to it as. No processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes.scores import made
from offtrail.core.types import Problem
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config
from offtrail.platform.model.reader import Question
from offtrail.platform.model.scoring import check_tokenizers, scorings
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.context import score_weights_folder
from offtrail.platform.scorer.asking import Lines, ModelScorer, ScorerError
from offtrail.platform.scorer.desk import Desk
from offtrail.platform.scorer.served import Served
from offtrail.platform.scorer.service import Service
from offtrail.platform.scorer.shown import Show
from offtrail.platform.weights.store import Publisher
from offtrail.platform.wire.messages import Error, Message, Scored, ScorerAt, ScoreRequest, StatusRequest, Unscored
from offtrail.platform.wire.sockets import Envelope

PROBLEM = Problem("chain", 0, "1+1=", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prm, of steps; rm, of outcomes."""
    found = tmp_path_factory.mktemp("models")
    made(found / "prm", "steps")
    made(found / "rm", "outcome", seed=6)
    return found


def config_of(folder: Path, tmp_path: Path, *more: str) -> Config:
    models = f"scorer.models={{prm: {{path: {folder / 'prm'}}}, rm: {{path: {folder / 'rm'}}}}}"
    return compose([models, f"weights.dir={tmp_path}", *more])


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


# --- the desk ---


def asked(tokens: int) -> Question:
    return Question(int32(3), [np.full(tokens - 1, 4, np.int32)])


def desk_with(*sizes: tuple[str, int], **settings: Any) -> Desk:
    desk = Desk(["a", "b"], **{"budget": 10, "finish": True} | settings)
    for ticket, (model, tokens) in enumerate(sizes):
        desk.put(Envelope(b"", ticket, ScoreRequest(model=model)), model, asked(tokens))
    return desk


def tickets(desk: Desk) -> list[int]:
    return [request.envelope.ticket for request in desk.take()]


def test_a_batch_is_of_one_model_oldest_first_and_as_many_tokens_as_it_holds() -> None:
    desk = desk_with(("a", 4), ("b", 3), ("a", 6), ("a", 2), ("b", 30), ("b", 2))
    assert [tickets(desk) for _ in range(6)] == [[0, 2], [1], [3], [4], [5], []]


def test_without_a_budget_each_request_is_a_batch() -> None:
    desk = desk_with(("a", 4), ("b", 3), ("a", 6), budget=0)
    assert [tickets(desk) for _ in range(4)] == [[0], [1], [2], []]


def test_what_was_asked_before_new_weights_is_taken_before_they_may_be_loaded() -> None:
    desk = desk_with(("a", 6), ("a", 6))
    assert not desk.may_load("a")
    desk.put(Envelope(b"", 9, ScoreRequest(model="a")), "a", asked(2))
    assert tickets(desk) == [0]
    assert not desk.may_load("a")
    assert tickets(desk) == [1]  # and not 9, which came after the new weights
    assert desk.may_load("a")
    assert tickets(desk) == [9]
    assert desk_with(("a", 6), finish=False).may_load("a")


def test_a_batch_that_goes_back_is_the_first_again() -> None:
    desk = desk_with(("a", 4), ("a", 4), ("a", 4))
    desk.back(desk.take())
    assert tickets(desk) == [0, 1]
    assert len(desk) == 1


# --- the service ---


@dataclass
class Loopback:
    """A server's end that is asked by hand."""

    inbox: list[Envelope] = field(default_factory=list)
    said: dict[int, tuple[Message, Sequence[Any]]] = field(default_factory=dict)

    def poll(self, timeout_s: float) -> list[Envelope]:
        inbox, self.inbox = self.inbox, []
        return inbox

    def reply(self, envelope: Envelope, message: Message, arrays: Sequence[Any] = ()) -> None:
        assert envelope.ticket not in self.said, "answered twice"
        self.said[envelope.ticket] = message, arrays

    def ask(self, ticket: int, model: str, *arrays: Any, peer: bytes = b"generator-0") -> None:
        self.inbox.append(Envelope(peer, ticket, ScoreRequest(model=model), list(arrays)))


@dataclass
class House:
    """A service over real small models."""

    config: Config
    run_dir: Path
    wire: Loopback = field(default_factory=Loopback)

    def __post_init__(self) -> None:
        settings = self.config.scorer
        self.models = {n: Served.open(self.config, self.run_dir, one) for n, one in scorings(self.config).items()}
        self.activity = Activity()
        desk = Desk(list(self.models), budget=settings.tokens_per_batch, finish=settings.on_refresh == "finish")
        again = settings.on_refresh == "again"
        self.service = Service(self.wire, desk, self.models, self.activity, again=again)

    def publisher(self, model: str) -> Publisher:
        return Publisher(score_weights_folder(self.config, self.run_dir, model))

    def weights(self, model: str, factor: float) -> dict[str, torch.Tensor]:
        module = self.models[model].reader.module
        return {n.removeprefix("model."): p.detach() * factor for n, p in module.named_parameters()}

    def spent(self) -> dict[str, float]:
        return self.activity.snapshot().compute


@pytest.fixture
def house(folder: Path, tmp_path: Path) -> Callable[..., House]:
    return lambda *more: House(config_of(folder, tmp_path, *more), tmp_path)


def test_what_two_askers_ask_is_one_batch_and_each_gets_what_it_would_get_alone(house: Callable[..., House]) -> None:
    one = house()
    first, second = (int32(5, 6), int32(3, 2), int32(7, 8, 9, 10, 11)), (int32(5), int32(4), int32(20, 21, 22, 23))
    one.wire.ask(1, "rm", *first)
    one.wire.ask(2, "rm", *second, peer=b"generator-1")
    one.service.turn()
    assert (one.spent()["score_batches"], one.spent()["score_requests"]) == (1, 2)
    for ticket, arrays in ((1, first), (2, second)):
        alone = house()
        alone.wire.ask(ticket, "rm", *arrays)
        alone.service.turn()
        message, [found] = one.wire.said[ticket]
        assert message == Scored(model="rm", version=0)
        np.testing.assert_allclose(found, alone.wire.said[ticket][1][0], rtol=1e-5)


def test_steps_of_a_process_reward_model_are_read_at_their_ends(house: Callable[..., House]) -> None:
    one = house()
    prompt, tokens = int32(5, 6), int32(7, 8, 9, 10, 11)
    one.wire.ask(1, "prm", prompt, int32(3, 2), tokens, int32(1, 3, 5))
    one.service.turn()
    _, [found] = one.wire.said[1]
    model = one.models["prm"].reader.module.model
    for place, text in enumerate([[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 10, 11]]):
        asked = Question(int32(5, 6), [int32(*text[2:])], [np.array([len(text) - 2])])
        [[alone]] = one.models["prm"].reader.ask([asked], 100)
        assert found[place] == pytest.approx(1 / (1 + np.exp(-alone[0])), rel=1e-5)
    assert model.config.architectures == ["Qwen3ForTokenClassification"]


@pytest.mark.parametrize(
    ("model", "arrays", "reason"),
    [
        ("other", (), "no model of that name; this scorer has prm, rm"),
        ("rm", (int32(1), int32(1)), "a request of 2 arrays, expected 3 of int32"),
        ("rm", (int32(1), int32(2), int32(5)), "outputs whose lengths add up to its tokens"),
        ("rm", (int32(1), int32(1), np.ones(1, np.float32)), "a request of 3 arrays, expected 3 of int32"),
        ("rm", (int32(1), int32(1, 0), int32(5)), "outputs whose lengths add up"),
        ("rm", (int32(1), int32(1), int32(999)), "token ids span 1…999, and the model has 61"),
        ("rm", (int32(1), int32(300), np.ones(300, np.int32)), "take 301 tokens, above model.max_length="),
        ("prm", (int32(1), int32(2), int32(5, 6), int32(2, 1)), "the ends of steps must ascend within 1…2"),
        ("prm", (int32(1), int32(2), int32(5, 6), int32(3)), "the ends of steps must ascend within 1…2"),
    ],
)
def test_what_fits_no_model_is_answered_with_why(
    house: Callable[..., House], model: str, arrays: Any, reason: str
) -> None:
    one = house()
    one.wire.ask(1, model, *arrays)
    one.service.turn()
    message, _ = one.wire.said[1]
    assert isinstance(message, Unscored)
    assert reason in message.reason


def test_other_messages_are_none_of_a_scorers(house: Callable[..., House]) -> None:
    one = house()
    one.wire.inbox.append(Envelope(b"", 1, StatusRequest()))
    one.service.turn()
    assert one.wire.said[1][0] == Error(error="StatusRequest: a scorer answers ScoreRequest alone")


def test_no_number_is_no_score_and_takes_no_other_with_it(house: Callable[..., House]) -> None:
    one = house()
    with torch.no_grad():
        one.models["rm"].reader.module.model.get_input_embeddings().weight[60] = torch.nan
    one.wire.ask(1, "rm", int32(5), int32(2), int32(6, 60))
    one.wire.ask(2, "rm", int32(5), int32(2), int32(6, 7), peer=b"generator-1")
    one.service.turn()
    bad, good = one.wire.said[1][0], one.wire.said[2]
    assert isinstance(bad, Unscored)
    assert bad.reason == "1 of the 1 scores of version 0 are no numbers"
    assert isinstance(good[0], Scored)
    assert np.isfinite(good[1][0]).all()


@pytest.mark.parametrize("on_refresh", ["finish", "again"])
def test_a_refresh_in_the_middle_keeps_each_request_under_one_version(
    house: Callable[..., House], on_refresh: str
) -> None:
    one = house(f"scorer.on_refresh={on_refresh}", "scorer.tokens_per_batch=4")
    publisher, model = one.publisher("rm"), one.models["rm"]
    under_way = model.score

    def score(questions: Sequence[Question]) -> Any:  # while the first batch is under way, version 3 is published
        found = under_way(questions)
        if not publisher.bytes_published:
            publisher.publish(3, one.weights("rm", 2.0))
            one.wire.ask(9, "rm", int32(5), int32(2), int32(6, 7))
        return found

    model.score = score  # type: ignore[method-assign]
    for ticket in (1, 2):
        one.wire.ask(ticket, "rm", int32(5), int32(2), int32(6, 7))
    while len(one.wire.said) < 3:
        one.service.turn()
    versions = {ticket: message.version for ticket, (message, _) in one.wire.said.items()}  # type: ignore[attr-defined]
    assert versions == ({1: 0, 2: 0, 9: 3} if on_refresh == "finish" else {1: 3, 2: 3, 9: 3})
    scores = {ticket: arrays[0].tolist() for ticket, (_, arrays) in one.wire.said.items()}
    assert scores[1] == scores[2]
    assert (scores[2] == scores[9]) == (on_refresh == "again")
    publisher.close()


def test_weights_of_another_model_are_refused_before_anything_is_changed(house: Callable[..., House]) -> None:
    one = house()
    publisher, before = one.publisher("rm"), {n: p.clone() for n, p in one.weights("rm", 1.0).items()}
    publisher.publish(1, {n: p for n, p in one.weights("rm", 2.0).items() if n != "score.weight"})
    with pytest.raises(ValueError, match=r"^version 1 of rm: score.weight is missing as published and \[1, 32\] in "):
        one.service.turn()
    after = one.weights("rm", 1.0)
    assert all(torch.equal(before[name], after[name]) for name in before)
    publisher.close()


# --- what is shown ---


def shown(folder: Path, *texts: str, **spec: Any) -> Any:
    text = Text(folder / "rm")
    scoring = scorings(compose([f"scorer.models.m.path={folder / 'prm'}"]))["m"]
    empty = spec.pop("empty", None)
    scoring = replace(scoring, spec=replace(scoring.spec, **spec), empty=empty)
    problem = replace(PROBLEM, prompt="1+1=<think>" if "of" in spec else "1+1=")
    outputs = [np.array([*text.tokenizer.encode(one), text.stop_token_ids[0]], np.int32) for one in texts]
    return text, Show(scoring, text)(problem, text.encode(problem), outputs)


def test_steps_stand_in_the_group_where_their_tokens_do(folder: Path) -> None:
    _, one = shown(folder, "1\n22\n3", "4\n", empty=0)
    _, lengths, _, ends = one.arrays()
    assert lengths.tolist() == [7, 3]  # with the token that ends each
    assert ends.tolist() == [2, 5, 6, 9]
    scores = one.scores(4, np.array([0.5, 0.25, 0.75, 0.5], np.float32))
    assert scores.step_ends.tolist() == [2, 5, 6, 9]
    assert (scores.by.model, scores.by.version) == ("m", 4)
    assert scores.channels["m"].axis == "step"
    assert scores.components["m"].tolist() == [0.25, 0.5]  # the least of each answer's steps


def test_of_an_answer_the_part_behind_the_thought_is_shown_also_where_the_prompt_has_opened_that(folder: Path) -> None:
    text, one = shown(folder, "1\n2</think>3\n4", of="answer")
    prompt, _, tokens, ends = one.arrays()
    assert text.tokenizer.decode(prompt) == "1+1=<think>"  # as job=reward_model has it
    assert text.decode(tokens) == "3\n4"
    assert ends.tolist() == [2, 3]
    assert one.scores(0, np.ones(2, np.float32)).step_ends.tolist() == [6, 7]


def test_an_empty_answer_has_the_score_that_was_said_or_none(folder: Path) -> None:
    _, one = shown(folder, "1", "", of="response", empty=-2.0)
    assert one.asked == [0]
    assert one.scores(0, np.ones(1, np.float32)).components["m"].tolist() == [1, -2]
    for spec, axis in (("outcome", None), ("steps", "step"), ("tokens", "token")):
        _, none = shown(folder, "", "", reads=spec, empty=-2.0)
        assert none.asked == []
        scores = none.unread()
        assert (scores.by, scores.components["m"].tolist()) == (None, [-2, -2])
        assert [channel.axis for channel in scores.channels.values()] == [axis] * (axis is not None)
    _, unknown = shown(folder, "", "", empty=np.nan)
    with pytest.raises(
        ValueError, match=r"^every answer is empty, so that m has nothing to read; scorer.models.m.empty"
    ):
        unknown.unread()
    with pytest.raises(ValueError, match=r"^answer 1 has nothing for m to read .*; scorer.models.m.empty=SCORE says"):
        shown(folder, "1", "")
    with pytest.raises(ValueError, match=r"^answer 0 has nothing for m to read"):
        shown(folder, "a thought that is not closed", of="answer")


@pytest.mark.parametrize("numbers", [np.ones(3, np.float32), np.array([1, np.nan], np.float32), np.ones(2)])
def test_numbers_that_do_not_fit_are_no_scores(folder: Path, numbers: Any) -> None:
    _, one = shown(folder, "1\n2")
    with pytest.raises(ValueError, match=r"^m answered \(\d,\) numbers, expected 2, all finite float32$"):
        one.scores(0, numbers)


# --- lines to scorers ---


@dataclass
class Phone:
    """The end of a line to a scorer that answers when it is told to: 1 a question, by a version."""

    sent: dict[int, tuple[ScoreRequest, list[Any]]] = field(default_factory=dict)
    inbox: list[tuple[int, Message, list[Any]]] = field(default_factory=list)
    closed: bool = False

    def send(self, message: Message, arrays: Sequence[Any] = ()) -> int:
        assert isinstance(message, ScoreRequest)
        self.sent[ticket := len(self.sent)] = message, list(arrays)
        return ticket

    def answer(self, ticket: int, version: int = 0) -> None:
        message, (_, lengths, *_) = self.sent[ticket]
        self.inbox.append((ticket, Scored(model=message.model, version=version), [np.ones(len(lengths), np.float32)]))

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message, list[Any]]]:
        inbox, self.inbox = self.inbox, []
        return inbox

    def close(self) -> None:
        self.closed = True


class Exchange:
    """Two scorers that the broker knows of, a clock, and one model."""

    def __init__(self, folder: Path, tmp_path: Path, *more: str) -> None:
        config = config_of(folder, tmp_path, *more)
        self.known = [ScorerAt("scorer-0", "a", 1), ScorerAt("scorer-1", "b", 1)]
        self.phones: dict[ScorerAt, Phone] = {}
        self.now = 0.0

        def dial(at: ScorerAt) -> Phone:
            return self.phones.setdefault(at, Phone())

        self.lines = Lines(config, lambda: self.known, dial, lambda: self.now)
        show = Show(scorings(config)["rm"], Text(folder / "rm"))
        self.rm = ModelScorer(config, self.lines, show, "rm")

    def ask(self, key: int, tokens: int = 4) -> None:
        self.rm.submit(key, PROBLEM, int32(30, 31), [np.full(tokens, 40, np.int32)])

    def phone(self, index: int) -> Phone:
        return self.phones[self.known[index]]

    def poll(self) -> dict[int, Any]:
        return {key: None if scores is None else scores.by.version for key, scores in self.rm.poll()}


@pytest.fixture
def exchange(folder: Path, tmp_path: Path) -> Callable[..., Exchange]:
    return lambda *more: Exchange(folder, tmp_path, *more)


def test_who_has_least_to_read_is_asked_and_the_wait_names_who(exchange: Callable[..., Exchange]) -> None:
    one = exchange()
    one.ask(1, tokens=9)
    one.ask(2)
    one.ask(3)
    assert one.rm.waiting_on == "rm of a scorer that is up"
    assert one.poll() == {}
    assert [len(one.phone(i).sent) for i in (0, 1)] == [1, 2]
    assert one.rm.waiting_on == "rm of scorer-0, scorer-1"
    one.phone(1).answer(0, 5)
    assert one.poll() == {2: 5}


def test_what_a_dead_scorer_was_asked_goes_to_another_and_back_to_its_successor(
    exchange: Callable[..., Exchange],
) -> None:
    one = exchange()
    one.ask(1)
    one.poll()
    dead = one.phone(0)
    one.known = [one.known[1]]
    assert one.poll() == {}
    assert dead.closed
    one.known = []
    one.poll()  # nobody: it waits
    assert one.rm.waiting_on == "rm of a scorer that is up"
    one.known = [ScorerAt("scorer-0", "c", 2)]
    one.poll()
    one.phone(0).answer(0, 7)
    assert one.poll() == {1: 7}
    assert one.lines.counters["score_questions_again"] == 2


def test_who_says_nothing_is_passed_over_and_what_it_says_late_counts_for_nothing(
    exchange: Callable[..., Exchange],
) -> None:
    one = exchange("scorer.hang_seconds=10")
    one.ask(1)
    one.poll()
    one.now = 11
    one.poll()
    assert [len(one.phone(i).sent) for i in (0, 1)] == [1, 1]
    one.ask(2)
    one.poll()
    assert [len(one.phone(i).sent) for i in (0, 1)] == [1, 2]  # it is not asked again while it is silent
    one.phone(1).answer(0, 3)
    one.phone(0).answer(0, 2)
    assert one.poll() == {1: 3}
    one.ask(3)
    one.poll()
    assert len(one.phone(0).sent) == 2


def test_the_last_scorer_is_waited_for_until_the_deadline(exchange: Callable[..., Exchange]) -> None:
    for more, refused in ((), False), (("scorer.on_deadline=refuse",), True):
        one = exchange("scorer.deadline_seconds=30", *more)
        one.known.pop()
        one.ask(1)
        one.poll()
        one.now = 29
        assert one.poll() == {}
        one.now = 31
        if refused:
            assert one.poll() == {1: None}
            assert one.rm.reason(1).startswith("waited for a score of rm from scorer-0 since ")
        else:
            with pytest.raises(
                ScorerError, match=r"^waited for a score of rm from scorer-0 since .*on_deadline=refuse$"
            ):
                one.poll()


def test_a_score_that_is_none_is_no_zero(exchange: Callable[..., Exchange]) -> None:
    one = exchange()
    for key in (1, 2):
        one.ask(key)
    one.poll()
    one.phone(0).inbox.append((0, Unscored(model="rm", reason="1 of the 1 scores are no numbers"), []))
    one.phone(1).inbox.append((0, Scored(model="rm", version=0), [np.array([np.nan], np.float32)]))
    assert one.poll() == {1: None, 2: None}
    assert one.rm.reason(1) == "rm has no score: 1 of the 1 scores are no numbers"
    assert one.rm.reason(2).startswith("rm answered (1,) numbers, expected 1, all finite")


# --- what is refused before a run starts ---


def test_two_models_that_read_steps_cut_alike(folder: Path) -> None:
    models = f"{{a: {{path: {folder / 'prm'}}}, b: {{path: {folder / 'prm'}, steps: {{by: sentence}}}}}}"
    with pytest.raises(ConfigError, match=r"^scorer.models.b.steps=.*a group is cut into steps once"):
        scorings(compose([f"scorer.models={models}"]))


def test_a_head_of_the_wrong_shape_is_one_line(tmp_path: Path) -> None:
    made(tmp_path / "rm", "outcome", labels=3)
    with pytest.raises(ConfigError, match=r"^scorer.models.rm.path=.*: its score head is of the wrong shape: score"):
        scorings(compose([f"scorer.models.rm.path={tmp_path / 'rm'}"]))


def test_a_model_of_another_tokenizer_is_one_line(folder: Path, tmp_path: Path) -> None:
    models = scorings(compose([f"scorer.models.rm.path={made(tmp_path / 'rm', 'outcome')}"])).values()
    check_tokenizers(models, folder / "rm")
    file = tmp_path / "rm" / "tokenizer.json"
    told = file.read_text().replace('"+"', '"§"')
    file.write_text(told)
    with pytest.raises(ConfigError, match=r"^scorer.models.rm.path=.*: has another tokenizer .*'\+' is token \d+ here"):
        check_tokenizers(models, folder / "rm")


def test_an_implicit_process_reward_needs_its_reference(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^scorer.models.m.reference=: is no model folder; with beta"):
        scorings(compose([f"scorer.models.m={{path: {folder / 'rm'}, beta: 0.1}}"]))
