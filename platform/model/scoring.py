"""The models of scorer.models as a run uses them: what their own files say, and what the configuration says otherwise.

    scorer.models.NAME ───┐
    scores.json, layout ──┴► Scoring ──► generator (what a model is shown, and is asked) · scorer (what it answers)

No torch: the launcher reads them too, before any role starts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offtrail.platform.config.checkpoints import model_folder
from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config
from offtrail.platform.model.folder import TOKENIZERS, check_model, folder_of
from offtrail.platform.model.scores import FILE, ScoreSpec, spec_of
from offtrail.rewards.step_config import Aggregate

_SPEC = {field.name for field in dataclasses.fields(ScoreSpec)}


@dataclass(frozen=True)
class Scoring:
    """A model that scores, by its ``name`` in scorer.models; it is ``given`` as, and lies in ``folder``.

    ``aggregate``: what makes an answer's one score of those of its steps or tokens. ``empty``: the score of an answer
    that has nothing to read, NaN: it has none; None: the group of such an answer is refused.
    """

    name: str
    given: str
    folder: Path
    spec: ScoreSpec
    aggregate: Aggregate
    empty: float | None

    @property
    def key(self) -> str:
        """Of its folder, for errors."""
        return f"scorer.models.{self.name}.path"


def scorings(config: Config, *, unread: float | None = None) -> dict[str, Scoring]:
    """Name → model, as configured; ``unread`` is `empty` where an entry has none. Raises ConfigError, one line that
    names the key, where one cannot be read.
    """
    found = {name: _scoring(name, {"empty": unread, **entry}) for name, entry in config.scorer.models.items()}
    _check_steps(found.values())
    return found


def _scoring(name: str, entry: Mapping[str, Any]) -> Scoring:
    key, given = f"scorer.models.{name}.path", str(entry["path"])
    folder = model_folder(given, key) or folder_of(given)
    if folder is None:
        raise refuse(key, given, "no such model; give a run directory, a checkpoint or a Hugging Face model folder")
    check_model(key, given, folder, trained=False)
    told = {field: value for field, value in entry.items() if field in _SPEC}
    implicit = bool(told.get("beta")) and not (folder / FILE).is_file()
    spec = dataclasses.replace(ScoreSpec("tokens") if implicit else spec_of(folder, key, given), **told)
    if spec.beta and (not spec.reference or folder_of(spec.reference) is None):
        raise refuse(
            f"scorer.models.{name}.reference", spec.reference, "is no model folder; with beta the score is "
            "beta·log π/π_ref, and reference=DIR is π_ref"
        )  # fmt: skip
    one_a_token = spec.beta or spec.reads == "tokens"
    return Scoring(name, given, folder, spec, entry.get("aggregate", "sum" if one_a_token else "min"), entry["empty"])


def _check_steps(models: Iterable[Scoring]) -> None:
    """A group has one cut into steps."""
    first: Scoring | None = None
    for model in models:
        if model.spec.reads != "steps":
            continue
        first = first or model
        if (model.spec.steps, model.spec.of) != (first.spec.steps, first.spec.of):
            raise ConfigError(
                f"scorer.models.{model.name}.steps={model.spec.steps}: {first.name} has {first.spec.steps}, of the "
                f"{first.spec.of}, and a group is cut into steps once; give both the same steps and of"
            )


def check_tokenizers(models: Iterable[Scoring], policy: Path) -> None:
    """Raise ConfigError where a token is another one to a model than to the one in ``policy``: tokens go to it as they
    were sampled, and text is never tokenised again.
    """
    own: dict[str, int] = {}
    for model in models:
        own = own or vocabulary(policy)
        if not any((model.folder / name).is_file() for name in TOKENIZERS):
            raise refuse(
                model.key, model.given, "holds no tokenizer (tokenizer.json); copy it from where it was trained"
            )
        theirs = vocabulary(model.folder)
        other = next((token for token in own if theirs.get(token) != own[token]), None)
        if other is not None:
            there = f"{theirs[other]} there" if other in theirs else "none there"
            raise refuse(
                model.key, model.given, f"has another tokenizer than the run's model: {other!r} is token {own[other]} "
                f"here and {there}; take a model that was trained on this tokenizer"
            )  # fmt: skip


def vocabulary(folder: Path) -> dict[str, int]:
    """Token → id of the tokenizer in a Hugging Face directory."""
    file = folder / "tokenizer.json"
    if not file.is_file():  # slow to import, and rarely needed
        from transformers import AutoTokenizer

        return dict(AutoTokenizer.from_pretrained(folder).get_vocab())
    told = json.loads(file.read_text(encoding="utf-8"))
    vocab = (told.get("model") or {}).get("vocab") or {}
    known = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}  # Unigram
    return known | {token["content"]: token["id"] for token in told.get("added_tokens") or ()}
