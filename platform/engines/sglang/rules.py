"""The rules of engine=sglang and of the weight channels that reach its servers; platform/config/validate.py runs RULES.

No torch, no sglang, no network. A rule's name is its sentence; ConfigError names the key, its value and the way out.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.sglang import flags, versions


def engine_urls_are_servers(config: Config) -> None:
    """Servers that run already are taken as they are: offtrail decides neither their number nor what they run on."""
    engine = config.engine
    if not isinstance(engine, SglangConfig) or not engine.urls:
        return
    for url in engine.urls:
        if not flags.names_a_server(url):
            raise refuse("engine.urls", engine.urls, f"{url or '(empty)'} is no http(s)://HOST:PORT")
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise refuse("engine.urls", engine.urls, "names a server twice")
    defaults = SglangConfig()
    for key in ("servers", "tensor_parallel", "flags", "router"):
        if (value := getattr(engine, key)) != getattr(defaults, key):
            raise refuse(
                f"engine.{key}", value, "is for servers that offtrail starts, not for engine.urls; leave it out"
            )
    if config.job in ("serve", "chat"):
        raise refuse("engine.urls", engine.urls, f"job={config.job} starts its own server; leave it out")
    if config.generator.count > 1:
        raise refuse(
            "generator.count",
            config.generator.count,
            "must be 1 with engine.urls: a server takes its weights from one generator; it may have many requests",
        )
    if config.job == "rl" and config.eval.engine == "same":
        raise refuse("eval.engine", "same", "must be local with engine.urls: the generator has all the servers")


def engine_flags_are_the_users_own(config: Config) -> None:
    """engine.flags come last on a server's command line and win, so that some must not be among them."""
    engine = config.engine
    if isinstance(engine, SglangConfig) and (reason := flags.refused(engine.flags)):
        raise refuse("engine.flags", engine.flags, reason)


def engine_can_be_started(config: Config) -> None:
    """The installed SGLang is there and of a version that the settings can be had from; that of engine.urls says it
    when it is asked.
    """
    engine = config.engine
    if not isinstance(engine, SglangConfig) or engine.urls:
        return
    if missing := flags.missing_packages(engine):
        raise refuse(
            "engine.name",
            "sglang",
            f"{' and '.join(missing)} not installed; make sglang-cpu, or for a GPU pip install 'offtrail[sglang]'",
        )
    if reason := versions.refusal(versions.installed(), engine):
        raise ConfigError(reason)
    if engine.device == "cpu" and engine.tensor_parallel > 1:
        raise refuse("engine.tensor_parallel", engine.tensor_parallel, "needs engine.device=cuda: it counts GPUs")


def ipc_stays_on_one_device(config: Config) -> None:
    """The servers map the learner's own memory: one host, and the same kind of device."""
    if config.weights.channel != "ipc" or not isinstance(config.engine, SglangConfig):
        return
    kinds = [device.partition(":")[0] for device in (config.learner.device, config.engine.device)]
    if kinds[0] != kinds[1]:
        raise refuse(
            "weights.channel",
            "ipc",
            f"needs learner and engine on the same kind of device, not learner.device={config.learner.device} and "
            f"engine.device={config.engine.device}; take shm",
        )
    hosts = {urlsplit(url).hostname for url in config.engine.urls} | {config.engine.address}
    if far := sorted(host for host in hosts if host and not _is_here(host)):
        raise refuse("weights.channel", "ipc", f"needs every server on this host, not at {far[0]}; take distributed")


def _is_here(host: str) -> bool:
    if host in ("localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def exact_staleness_needs_a_wave(config: Config) -> None:
    """A broadcast comes to the servers when the learner has it, in the middle of the wave that exact mode samples."""
    if config.staleness.mode == "exact" and config.weights.channel == "distributed":
        raise refuse(
            "weights.channel",
            "distributed",
            "not with staleness.mode=exact: a push reaches servers when it is published, not between waves; take shm",
        )


def a_push_recomputes(config: Config) -> None:
    """Under kv_on_update=keep each version has a prompt cache of its own, and the generator says which one to use."""
    if config.weights.channel == "distributed" and config.engine.kv_on_update == "keep":
        raise refuse(
            "engine.kv_on_update",
            "keep",
            "not with weights.channel=distributed: at the moment of a push a new prompt could begin from keys and "
            "values of the version before; take recompute, or weights.channel=shm",
        )


def an_adapter_is_loaded_by_its_name(config: Config) -> None:
    """From a folder, by servers that came up with the start model; and a sample keeps the one that it was asked of."""
    if not config.publishes_adapters:
        return
    ours, channel, engine = "not with learner.lora.publish=adapter", config.weights.channel, config.engine
    if channel in ("ipc", "distributed"):
        raise refuse("weights.channel", channel, f"{ours}: servers read adapters from a folder; take shm or disk")
    if not isinstance(engine, SglangConfig):
        return
    if engine.urls:
        raise refuse("engine.urls", engine.urls, f"{ours}: nobody knows that they hold the start model; take merged")
    if engine.router:
        raise refuse("engine.router", True, f"{ours}: it does not know which server has loaded a version; leave it out")
    if engine.pause_mode == "retract":
        why = "a sample that is held goes on under the adapter that it began with; take auto or abort"
        raise refuse("engine.pause_mode", "retract", f"{ours}: {why}")
    if versions.parse(installed := versions.installed()) < versions.ADAPTERS:
        raise refuse(
            "learner.lora.publish",
            "adapter",
            f"has not been tried with SGLang {installed}; take merged, or a newer one",
        )


RULES: tuple[Callable[[Config], None], ...] = (
    engine_urls_are_servers,
    engine_flags_are_the_users_own,
    engine_can_be_started,
    ipc_stays_on_one_device,
    exact_staleness_needs_a_wave,
    a_push_recomputes,
    an_adapter_is_loaded_by_its_name,
)
