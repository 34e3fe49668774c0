"""What an SGLang of some version can do. Called by platform/config/validate.py for the installed one, and by the engine
for the one that a running server says it is.
"""

from __future__ import annotations

import logging
import re
from importlib import metadata

from offtrail.platform.config.schema import SglangConfig

log = logging.getLogger("offtrail.sglang")

Version = tuple[int, int, int]

OLDEST: Version = (0, 5, 17)
NEWEST: Version = (0, 5, 21)
"""The newest that every test ran with."""
TELLS_VERSIONS: Version = (0, 5, 19)
"""Since then answers say which weights made which of their tokens (`weight_versions`)."""
RETRACTS: Version = (0, 5, 21)
NEEDS_SESSION: Version = (0, 5, 21)
ADAPTERS: Version = (0, 5, 21)
"""The oldest that versions of adapters were tried with."""


def installed() -> str:
    """The version of the installed package. PackageNotFoundError when there is none."""
    return metadata.version("sglang")


def parse(version: str) -> Version:
    """(0, 5, 21) of `0.5.21`, `0.5.21.post1` or `v0.5.21rc0`. ValueError on anything else."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"SGLang says that its version is {version!r}, which is none that offtrail can read")
    return int(match[1]), int(match[2]), int(match[3])


def can_retract(version: str) -> bool:
    """Whether a pause may hold samples while the cache is emptied; older servers die of an assertion then."""
    return parse(version) >= RETRACTS


def needs_session(version: str) -> bool:
    """Whether tensor and distributed updates must stand between begin_weight_update and end_weight_update."""
    return parse(version) >= NEEDS_SESSION


def refusal(version: str, config: SglangConfig) -> str | None:
    """Why these settings cannot be had from an SGLang of this version, as `key=value: reason`; None when they can.

    A version newer than the tests knew is taken, with a warning.
    """
    number = parse(version)
    if number < OLDEST:
        return f"engine.name=sglang: SGLang {version} is too old; install {_text(OLDEST)} … {_text(NEWEST)}"
    if number > NEWEST:
        log.warning("SGLang %s is newer than %s, the newest that offtrail was tested with", version, _text(NEWEST))
    if config.kv_on_update == "keep" and number < TELLS_VERSIONS:
        return (
            f"engine.kv_on_update=keep: SGLang {version} does not say which weights made a token of an answer that "
            f"spans an update; take recompute, or SGLang ≥ {_text(TELLS_VERSIONS)}"
        )
    if config.pause_mode == "retract" and number < RETRACTS:
        return (
            f"engine.pause_mode=retract: SGLang {version} dies when its cache is emptied while it holds samples; take "
            f"auto or abort, or SGLang ≥ {_text(RETRACTS)}"
        )
    return None


def _text(version: Version) -> str:
    return ".".join(map(str, version))
