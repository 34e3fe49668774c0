"""job=chat: talk with a trained model in the terminal, or put lines to it from a pipe.

    lines ─► Conversation ─► prompt tokens ─► Local (the embedded engine) | Served (an SGLang server) ─► pieces of text

Invariant: the model reads the very tokens that it was trained on: through its chat template where it was trained with
one, turn after turn; else each line by itself. A line that begins is put as a problem of the run's task is. Every
answer may be cut by Ctrl-C and stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import readline  # noqa: F401  (arrow keys and history at the prompt)
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rich.console import Console

from offtrail.core.protocols import Request
from offtrail.core.types import Int32, Problem, Sampling
from offtrail.platform.config.rundir import prepare
from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.make import local_config
from offtrail.platform.engines.sglang.flags import CONTEXT_MARGIN
from offtrail.platform.engines.sglang.servers import ServerError, Servers
from offtrail.platform.launcher.reaper import Reaper
from offtrail.platform.launcher.serve import LOOK_SECONDS, make_server, positions, served_model, text_of
from offtrail.platform.model.start import StartError
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.device import require_device
from offtrail.tasks.base import TaskError

LOCAL_LENGTH = 8192
"""The longest conversation, in tokens, that the embedded engine keeps room for."""


class CutError(Exception):
    """An answer that does not go on, through no wish of the user; the next one may."""


class UnreadableError(Exception):
    """A line that cannot be put to the model."""


class Answers(Protocol):
    """What makes the answer to a prompt."""

    longest: int
    """The most tokens of prompt + answer."""

    def answer(self, prompt: Int32) -> Generator[str]:
        """Pieces of the answer to prompt tokens [P], which leave room; closing the iterator ends the answer. CutError
        when it breaks off.
        """

    def close(self) -> None:
        """Give back what makes answers."""


def chat(config: Config) -> int:
    """job=chat: until the end of the input or /quit; the exit status of the command."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        require_device("engine.device", config.engine.device)
        model = served_model(config)
        text = text_of(config, model)
        with contextlib.closing(make_answers(config, model, text, console)) as answers:
            talk(Conversation(text), answers, console)
    except KeyboardInterrupt:
        return 130
    except (ServerError, StartError, ValueError, OSError) as error:
        print(f"offtrail: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_answers(config: Config, model: Path, text: Text, console: Console) -> Answers:
    """The embedded engine, or with engine=sglang a server in a run directory of its own."""
    if isinstance(config.engine, SglangConfig):
        return Served(config, model, text, console)
    return Local(config, model, text)


def talk(conversation: Conversation, answers: Answers, console: Console) -> None:
    """The loop: a line, its answer."""
    if sys.stdin.isatty():
        kind = "a conversation" if conversation.chats else "each line is a prompt by itself"
        console.print(f"{kind}; /reset begins anew, /quit or Ctrl-D ends, Ctrl-C cuts an answer", style="dim")
    for line in lines():
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        try:
            prompt = conversation.prompt(line, answers.longest)
        except UnreadableError as error:
            console.print(str(error), style="red")
            continue
        with contextlib.closing(answers.answer(prompt)) as answer:
            conversation.note(line, show(answer, console))


def lines() -> Iterator[str]:
    """Lines of the terminal, asked for, or of whatever is piped in; empty ones are passed over."""
    while True:
        try:
            line = input("» ") if sys.stdin.isatty() else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line


def show(pieces: Iterator[str], console: Console) -> str:
    """Print an answer as it comes; the whole of it, or what there was of it when it was cut."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            console.print(printable(piece), end="")
            console.file.flush()
    except CutError as error:
        console.print(f"… {error}", style="red", end="")
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    console.print()
    return answer


def printable(text: str) -> str:
    """The text without what a terminal would obey: a model may write anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Conversation:
    """What was said, and how the model is told. Without a chat format every line stands alone."""

    def __init__(self, text: Text) -> None:
        self.text, self.chats = text, text.chats
        self._turns: tuple[Mapping[str, str], ...] = ()

    def reset(self) -> None:
        """Forget what was said."""
        self._turns = ()

    def note(self, line: str, answer: str) -> None:
        """Remember a line and the answer to it."""
        if self.chats:
            asked = self._asked(line)
            self._turns = (*asked.messages, {"role": "assistant", "content": self.text.opened(asked) + answer})

    def prompt(self, line: str, longest: int) -> Int32:
        """Prompt tokens [P] of the next answer. UnreadableError when the model cannot read it or it leaves no room."""
        if not self.text.knows(line):
            raise UnreadableError(f"the tokenizer does not know all of {line[:60]!r}")
        try:
            tokens = self.text.encode(self._asked(line))
        except TaskError as error:
            raise UnreadableError(str(error)) from None
        if len(tokens) >= longest:
            raise UnreadableError(f"{len(tokens)} tokens, and the model holds {longest}: /reset begins anew")
        return tokens

    def _asked(self, line: str) -> Problem:
        """A line as a problem of the run's task is put: the first of a conversation, or each that stands alone."""
        told = line if self._turns else self.text.task_template.replace("{prompt}", line)
        messages = (*self._turns, {"role": "user", "content": told}) if self.chats else ()
        return Problem("chat", 0, told, "", messages=messages)


class Local:
    """The embedded engine. It gives whole answers."""

    def __init__(self, config: Config, model: Path, text: Text) -> None:
        from offtrail.platform.engines.local import LocalEngine  # torch: only where it is used

        self.longest = min(positions(model), LOCAL_LENGTH)
        self._engine = LocalEngine(
            model,
            dataclasses.replace(local_config(config.engine), max_running=1),
            max_length=self.longest,
            threads=config.generator.threads,
        )
        self._text = text
        self._temperature, self._seed, self._asked = config.serve.temperature, config.run.seed, 0

    def answer(self, prompt: Int32) -> Generator[str]:
        """One piece; at Ctrl-C what there is of it."""
        sampling = Sampling(
            max_new_tokens=self.longest - len(prompt),
            temperature=self._temperature,
            stop_token_ids=self._text.stop_token_ids,
            seed=self._seed,
        )
        self._asked += 1
        self._engine.generate([Request(self._asked, prompt, 1, sampling)])
        try:
            while not (done := self._engine.step()):
                pass
        except KeyboardInterrupt:
            yield self._text.decode(self._engine.abort()[0].tokens)
            raise
        yield self._text.decode(done[0].tokens)

    def close(self) -> None:
        """Drop the engine."""
        self._engine.close()


class Served:
    """An SGLang server, asked through its OpenAI API. It gives an answer token by token."""

    def __init__(self, config: Config, model: Path, text: Text, console: Console) -> None:
        run_dir, self._lock = prepare(config)
        self._reaper = Reaper(run_dir)
        self.longest = positions(model) - CONTEXT_MARGIN
        self._server: Servers = make_server(config, model, run_dir)
        self._console, self._temperature = console, config.serve.temperature
        self._patience = config.engine.hang_seconds if isinstance(config.engine, SglangConfig) else None
        self._stop = list(text.stop_token_ids)
        try:
            self._server.start()
            self._wait()
        except BaseException:
            self.close()
            raise

    def answer(self, prompt: Int32) -> Generator[str]:
        """Pieces as they come. ServerError when the server died and cannot be started anew."""
        self._wait()
        address = self._server.address(0)
        parts = urlsplit(address.url)
        body = {
            "prompt": prompt.tolist(),
            "max_tokens": self.longest - len(prompt),
            "temperature": self._temperature,
            "stop_token_ids": self._stop,
            "skip_special_tokens": False,  # tags such as <think> may be special tokens
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {address.key}", "Content-Type": "application/json"}
        line = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=self._patience)
        with contextlib.closing(line) as connection:
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                yield from pieces(connection.getresponse())
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                raise CutError(f"the server broke off ({type(error).__name__})") from None

    def close(self) -> None:
        """End the server."""
        self._server.close()
        self._reaper.sweep()
        self._reaper.close()
        self._lock.close()

    def _wait(self) -> None:
        """Until the server is up; it may have died since the last answer."""
        self._server.poll()
        if self._server.ready():
            return
        shown = self._console.status("SGLang starts…") if sys.stdin.isatty() else contextlib.nullcontext()
        with shown:
            while not self._server.ready():
                self._server.poll()
                time.sleep(LOOK_SECONDS)


def pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    """The texts of a streamed completion (server-sent events). CutError when the server refuses it."""
    if response.status != 200:
        raise CutError(f"the server answers {response.status}: {response.read(300).decode(errors='replace')}")
    for line in response:
        data = line.decode().strip().removeprefix("data:").strip()
        if not data or data == "[DONE]":
            continue
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise CutError(f"the server answers {event['error']}")
        yield from (choice["text"] for choice in event["choices"] if choice["text"])
