"""job=chat and job=serve as a user runs them: what is said is what the model says, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import warm
from transformers import AutoTokenizer

from leftovers import alive
from offtrail.core.protocols import Request
from offtrail.core.types import Sampling
from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.schema import LocalConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.checkpoint import TrainerState
from offtrail.platform.model.policy import load_model
from offtrail.platform.runtime.attempt import shared_files
from offtrail.platform.runtime.context import own_name

from .conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}q{% endif %}"
"""After a q the start model says some more of them, and then z, which ends an answer of `chat_model`."""
STOP = "z"
POSITIONS = 256
Greedy = Callable[..., str]


def chat(
    lines: str, *overrides: str, cwd: Path, run: Callable[..., subprocess.CompletedProcess[str]] = warm.run
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "job=chat", *overrides]
    return run(command, input=lines, timeout=280, cwd=cwd)


from_nothing = partial(subprocess.run, capture_output=True, text=True)


@pytest.fixture(scope="module")
def chat_model(start_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The start model with a chat format."""
    folder = tmp_path_factory.mktemp("chat") / "talker"
    shutil.copytree(start_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(start_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(STOP)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


@pytest.fixture(scope="module")
def greedy(start_dir: Path) -> Greedy:
    """Called with a prompt's text: the answer of the start model at temperature 0, until ``stop`` or full."""
    engine = LocalEngine(start_dir, LocalConfig(max_running=1), max_length=POSITIONS, threads=1)
    tokenizer = AutoTokenizer.from_pretrained(start_dir)

    def answer(prompt: str, stop: str = "", room: int = POSITIONS) -> str:
        tokens = np.array(tokenizer.encode(prompt, add_special_tokens=False), np.int32)
        stops = tuple(tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", *stop))
        engine.generate([Request(1, tokens, 1, Sampling(room - len(tokens), temperature=0.0, stop_token_ids=stops))])
        while not (done := engine.step()):
            pass
        return str(tokenizer.decode([token for token in done[0].tokens.tolist() if token not in stops]))

    return answer


def test_lines_of_a_pipe_are_prompts_by_themselves(start_dir: Path, greedy: Greedy, tmp_path: Path) -> None:
    lines = "1+1\n\nHELLO\n1+1\n7;+5;%10=?\n/quit\n1+1\n"
    done = chat(lines, f"checkpoint={start_dir}", "serve.temperature=0", cwd=tmp_path, run=from_nothing)
    assert done.returncode == 0, done.stderr
    unreadable = "the tokenizer does not know all of 'HELLO'"
    same, other = greedy("1+1"), greedy("7;+5;%10=?")
    assert done.stdout == f"{same}\n{unreadable}\n{same}\n{other}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_asked_in_the_format_of_its_task(start_dir: Path, greedy: Greedy, tmp_path: Path) -> None:
    """…by its newest checkpoint."""
    (tmp_path / "problems.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n')
    settings = ["task=gsm8k", f"task.path={tmp_path / 'problems.jsonl'}", "task.template=<think>{prompt}="]
    run = tmp_path / "runs" / "one"
    for name, model in {"start": None, "checkpoints/step_9": None, "checkpoints/step_10": start_dir}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if model is None:
            (run / name).mkdir()
            (run / name / "config.json").write_text("{}")  # a model that cannot be opened
        else:
            shutil.copytree(model, run / name)
    (run / "config.yaml").write_text(to_yaml(compose(settings)))
    done = chat("2+3\n", "checkpoint=runs/one", "serve.temperature=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, greedy("<think>2+3=") + "\n"), done.stderr


def test_a_chat_format_makes_a_conversation(chat_model: Path, greedy: Greedy, tmp_path: Path) -> None:
    lines = "2+3\n4\n/reset\n2+3\n" + "9" * 300 + "\n"
    done = chat(lines, f"checkpoint={chat_model}", "serve.temperature=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = greedy("user:2+3;q", STOP)
    two = greedy(f"user:2+3;assistant:{one};user:4;q", STOP)
    alone = greedy("user:4;q", STOP)
    assert 0 < len(one) < 60
    assert two != alone
    full = (
        f"{len(f'user:2+3;assistant:{one};user:;q') + 300} tokens, and the model holds {POSITIONS}: /reset begins anew"
    )
    assert done.stdout == f"{one}\n{two}\n{one}\n{full}\n"


@pytest.mark.prove
def test_a_server_gives_the_same_answers_as_the_embedded_engine(
    chat_model: Path, greedy: Greedy, tmp_path: Path
) -> None:
    done = chat("2+3\n4\n", f"checkpoint={chat_model}", "engine=sglang", "serve.temperature=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = greedy("user:2+3;q", STOP)
    assert done.stdout == f"{one}\n{greedy(f'user:2+3;assistant:{one};user:4;q', STOP)}\n"
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"chat-\d{8}-\d{6}", run.name)
    assert not any(run.name in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def save_checkpoint(start_dir: Path, run_dir: Path) -> Path:
    """What a learner writes, its optimizer's state and all: SGLang must not take that for weights."""
    model = load_model(start_dir)
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    moments = {f"{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in parameters.items()}
    run_dir.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(start_dir)
    return checkpoint.write(run_dir, TrainerState(3, 6), model, tokenizer, parameters, moments, {})


def test_a_checkpoint_is_served_until_it_is_told_to_stop(start_dir: Path, greedy: Greedy, tmp_path: Path) -> None:
    key = "a-key-of-mine"
    saved = save_checkpoint(start_dir, tmp_path / "runs" / "trained")
    settings = ["job=serve", f"checkpoint={saved}", "serve.port=0", "run.name=api"]
    with warm.Popen(
        [sys.executable, str(ROOT / "launch.py"), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"OFFTRAIL_SGLANG_KEY": key},
    ) as served:  # fmt: skip
        try:
            assert served.stdout is not None
            said = []
            while not (said and said[-1].startswith("curl ")):
                said.append(served.stdout.readline())
                assert said[-1], served.stderr and served.stderr.read()
            shown = dict(line.split() for line in said if re.match(r"(url|model|key)\s", line))
            assert (shown["model"], shown["key"]) == (saved.name, key)
            curl = shlex.split(said[-1])  # works as it is printed
            assert curl[1] == f"{shown['url']}/completions"
            assert f"Authorization: Bearer {key}" in curl
            assert post(curl[1], key, json.loads(curl[curl.index("-d") + 1]))[0] == 200
            ask = {"model": saved.name, "prompt": "1+1", "temperature": 0, "max_tokens": 40}
            status, answer = post(curl[1], key, ask)
            assert (status, answer["choices"][0]["text"]) == (200, greedy("1+1", room=43))
            assert post(curl[1], "wrong", ask)[0] == 401
            judged(shown["url"], key, saved.name, greedy, tmp_path)
            family = psutil.Process(served.pid).children(recursive=True)
            served.send_signal(signal.SIGINT)
            assert served.wait(PATIENCE_S) == 130
        finally:
            served.kill()
    assert len(family) >= 3
    assert not any(alive(process) for process in family)
    run = tmp_path / "runs" / "api"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml", "logs", "servers", "summary.json"]
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"


def judged(url: str, key: str, model: str, greedy: Greedy, folder: Path) -> None:
    """A served model is asked which answer is better (job=prefer): in both orders, and what it says is kept."""
    rows = [{"prompt": "1+1", "answer": f"<think>%</think>{answer}"} for answer in (2, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        "job=prefer", "run.name=pairs", "prefer.paths=[rows.jsonl]", "prefer.by=judge", f"prefer.judge.url={url}",
        f"prefer.judge.model={model}", "prefer.judge.api=completions", "prefer.judge.prompt={question}={a};{b}",
        "prefer.judge.max_tokens=40",
    ]  # fmt: skip
    environment = os.environ | {"OFFTRAIL_JUDGE_KEY": key}
    done = warm.run([sys.executable, str(ROOT / "launch.py"), *settings], 280, cwd=folder, env=environment)
    assert done.returncode == 1, done.stdout
    assert "2 rows make no pair (1 unreadable)" in done.stderr  # it is no judge
    [verdict] = map(json.loads, (folder / "runs" / "pairs" / "verdicts.jsonl").read_text().splitlines())
    texts = {
        name: greedy(prompt, room=len(prompt) + 40) for name, prompt in (("straight", "1+1=2;3"), ("turned", "1+1=3;2"))
    }
    assert verdict == {"pair": [0, 1]} | texts


@pytest.mark.prove
def test_nothing_of_a_served_model_outlives_a_killed_launcher(start_dir: Path, tmp_path: Path) -> None:
    """No process of a real server, whatever session it is in, nor its temporary folder and what they share there."""
    saved = save_checkpoint(start_dir, tmp_path / "runs" / "trained")
    settings = ["job=serve", f"checkpoint={saved}", "serve.port=0", "run.name=api"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *settings], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as served:
        assert served.stdout is not None
        while not (line := served.stdout.readline()).startswith("curl "):
            assert line
        family = psutil.Process(served.pid).children(recursive=True)
        temporary = f"{own_name(tmp_path / 'runs' / 'api')}-*"
        assert len(family) >= 4  # server, scheduler, detokenizer, reaper
        assert list(Path(tempfile.gettempdir()).glob(f"{temporary}/sglang_loads_*"))
        assert not shared_files(family)
        served.kill()
    psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not any(alive(process) for process in family)
    assert not list(Path(tempfile.gettempdir()).glob(temporary))


def post(url: str, key: str, body: dict[str, Any]) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None


def test_a_port_that_is_taken_is_said_before_the_model_loads(start_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = [sys.executable, str(ROOT / "launch.py"), "job=serve", f"checkpoint={start_dir}", f"serve.port={port}"]
        done = warm.run(line, 120, cwd=tmp_path)
    assert done.returncode == 1
    assert f"can have no port {port} at 127.0.0.1 (Address already in use)" in done.stderr
