"""Short blocking questions to a server over HTTP: is it healthy, does it take the keys. lifecycle.py asks them in a
thread.

No proxy, whatever the environment says. The engine's own traffic goes through its asynchronous client instead.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from offtrail.platform.config.schema import SglangConfig
from offtrail.platform.engines.sglang import versions
from offtrail.platform.engines.sglang.lifecycle import Check, UnhealthyError

TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 30.0
"""Patience for a question that makes a token, maybe the server's first; it gives up itself after 20 s."""
NOBODY = "offtrail-asks-for-nobody"
"""A request id that no request has."""
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def ask(
    url: str, key: str = "", body: Any = None, method: str | None = None, timeout_s: float | None = None
) -> tuple[int, Any]:
    """(status, JSON or None) of one request. Raises UnhealthyError when there is no HTTP answer in time (TIMEOUT_S)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with _open(request, timeout=timeout_s or TIMEOUT_S) as answer:
            return int(answer.status), _json(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None
    except urllib.error.URLError as error:
        nobody = isinstance(error.reason, ConnectionRefusedError)
        raise UnhealthyError(f"does not answer ({error.reason})", nobody=nobody) from None
    except (OSError, ValueError) as error:  # cut off in the middle; not HTTP at all
        raise UnhealthyError(f"does not answer ({type(error).__name__}: {error})") from None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def own_server(key: str, admin_key: str) -> Check:
    """Healthy: it makes a token (asked until it has once: a later one would disturb an update), and takes our key.

    Then it is told to leave what it has loaded out of garbage collection: on a CPU every flush of its cache collects,
    which takes a third of a second over all of sglang's objects, and milliseconds over what has come since.
    """

    def check(url: str, first: bool) -> None:
        if first:
            _expect(f"{url}/health_generate", key, timeout_s=TOKEN_TIMEOUT_S)
        _expect(f"{url}/model_info", key)
        if first:
            ask(f"{url}/freeze_gc", admin_key)

    return check


def attached_server(key: str, admin_key: str, config: SglangConfig) -> Check:
    """The same, and first of all that it takes both keys and is of a version that the settings can be had from."""

    def check(url: str, first: bool) -> None:
        if not first:
            _expect(f"{url}/model_info", key)
            return
        _takes(f"{url}/health_generate", key, "$OFFTRAIL_SGLANG_KEY", "--api-key", timeout_s=TOKEN_TIMEOUT_S)
        _takes(f"{url}/model_info", key, "$OFFTRAIL_SGLANG_KEY", "--api-key")
        _takes(f"{url}/abort_request", admin_key, "$OFFTRAIL_SGLANG_ADMIN_KEY", "--admin-api-key", {"rid": NOBODY})
        _version_will_do(url, (key, admin_key), config)

    return check


def serving(key: str) -> Check:
    """Of a server that is asked and never updated: it makes a token, and takes our key where it wants one."""

    def check(url: str, first: bool) -> None:
        if first:
            _takes(f"{url}/health_generate", key, "$OFFTRAIL_SGLANG_KEY", "--api-key", timeout_s=TOKEN_TIMEOUT_S)
        _expect(f"{url}/model_info", key)

    return check


def served(url: str, key: str) -> dict[str, str]:
    """What a running server says of its model: model_path (a folder on its host, or a name) and tokenizer_path.
    UnhealthyError where it does not.
    """
    status, told = ask(f"{url.rstrip('/')}/model_info", key)
    if status != 200 or not isinstance(told, dict) or not told.get("model_path"):
        raise UnhealthyError(f"does not say its model at /model_info (it answers {status})")
    return {"model_path": str(told["model_path"]), "tokenizer_path": str(told.get("tokenizer_path") or "")}


def listens(url: str, first: bool) -> None:
    """Check of the router, whose servers are watched themselves."""
    _expect(f"{url}/health")


def _expect(url: str, key: str = "", timeout_s: float | None = None) -> None:
    status, _ = ask(url, key, timeout_s=timeout_s)
    if status != 200:
        raise UnhealthyError(f"{url} answers {status}")


def _takes(url: str, key: str, variable: str, flag: str, body: Any = None, timeout_s: float | None = None) -> None:
    status, _ = ask(url, key, body, timeout_s=timeout_s)
    if status in (401, 403):
        raise UnhealthyError(f"refuses the key of {variable} ({status}); set it to the server's {flag}", final=True)
    if status != 200:
        raise UnhealthyError(f"{url} answers {status}")


def _version_will_do(url: str, keys: tuple[str, str], config: SglangConfig) -> None:
    answers = (ask(f"{url}/server_info", key) for key in keys)  # a server of offtrail's own wants the admin key
    info = next((body for status, body in answers if status == 200), None)
    version = info.get("version") if isinstance(info, dict) else None
    if version is None:
        raise UnhealthyError("does not say its version at /server_info; it must be an SGLang server", final=True)
    try:
        reason = versions.refusal(str(version), config)
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise UnhealthyError(f"cannot be used: {reason}", final=True)
