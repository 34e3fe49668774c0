"""What a finished group must be, beside the versions of its tokens (admission.py): what neither the learner nor the
archive could work with is refused on arrival, where one group is lost by it and not the run.

    scheduler.arrive ──► GroupRules.broken_by(group) ──► "" | why it is refused as `failed`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from offtrail.core.types import Group
from offtrail.platform.config.schema import Config

CLOSE = 1e-6
"""Temperatures that differ by less are one: they travel as float64, and the archive keeps float32."""


@dataclass(frozen=True, slots=True)
class GroupRules:
    """``temperature``: the run's (I5). ``longest``: prompt and answer in tokens, 0 = any. ``channel``: the scores that
    algo.process reads, "" = none. ``vocab_size``: what token ids stay below, None = not known.
    """

    temperature: float = 1.0
    longest: int = 0
    channel: str = ""
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: Config, run_dir: Path) -> GroupRules:
        """The rules of a run's configuration and start model."""
        return cls(
            temperature=config.sampling.temperature,
            longest=config.model.max_length,
            channel=config.algo.process.channel,
            vocab_size=vocabulary_of(run_dir / "start"),
        )

    def broken_by(self, group: Group) -> str:
        """Why the group may not be trained, or "". Its own shapes and values are checked already (Group.check)."""
        if not abs(group.temperature - self.temperature) <= CLOSE:
            return f"sampled at temperature {group.temperature}, not sampling.temperature={self.temperature}"
        longest = len(group.prompt_tokens) + int(group.lengths.max())
        if self.longest and longest > self.longest:
            return f"a prompt and its answer take {longest} tokens, above model.max_length={self.longest}"
        return self.without_channel(group)

    def without_channel(self, group: Group) -> str:
        """Why the learner could make no advantages of the group, or ""."""
        channel = group.channels.get(self.channel)
        if self.channel and (channel is None or channel.axis not in ("step", "token")):
            found = {name: made.axis for name, made in group.channels.items()}
            return (
                f"algo.process.channel={self.channel}: no such channel of axis step or token, but "
                f"{found or 'none at all'}; name one that the run's driver or scorer makes, or leave it empty"
            )
        return ""


def vocabulary_of(model: Path) -> int | None:
    """How many token ids a Hugging Face directory's model has, by its config.json; None where that does not say."""
    try:
        told = json.loads((model / "config.json").read_text(encoding="utf-8"))
        size = told.get("vocab_size", told.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None
