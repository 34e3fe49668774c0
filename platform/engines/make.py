"""Which engine a role drives: the configuration's, or the embedded one for an evaluator that is told so."""

from __future__ import annotations

from dataclasses import fields, replace

from offtrail.core.protocols import Engine
from offtrail.platform.config.keys import QUESTIONING
from offtrail.platform.config.schema import EngineConfig, LocalConfig, SglangConfig
from offtrail.platform.runtime.context import RoleContext


def make_engine(context: RoleContext, *, loaded: bool = True) -> Engine:
    """The engine of one generator, of the evaluator or of the refresher, over the start model; an embedded one that is
    not ``loaded`` has no weights before `load_weights`.
    """
    config, evaluates = context.config, context.role == "evaluator"
    refresh = config.scorer.refresh if context.role == "refresher" else None
    threads = config.eval.threads if evaluates else refresh.threads if refresh else config.generator.threads
    longest = config.model.max_length
    if isinstance(config.engine, SglangConfig) and not (evaluates and config.eval.engine == "local"):
        from offtrail.platform.engines.sglang.engine import SglangEngine  # aiohttp: only where it is used

        return SglangEngine(
            context.start_model,
            replace(config.engine, device=first_device(config.engine, config.generator.count, context)),
            max_length=longest,
            threads=threads,
            owner=f"{context.role}-{context.index}",
            count=1 if evaluates else config.engine.servers,
            run_dir=context.run_dir,
            as_it_is=config.job in QUESTIONING,
            adapters=config.learner.lora if config.publishes_adapters else None,
        )
    start, local = context.start_model, local_config(config.engine)
    local = replace(local, device=refresh.device) if refresh else local
    if config.publishes_adapters:
        from offtrail.platform.engines.adapters import AdaptedEngine

        return AdaptedEngine(start, local, config.learner.lora, max_length=longest, threads=threads, loaded=loaded)
    from offtrail.platform.engines.local import LocalEngine

    return LocalEngine(start, local, max_length=longest, threads=threads, loaded=loaded)


def local_config(engine: EngineConfig) -> LocalConfig:
    """The embedded engine's settings: also beside another engine, whose device, dtype and numbers it then shares."""
    if isinstance(engine, LocalConfig):
        return engine
    shared = {field.name: getattr(engine, field.name) for field in fields(EngineConfig)}
    return LocalConfig(**shared | {"name": "local"})


def first_device(engine: SglangConfig, generators: int, context: RoleContext) -> str:
    """Where the servers of this role begin: each generator's after those of the one before, the evaluator's last."""
    kind, _, number = engine.device.partition(":")
    if kind != "cuda":
        return engine.device
    beside = context.role == "evaluator" and context.config.job == "rl"  # else it has the machine for itself
    before = generators if beside else context.index
    return f"cuda:{int(number or 0) + before * engine.servers * engine.tensor_parallel}"
