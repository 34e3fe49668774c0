"""Settings of the jobs that make data: what is asked and how (sample), which answers are kept (reject), how their steps
are labelled (label), and which of two is preferred (prefer). No torch and no numpy: `launch.py --help` imports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from offtrail.core.settings import check_limits, section, setting
from offtrail.rewards.step_config import StepSettings

INSTRUCTION = (
    "{prompt}\n\nWork it out in detail, one step after another. After every step reflect on it: verify its result in "
    "a second way where there is one, and where you find a mistake, say so and correct it. Give the answer only when "
    "you have checked all of it."
)

COMPARISON = (
    "Two assistants were asked the same. Which answer is more helpful: correct, relevant, clear and complete? Neither "
    "its place nor its length speaks for one.\n\n[Question]\n{question}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}\n\n"
    "Give your reasons in a few sentences, and end with your verdict in this very form: [[A]] if A is better, [[B]] if "
    "B is better, [[C]] if neither is."
)


@dataclass
class SampleConfig:
    """job=sample: verified answers to training prompts, as data. See docs/data.md."""

    prompts: int = setting(1024, "[0, inf)")
    """Training prompts that are asked, in the data order; 0 = all that a set of files has, each once."""
    first: int = setting(0, "[0, inf)")
    """Place of the first of them in the data order: several runs with the same run.seed can share a set."""
    samples: int = setting(4, "[1, 65536]")
    """Answers drawn for each prompt, of at most sampling.max_new_tokens tokens."""
    temperature: float = setting(1.0, "[0, 100]")
    """0 = greedy."""
    top_p: float = setting(1.0, "(0, 1]")
    """Tokens are drawn from the smallest set of the likeliest that holds this share; 1 = all."""
    keep: Literal["all", "right"] = "all"
    """What data.jsonl holds. right: answers whose main reward component is 1 and that ended by themselves."""
    prompting: Literal["plain", "few_shot", "reflect"] = "plain"
    """How a problem is put to the model. plain: as in training; few_shot: after worked examples; reflect: with
    sample.instruction. Recorded is always the plain prompt."""
    shots: int = setting(2, "[1, 256]")
    """few_shot: examples before the question, none of them the question itself."""
    shots_path: str = setting("", path="file")
    """few_shot: rows with a prompt (or messages) and an answer, of which some are drawn by run.seed; empty = training
    problems with worked answers of the task."""
    shots_prompt_field: str = "prompt"
    """Field of such a row's prompt."""
    shots_answer_field: str = "answer"
    """Field of its answer."""
    instruction: str = INSTRUCTION
    """reflect: what is asked, with {prompt} for the question (of messages the last one's text)."""

    def __post_init__(self) -> None:
        """Raise ValueError for an instruction without a place for the question."""
        check_limits(self, "sample")
        if "{prompt}" not in self.instruction:
            raise ValueError(
                f"sample.instruction={self.instruction!r}: must contain {{prompt}}, where the question goes"
            )


