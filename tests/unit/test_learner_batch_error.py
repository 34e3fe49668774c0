"""On which batch the learner has failed, and whether the batch was to blame."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offtrail.core.types import Batch
from offtrail.platform.config.schema import Config
from offtrail.platform.learner.objectives import StalenessError
from offtrail.platform.learner.role import BatchError, Learner
from offtrail.platform.learner.train import DivergedError
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.runtime.process import report_failure
from offtrail.platform.wire import sockets
from offtrail.platform.wire.messages import Failure


def train(error: Exception, batch: object = Batch(7, ())) -> Any:
    def step(number: int, batch: object) -> None:
        raise error

    return Learner.train(SimpleNamespace(trainer=SimpleNamespace(step=step), step=7), batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [DivergedError("nan"), IndexError("token 99"), ValueError("x"), StalenessError("old")]
)
def test_a_fault_of_the_batch_names_its_step_and_the_way_out(error: Exception) -> None:
    with pytest.raises(BatchError, match=r"batch 7 cannot be trained \(.*\); run\.resume=true goes on") as raised:
        train(error)
    assert raised.value.batch == 7


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), OSError("no space"), RuntimeError("NCCL"),
     KeyError("x"), TypeError("x"), AssertionError("x")],
)  # fmt: skip
def test_a_full_memory_a_disk_a_network_or_a_bug_is_not_the_batchs_fault(error: Exception) -> None:
    with pytest.raises(type(error)):
        train(error)


def test_data_of_the_learners_own_is_not_a_batch_that_a_launch_could_go_on_without() -> None:
    with pytest.raises(DivergedError):
        train(DivergedError("nan"), batch=object())


@pytest.mark.parametrize(("error", "batch"), [(BatchError(7, ValueError("x")), 7), (RuntimeError("x"), -1)])
def test_the_broker_is_told_on_which_batch_the_learner_has_failed(
    error: Exception, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = []

    class Line:
        def __init__(self, *_: object) -> None:
            pass

        def request(self, message: object, **_: object) -> None:
            told.append(message)

        def close(self) -> None:
            pass

    monkeypatch.setattr(sockets, "Client", Line)
    monkeypatch.setattr(sockets.Endpoint, "read", lambda *_: None)
    monkeypatch.setattr(sockets.ClientKeys, "read", lambda *_: None)
    report_failure(RoleContext(Config(), tmp_path, "learner", 0), error)
    [failure] = [message for message in told if isinstance(message, Failure)]
    assert (failure.role, failure.batch) == ("learner", batch)
    assert str(error) in failure.error
