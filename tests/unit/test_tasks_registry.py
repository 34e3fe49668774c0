"""The registry of tasks."""

from __future__ import annotations

import pytest

from offtrail.tasks.base import TaskError
from offtrail.tasks.config import TaskConfig
from offtrail.tasks.jsonl import JsonlConfig
from offtrail.tasks.registry import families, make_task


def test_every_task_name_makes_a_task():
    for name, kind in families().items():
        assert make_task(kind.Config(), 0, load=False).name == name
    with pytest.raises(TaskError, match=r"task\.path is empty"):
        make_task(JsonlConfig(), 0)
    with pytest.raises(TaskError, match=r"task=chess: no such task; choose one of addition, chain"):
        make_task(TaskConfig(name="chess"), 0)