@dataclass
class RejectConfig:
    """job=reject: which of such answers are kept. See docs/data.md."""

    paths: list[str] = setting([], path="file")
    """Files or folders of rows: data.jsonl of job=sample or of a stage, or any with a prompt (or messages) and an
    answer."""
    prompt_field: str = "prompt"
    """Field of a row's prompt; a row without it may have `messages`."""
    answer_field: str = "answer"
    """Field of its answer."""
    min_reward: float = setting(1.0, "[-1e9, 1e9]")
    """Answers whose main reward component is lower are left out (wrong)."""
    unscored: Literal["refuse", "verify", "drop", "keep"] = "refuse"
    """Rows without a reward: an error; or the task's verifier and the reward judge them by their gold answer; or they
    are left out (unscored), or kept without one."""
    gold_field: str = "gold"
    """unscored=verify: field of the gold answer."""
    drop_unfinished: bool = True
    """Answers that were cut at the longest length are left out (unfinished)."""
    language: str = ""
    """Language of the answers, such as en (ISO 639-1): those with too much of another are left out (mixed_language);
    empty = not asked."""
    min_language: float = setting(0.95, "[0, 1]")
    """The least share of words in that language, outside code and formulas."""
    language_settings: dict[str, Any] = setting({})
    """Further settings of the language component, as {detector: lingua, others: [de]}."""
    longest_paragraph: int = setting(0, "[0, 1e9]")
    """Answers with a paragraph of more characters are left out (long_paragraph); 0 = not asked."""
    drop_code_blocks: bool = False
    """Answers that hold a fenced code block are left out (code_block)."""
    drop_unbalanced: bool = True
    """Answers whose braces, LaTeX brackets or environments do not pair are left out (unbalanced)."""
    max_marks: float = setting(0.3, "[0, 1]")
    """Answers of which a larger share is neither letters, digits nor usual marks, or that hold control characters, are
    left out (garbled)."""
    max_repetition: float = setting(0.2, "[0, 1]")
    """Answers of which a larger share of repetition_n-grams stood before are left out (repetitive); 1 = not asked."""
    repetition_n: int = setting(20, "[1, 1000]")
    """Words of these n-grams."""
    shortest: int = setting(0, "[0, 1e9]")
    """Answers of fewer characters are left out (short)."""
    longest: int = setting(0, "[0, 1e9]")
    """Answers of more characters are left out (long); 0 = not asked."""
    decontaminate_against: list[str] = setting([], path="file")
    """Evaluation sets: rows whose question shares 10 words in a row with one of theirs are left out (contaminated)."""
    held_out: bool = False
    """The same against the eval.prompts held-out problems of the task."""
    drop_duplicates: bool = True
    """Of equal answers to a question, up to blanks, one is kept (duplicate)."""
    near_duplicates: float = setting(0.9, "[0, 1]")
    """Of two answers to a question that share so much of their near_n-grams (Jaccard's measure) one is kept
    (near_duplicate); 1 = not asked."""
    near_n: int = setting(5, "[1, 1000]")
    """Words of these n-grams."""
    most: int = setting(0, "[0, 1e9]")
    """At most so many answers to a question (surplus); 0 = all."""
    choose: Literal["first", "shortest", "random"] = "first"
    """Which of them; random: by run.seed."""
    mix: dict[str, dict[str, Any]] = setting({})
    """Further data → its file and its share of the result, as {general: {path: chat.jsonl, share: 0.25}}: drawn by
    run.seed, none twice unless `repeat: true`; prompt_field and answer_field where they differ."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds, or cannot go with another."""
        check_limits(self, "reject")
        if self.language:
            from offtrail.tasks.rejection import language_of  # numpy comes with it

            language_of(self)
        for key, paths in (("paths", self.paths), ("decontaminate_against", self.decontaminate_against)):
            if "" in paths:
                raise ValueError(f"reject.{key}={paths}: an empty path names no file; leave it out")
        if 0 < self.longest < self.shortest:
            raise ValueError(f"reject.longest={self.longest}: must be ≥ reject.shortest={self.shortest}, or 0")
        for name, entry in self.mix.items():
            _check_mix(f"reject.mix.{name}", entry)
        if (total := sum(entry["share"] for entry in self.mix.values())) >= 1:
            raise ValueError(f"reject.mix={list(self.mix)}: their shares make {total:g}; must stay below 1")


@dataclass
class LabelConfig:
    """job=label: how the steps of such answers are labelled. See docs/data.md."""

    paths: list[str] = setting([], path="file")
    """Files or folders of rows: data.jsonl of job=sample, or any with a prompt (or messages), an answer and the gold
    answer."""
    prompt_field: str = "prompt"
    """Field of a row's prompt; a row without it may have `messages`."""
    answer_field: str = "answer"
    """Field of its answer."""
    gold_field: str = "gold"
    """Field of the answer by which it, and what is said from its steps on, is judged."""
    cut: dict[str, Any] = setting({})
    """How an answer is cut into steps, as prm.cut: {by: separator, separator: ";", within: thought}; empty = {by:
    newline}."""
    method: Literal["rollouts", "search", "exact"] = "rollouts"
    """rollouts: the model goes on from the end of each step. search: of a wrong answer the first step from which
    nothing right comes, by bisection. exact: the task's own checker, without a model."""
    rollouts: int = setting(8, "[1, 65536]")
    """Answers drawn from the end of a step."""
    temperature: float = setting(1.0, "[0, 100]")
    """Of these; 0 = greedy."""
    top_p: float = setting(1.0, "(0, 1]")
    """Their tokens are drawn from the smallest set of the likeliest that holds this share; 1 = all."""
    labels: Literal["soft", "hard"] = "soft"
    """rollouts: the share of them that is right, or whether any is."""
    noise: float = setting(0.0, "[0, 1]")
    """Chance that a label x becomes 1 − x, drawn by run.seed."""

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds, or cannot go with another."""
        check_limits(self, "label")
        if "" in self.paths:
            raise ValueError(f"label.paths={self.paths}: an empty path names no file; leave it out")
        if StepSettings.of(self.cut, "label.cut").by == "tokens" and self.method == "exact":
            raise ValueError("label.cut.by=tokens: label.method=exact reads the text alone; cut it by a mark")
        if self.labels == "hard" and self.method != "rollouts":
            raise ValueError(f"label.labels=hard: label.method={self.method} has no others; leave it out")


@dataclass
class JudgeConfig:
    """The model that judges pairs: any endpoint with OpenAI's API, as job=serve is."""

    url: str = setting("", resumable=True)
    """Where it is, up to /v1, as http://host:8000/v1; its key in $OFFTRAIL_JUDGE_KEY."""
    model: str = ""
    """Its name there; empty = the endpoint's only one."""
    api: Literal["chat", "completions"] = "chat"
    """completions: for a model without a chat template."""
    prompt: str = COMPARISON
    """What it is asked, with {question}, {a} and {b}; it is to end with [[A]], [[B]] or [[C]]."""
    max_tokens: int = setting(1024, "[1, 1e6]", resumable=True)
    """Of a reply."""
    temperature: float = setting(0.0, "[0, 100]")
    """0 = greedy."""
    requests: int = setting(8, "[1, 4096]", resumable=True)
    """Pairs that are judged at a time."""
    seconds: float = setting(300.0, "(0, 1e9]", resumable=True)
    """The longest that a reply may take."""
    tries: int = setting(5, "[1, 1000]", resumable=True)
    """Requests before the job gives up on an endpoint that is busy, or not there."""

    def __post_init__(self) -> None:
        """Raise ValueError for a prompt that does not show what is to be judged, or a place that is none."""
        check_limits(self, "prefer.judge")
        for place in ("{question}", "{a}", "{b}"):
            if self.prompt.count(place) != 1:
                raise ValueError(f"prefer.judge.prompt={self.prompt!r}: must contain {place} once, where that goes")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"prefer.judge.url={self.url}: must be as http://host:8000/v1")


