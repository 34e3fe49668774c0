"""job=serve: one SGLang server of a trained model, for people and programs that speak OpenAI's API.

    launch ─► run_serve ─► Gateway (a thread): keys, bounds ─► the server
                       └─► Servers (one place) ─► serve.py's process tree

Its run directory holds the configuration, the server's log and summary.json, and nothing else. Invariant: it serves
until it is told to stop, or the server has died more than engine.max_restarts times; nothing outlives it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offtrail.core.types import Problem
from offtrail.platform.config.checkpoints import model_folder, run_folder
from offtrail.platform.config.compose import load_config
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.rundir import save
from offtrail.platform.config.schema import Config, PromptConfig, SglangConfig
from offtrail.platform.engines.sglang.flags import CONTEXT_MARGIN, url_of
from offtrail.platform.engines.sglang.health import served
from offtrail.platform.engines.sglang.lifecycle import UnhealthyError
from offtrail.platform.engines.sglang.serve import KEY_VARIABLE
from offtrail.platform.engines.sglang.servers import ServerError, Servers
from offtrail.platform.launcher.api_request import Bounds
from offtrail.platform.launcher.gateway import Gateway, Place
from offtrail.platform.launcher.reaper import reaped
from offtrail.platform.model.start import StartError, resolve
from offtrail.platform.model.text import Text, saved_template
from offtrail.platform.runtime.device import require_device
from offtrail.tasks.templates import task_template

LOOK_SECONDS = 0.2
"""Between two looks at the server, and for a signal of the user."""


def run_serve(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """job=serve: how it ended, and why: `interrupted` by the user, or `failed`."""
    save(run_dir)
    with reaped(config, run_dir):
        return serve(config, run_dir, interrupted)


def serve(config: Config, run_dir: Path, interrupted: list[int]) -> tuple[str, str]:
    """Until it is told to stop, or the server cannot be had."""
    try:
        require_device("engine.device", config.engine.device)
        model = served_model(config)
        text = text_of(config, model)
        served = folder_to_serve(text, model, run_dir)
        server = make_server(config, served, run_dir)
        gateway = make_gateway(config, model)
    except (ServerError, StartError, ValueError, OSError) as error:
        return "failed", str(error)
    print(f"starting SGLang on {model}", flush=True)
    try:
        server.start()
        example = request_of(config, model, text)
        announced = False
        while not interrupted:
            if not gateway.alive:
                return "failed", "the thread that listens for requests has ended; its last words are above"
            server.poll()
            gateway.server = server.address(0) if server.ready() else None
            if gateway.server is not None and not announced:
                announced = True
                announce(config, gateway, example)
            time.sleep(LOOK_SECONDS)
    except ServerError as error:
        return "failed", str(error)
    finally:
        gateway.close()
        server.close()
    return "interrupted", f"stopped by signal {interrupted[0]}"


def served_model(config: Config) -> Path:
    """The model folder that `checkpoint` means; without one that of the model which the servers of engine.urls serve,
    as far as it is here.
    """
    servers = {} if config.checkpoint else models_of_servers(config)
    if not servers:
        return model_folder(config.checkpoint) or resolve(config.checkpoint)
    url, told = next(iter(servers.items()))
    name = told["tokenizer_path"] or told["model_path"]
    try:
        return resolve(name)
    except StartError:
        raise StartError(
            f"engine.urls: {url} serves {name}, which is not here; name a folder with its tokenizer and config.json: "
            "checkpoint=DIR"
        ) from None


def models_of_servers(config: Config) -> dict[str, dict[str, str]]:
    """URL → what each server of engine.urls says of its model. Raises StartError where one does not."""
    found = {}
    for url in config.engine.urls if isinstance(config.engine, SglangConfig) else []:
        try:
            found[url] = served(url, os.environ.get(KEY_VARIABLE, ""))
        except UnhealthyError as error:
            raise StartError(f"engine.urls: {url} {error}") from None
    return found


def model_name(config: Config, model: Path) -> str:
    """The run's name and the step, or the folder's name."""
    run = run_folder(config.checkpoint)
    return f"{run.resolve().name}-{model.name}" if run is not None else Path(config.checkpoint).name


def make_gateway(config: Config, model: Path) -> Gateway:
    """What users of job=serve talk to. OSError and ValueError in the words of the command line."""
    serve = config.serve
    key = os.environ.get(KEY_VARIABLE, "") or secrets.token_hex(16)
    place = Place(serve.address, serve.port, key, model_name(config, model))
    try:
        return Gateway(place, Bounds(positions(model), vocabulary(model), serve.max_answers), serve.max_requests)
    except OSError as error:
        raise ServerError(
            f"serve.port={serve.port}: job=serve can have no port {serve.port} at {serve.address} ({error.strerror}); "
            "give it another"
        ) from None


def make_server(config: Config, model: Path, run_dir: Path) -> Servers:
    """One server that holds prompts and answers as long as the model's positions allow; not started yet.

    It streams token by token: people wait for it, and not the learner.
    """
    engine = config.engine
    assert isinstance(engine, SglangConfig)
    settings = dataclasses.replace(engine, address="127.0.0.1", stream_interval=1, router=False)
    return Servers(
        settings,
        model,
        owner=config.job,
        count=1,
        max_length=positions(model) - CONTEXT_MARGIN,
        threads=config.generator.threads,
        run_dir=run_dir,
        name=model_name(config, model),
    )


def positions(model: Path) -> int:
    """The most tokens that the model in a folder can hold. ValueError when its config.json does not say."""
    most = described(model).get("max_position_embeddings")
    if not isinstance(most, int) or most <= 2 * CONTEXT_MARGIN:
        raise ValueError(
            f"checkpoint={model}: config.json says max_position_embeddings={most}; a model that can be "
            "served holds more tokens than a dozen"
        )
    return most


def vocabulary(model: Path) -> int:
    """Token ids of the model in a folder are below it. ValueError when its config.json does not say."""
    size = described(model).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"checkpoint={model}: config.json says vocab_size={size}; a model that can be served has one")
    return size


def described(model: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    found = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def text_of(config: Config, model: Path) -> Text:
    """The model's tokenizer with prompts as they were in training: the command's `prompt`, where it says anything, else
    that of the run that made the checkpoint, else what stands in the checkpoint itself.
    """
    run = run_folder(config.checkpoint)
    prompt, template = config.prompt, saved_template(model)
    with contextlib.suppress(ConfigError, OSError):  # the run of another offtrail
        if run is not None:
            trained = load_config(run / "config.yaml")
            template = task_template(trained.task)
            prompt = trained.prompt if prompt == PromptConfig() else prompt
    return Text(model, prompt, task_template=template)


def folder_to_serve(text: Text, model: Path, run_dir: Path) -> Path:
    """The model's folder, with the tokenizer as `text` has it: a server reads chat template, BOS and stop tokens there.

    Its weights are links; what is written is in ``run_dir``.
    """
    folder = run_dir / "servers" / "model" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".json" and "index" not in file.name and file.is_file():
            shutil.copyfile(file, folder / file.name)
        elif file.suffix != ".jinja" and not file.is_dir():
            (folder / file.name).symlink_to(file.resolve())
    text.save_pretrained(folder)
    return folder


def request_of(config: Config, model: Path, text: Text) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """An example of a request by the model's name: (path, body). Chat where prompts go through a chat template, else a
    prompt of the run's task.
    """
    problem, room = example_problem(config), min(256, positions(model) // 2)

    def request(name: str) -> tuple[str, dict[str, Any]]:
        common = {"model": name, "max_tokens": room, "temperature": config.serve.temperature}
        if text.chats:
            messages = list(problem.messages) or [{"role": "user", "content": problem.prompt}]
            return "/v1/chat/completions", {**common, "messages": messages}
        return "/v1/completions", {**common, "prompt": problem.prompt}

    return request


def example_problem(config: Config) -> Problem:
    """A held-out problem of the task that the model was trained on, where that is known and at hand."""
    from offtrail.tasks.base import TaskError
    from offtrail.tasks.registry import make_task

    run = run_folder(config.checkpoint)
    with contextlib.suppress(ConfigError, TaskError, OSError):  # another offtrail's run, or its data are elsewhere now
        if run is not None:
            return make_task(load_config(run / "config.yaml").task, 0).held_out(1)[0]
    return Problem("serve", 0, "Hello", "")


def announce(config: Config, gateway: Gateway, example: Callable[[str], tuple[str, dict[str, Any]]]) -> None:
    """Say where the server is, what it wants, and how to ask it."""
    place, url = gateway.place, url_of(config.serve.address, gateway.port)
    path, body = example(place.model)
    table = Table.grid(padding=(0, 2))
    for left, right in {"url": f"{url}/v1", "model": place.model, "key": place.key, "stop": "Ctrl-C"}.items():
        table.add_row(left, right)
    Console().print(table, highlight=False)
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    print(
        f"\ncurl {url}{path} -H 'Authorization: Bearer {place.key}' -H 'Content-Type: application/json' -d {data}\n",
        flush=True,
    )
