"""On which batch the learner has failed, and whether the batch was to blame."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offtrail.platform.learner.objectives import StalenessError
from offtrail.platform.learner.role import BatchError, Learner
from offtrail.platform.learner.train import DivergedError


def train(error: Exception) -> Any:
    def step(number: int, batch: object) -> None:
        raise error

    return Learner.train(SimpleNamespace(trainer=SimpleNamespace(step=step), step=7), object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [DivergedError("nan"), IndexError("token 99"), ValueError("x"), StalenessError("old")]
)
def test_a_fault_of_the_batch_names_its_step_and_the_way_out(error: Exception) -> None:
    with pytest.raises(BatchError, match=r"batch 7 cannot be trained \(.*\); run\.resume=true goes on") as raised:
        train(error)
    assert raised.value.batch == 7


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError("no space"), RuntimeError("NCCL")])
def test_a_full_memory_a_disk_or_a_network_is_not_the_batchs_fault(error: Exception) -> None:
    with pytest.raises(type(error)):
        train(error)
