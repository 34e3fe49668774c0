"""A judge: a model behind an endpoint with OpenAI's API, asked which of two answers is better, in both orders.

    (number, Shown) ─► two requests, one with the answers in each other's place ─► note(number, Verdict)

It is shown the question and the answers as they are handed in: what stands behind a thought is the caller's to cut.
Invariant: a reply is what the endpoint said; none is made up for one that could not be had.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import aiohttp

from offtrail.platform.launcher.asking import StoppedError
from offtrail.tasks.data_config import JudgeConfig
from offtrail.tasks.pairs import Verdict

KEY_VARIABLE = "OFFTRAIL_JUDGE_KEY"
LOOK_SECONDS = 0.2
"""Between two looks for a signal."""
PAUSE_SECONDS = 1.0
"""Before the second request of a reply that could not be had; twice as long before each further one."""
BUSY = {408, 409, 425, 429}
"""What an endpoint answers that may be asked the same again, as all of 500 and more."""


class JudgeError(ValueError):
    """The endpoint cannot be asked, or what it says cannot be read."""


class Shown(NamedTuple):
    """What a judge sees."""

    question: str
    first: str
    second: str


def judge(
    config: JudgeConfig,
    pairs: Iterable[tuple[int, Shown]],
    note: Callable[[int, Verdict], None],
    interrupted: list[int],
) -> None:
    """Have every pair judged; ``note`` hears of each when it is. Raises JudgeError, and StoppedError after a signal."""
    asyncio.run(_judge(config, pairs, note, interrupted))


async def _judge(
    config: JudgeConfig,
    pairs: Iterable[tuple[int, Shown]],
    note: Callable[[int, Verdict], None],
    interrupted: list[int],
) -> None:
    key = os.environ.get(KEY_VARIABLE, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=config.seconds)
    coming, running = iter(pairs), set[asyncio.Task[tuple[int, Verdict]]]()
    failed: BaseException | None = None
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        try:
            while True:
                while len(running) < config.requests and (one := next(coming, None)) is not None:
                    running.add(asyncio.create_task(_both(session, config, *one)))
                if not running:
                    return
                done, running = await asyncio.wait(running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:  # all of them: what was said counts, and no error goes unread
                    if (error := task.exception()) is None:
                        note(*task.result())
                    failed = failed or error
                if failed is not None:
                    raise failed
                if interrupted:
                    raise StoppedError
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _both(session: aiohttp.ClientSession, config: JudgeConfig, number: int, shown: Shown) -> tuple[int, Verdict]:
    turned = Shown(shown.question, shown.second, shown.first)
    return number, Verdict(*[await _reply(session, config, worded(config.prompt, one)) for one in (shown, turned)])


def worded(prompt: str, shown: Shown) -> str:
    """``prompt`` with question and answers in their places, in one pass: what they hold is never taken for a place."""
    places = {"{question}": shown.question, "{a}": shown.first, "{b}": shown.second}
    order = sorted(places, key=prompt.index)
    words, rest = [], prompt
    for place in order:
        before, _, rest = rest.partition(place)
        words += [before, places[place]]
    return "".join([*words, rest])


async def _reply(session: aiohttp.ClientSession, config: JudgeConfig, text: str) -> str:
    chat = config.api == "chat"
    url = f"{config.url.rstrip('/')}/{'chat/completions' if chat else 'completions'}"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    asked |= {"max_tokens": config.max_tokens, "temperature": config.temperature}
    asked |= {"model": config.model} if config.model else {}
    why = ""
    for attempt in range(config.tries):
        if attempt:
            await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            async with session.post(url, json=asked) as response:
                if response.status == 200:
                    return _text_of(await response.json(content_type=None), url, chat=chat)
                why = f"{response.status} {' '.join((await response.text()).split())[:300]}"
                if response.status not in BUSY and response.status < 500:
                    break
        except (aiohttp.ClientError, TimeoutError) as error:
            why = str(error) or type(error).__name__
        except ValueError as error:
            raise JudgeError(f"prefer.judge.url={config.url}: its reply is not JSON ({error})") from None
    raise JudgeError(
        f"prefer.judge.url={config.url}: {why}; see prefer.judge.* and ${KEY_VARIABLE}, then run.resume=true goes on"
    )


def _text_of(reply: Any, url: str, *, chat: bool) -> str:
    try:
        [choice] = reply["choices"]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, TypeError, ValueError):
        raise JudgeError(f"prefer.judge.url: {url} replies {str(reply)[:200]!r}, no choice of OpenAI's API") from None
    return text if isinstance(text, str) else ""  # null: nothing was said
