"""The table of roles: what a job starts, and that every key it names is one of the configuration's."""

from __future__ import annotations

import importlib.util
from typing import get_args, get_type_hints

import pytest

from offtrail.platform.config.keys import flatten
from offtrail.platform.config.schema import Config
from offtrail.platform.runtime.roles import JOBS, ROLES, role_of, roles_of


def test_the_default_run_starts_the_broker_first_and_one_of_each() -> None:
    assert [spec.name for spec in roles_of(Config())] == ["broker-0", "learner-0", "generator-0", "evaluator-0"]


def test_counts_threads_ranks_and_restarts_are_those_of_the_configuration() -> None:
    config = Config()
    config.learner.ranks, config.learner.threads = 2, 3
    config.generator.count, config.generator.max_restarts, config.eval.max_restarts = 3, 5, 0
    found = {spec.name: (spec.threads, spec.world, spec.restarts, spec.device) for spec in roles_of(config)}
    assert found == {
        "broker-0": (1, 0, 0, ""),
        **{f"learner-{i}": (3, 2, 0, "learner.device") for i in range(2)},
        **{f"generator-{i}": (1, 0, 5, "engine.device") for i in range(3)},
        "evaluator-0": (1, 0, 0, "engine.device"),
    }


def test_scorers_are_started_where_a_model_scores() -> None:
    config = Config()
    config.scorer.count, config.scorer.threads, config.scorer.max_restarts = 2, 3, 1
    assert "scorer" not in {spec.role for spec in roles_of(config)}
    config.scorer.models = {"rm": {"path": "DIR"}}
    found = [(spec.name, spec.threads, spec.device, spec.restarts) for spec in roles_of(config)]
    assert found[2:4] == [(f"scorer-{i}", 3, "scorer.device", 1) for i in range(2)]


def test_every_key_of_the_table_is_a_key_and_every_role_has_a_module() -> None:
    keys = flatten(Config())
    for row in ROLES:
        assert all(key in keys for key in (row.count, row.threads, row.device, row.restarts, row.needed) if key), row
        assert importlib.util.find_spec(f"offtrail.platform.{row.role}.role") is not None


def test_jobs_are_jobs_of_the_configuration_and_name_rows_of_the_table() -> None:
    assert set(JOBS) <= set(get_args(get_type_hints(Config)["job"]))
    assert {role for roles in JOBS.values() for role in roles} <= {row.role for row in ROLES}


def test_a_process_that_the_job_has_not_is_refused() -> None:
    assert role_of(Config(), "generator", 0).restarts_key == "generator.max_restarts"
    with pytest.raises(ValueError, match=r"^job=rl has no role generator-1: its roles are broker, learner"):
        role_of(Config(), "generator", 1)
