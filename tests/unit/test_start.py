"""The cold-start cache: one checkpoint for each thing that decides the weights, and for nothing else."""

import dataclasses

from offtrail.platform.config.schema import Config, ModelConfig, SftConfig
from offtrail.platform.launcher.start import cache_dir, cache_key
from offtrail.tasks.config import AdditionConfig


def test_cache_key_is_decided_by_what_decides_the_weights():
    base = Config()
    changed = [
        dataclasses.replace(base, model=ModelConfig(layers=4)),
        dataclasses.replace(base, task=AdditionConfig()),
        dataclasses.replace(base, sft=SftConfig(lr=1e-3)),
    ]
    assert len({cache_key(c) for c in [base, *changed]}) == 4
    unrelated = [
        dataclasses.replace(base, model=ModelConfig(path="elsewhere")),
        dataclasses.replace(base, run=dataclasses.replace(base.run, name="x", seed=1)),
        dataclasses.replace(base, learner=dataclasses.replace(base.learner, steps=7)),
    ]
    assert {cache_key(c) for c in unrelated} == {cache_key(base)}


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFTRAIL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("OFFTRAIL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "offtrail"
