"""What several test files of servers share: two sets of weights."""

from __future__ import annotations

import pytest

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
