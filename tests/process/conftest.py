"""What several test files of servers share: two sets of weights, and a quick start."""

from __future__ import annotations

import subprocess
import types
from collections.abc import Iterator

import pytest
import warm

from fakes.client import VOCAB, Weights, build
from fakes.text import save_tokenizer


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Weights]:
    folder = tmp_path_factory.mktemp("sglang")
    made = []
    for seed in (0, 1):
        model = build(seed)
        model.save_pretrained(folder / str(seed))
        save_tokenizer(folder / str(seed), VOCAB)
        made.append(Weights(folder / str(seed), model))
    return made[0], made[1]


@pytest.fixture(scope="session", autouse=True)
def warm_servers() -> Iterator[None]:
    """Real servers that this process starts are forks of a warm one (warm.py)."""
    started = types.SimpleNamespace(**vars(subprocess) | {"Popen": warm.ServerPopen})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offtrail.platform.engines.sglang.child.subprocess", started)
        yield
    if warm.ServerPopen.kind in warm.RUNNING:
        warm.RUNNING[warm.ServerPopen.kind].close()