@dataclass
class PreferConfig:
    """job=prefer: pairs of a better and a worse one of such answers. See docs/data.md."""

    paths: list[str] = setting([], path="file")
    """Files or folders of rows: data.jsonl of job=sample, or any with a prompt (or messages) and an answer, several to
    a question."""
    prompt_field: str = "prompt"
    """Field of a row's prompt; a row without it may have `messages`."""
    answer_field: str = "answer"
    """Field of its answer."""
    by: Literal["reward", "verify", "judge"] = "reward"
    """reward: the one that the row has. verify: this run's, from the task's verifier. judge: a model that sees the
    question and what stands behind the thoughts of both, in both orders."""
    gold_field: str = "gold"
    """verify: field of the gold answer."""
    margin: float = setting(0.0, "[0, 1e9]")
    """reward, verify: the better one's reward is higher by more than this."""
    most: int = setting(1, "[0, 1e9]")
    """At most so many pairs of a question, drawn by run.seed; 0 = all."""
    ties: Literal["keep", "drop"] = "keep"
    """judge: pairs of which neither is better, or which changed places and verdict, are lines with `tie: true`, which
    job=reward_model leaves out, or none."""
    judge: JudgeConfig = section(JudgeConfig)

    def __post_init__(self) -> None:
        """Raise ValueError when a value is out of bounds, or cannot go with another."""
        check_limits(self, "prefer")
        if "" in self.paths:
            raise ValueError(f"prefer.paths={self.paths}: an empty path names no file; leave it out")
        if self.by == "judge" and not self.judge.url:
            raise ValueError(
                "prefer.judge.url=: prefer.by=judge needs an endpoint: prefer.judge.url=http://HOST:PORT/v1"
            )
        if self.by == "judge" and self.margin:
            raise ValueError(f"prefer.margin={self.margin:g}: prefer.by=judge compares no rewards; leave it out")
        if self.by != "judge" and self.ties == "drop":
            raise ValueError(f"prefer.ties=drop: prefer.by={self.by} makes no ties; leave it out")
        if self.by != "judge" and self.judge.url:
            raise ValueError(f"prefer.judge.url={self.judge.url}: prefer.by={self.by} asks nobody; say prefer.by=judge")


MIX_KEYS = {"path": str, "share": float, "prompt_field": str, "answer_field": str, "repeat": bool}


def _check_mix(key: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not {"path", "share"} <= entry.keys():
        raise ValueError(f"{key}={entry}: must be {{path: FILE, share: NUMBER}}")
    for name, value in entry.items():
        if name not in MIX_KEYS:
            raise ValueError(f"{key}.{name}={value}: unknown; must be one of {', '.join(MIX_KEYS)}")
        if name != "share" and (not isinstance(value, MIX_KEYS[name]) or value == ""):
            raise ValueError(f"{key}.{name}={value}: must be {'true or false' if name == 'repeat' else 'a text'}")
    share = entry["share"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"{key}.share={share}: must be a share of the result, in (0, 1)")
