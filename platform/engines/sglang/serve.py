"""One SGLang server: `python -m offtrail.platform.engines.sglang.serve PARENT_PID [flags of sglang …]`.

    servers.py ──► this process: HTTP, tokenizer ──► scheduler, detokenizer

It runs the installed sglang as it is, after cpu.py has made the imports possible that `--device cpu` has nothing for,
or that a GPU installation without grammars and sound lacks. Log lines go to stdout and stderr, which the caller
redirects.

Invariant: none of these processes outlives PARENT_PID, the thread that started it, or the process that spawned it: the
kernel kills them.

On a CPU the children are forks, so that sglang is imported once (seven CPU seconds) and not three times; CUDA outlives
no fork.

Trap: elsewhere sglang starts its children by multiprocessing's "spawn", which runs this module again in each of them,
as __mp_main__: what must be so there too stands at the module's level, not in `main`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from offtrail.platform.runtime.host import die_with

KEY_VARIABLE = "OFFTRAIL_SGLANG_KEY"
"""The user key: /generate and the OpenAI API."""
ADMIN_KEY_VARIABLE = "OFFTRAIL_SGLANG_ADMIN_KEY"
"""The key of the control endpoints: abort, pause, weights."""


def device_of(flags: Sequence[str]) -> str:
    """The value of the last `--device`; empty where there is none, and sglang finds out."""
    device = ""
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        if name == "--device":
            device = value if equals else following
    return device


def keys_as_flags() -> list[str]:
    """The two keys, out of the environment: other users can read a command line, and children need them not."""
    flags = []
    for flag, variable in (("--api-key", KEY_VARIABLE), ("--admin-api-key", ADMIN_KEY_VARIABLE)):
        if key := os.environ.pop(variable, ""):
            flags += [flag, key]
    return flags


def grammar_flags() -> list[str]:
    """`--grammar-backend none` where the package of sglang's default is a stub; the caller's flags come after."""
    from offtrail.platform.engines.sglang import cpu

    return ["--grammar-backend", "none"] if cpu.stands_in_for(cpu.GRAMMARS) else []


def guard_endpoints() -> None:
    """Let /server_info take the admin key only: it answers with every setting of the server, both keys among them. Let
    /health_generate, which sglang leaves open though it makes a token, take the user key; /health makes none and stays
    open, for sglang-router asks it without a key before it takes a server.
    """
    os.environ["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils import auth
    from sglang.srt.utils.auth import AuthLevel

    decide = auth.decide_request_auth

    def decided(*, path: str, **given: Any) -> Any:
        return decide(path=path.removeprefix("/") if path.startswith("/health_generate") else path, **given)

    auth.decide_request_auth = decided

    for endpoint in (http_server.server_info, http_server.get_server_info):
        endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL


def keep_loads_in_temporary() -> None:
    """Have the file by which a server's processes tell each other their load lie in TMPDIR, which goes with the run:
    sglang gives it a random name in /dev/shm, and after a kill -9 nobody knows whose it was. (Not in 0.5.17.)
    """
    try:
        from sglang.srt.managers import load_snapshot
    except ImportError:
        return
    path_for = load_snapshot.shm_path_for
    load_snapshot.shm_path_for = lambda name: os.path.join(tempfile.gettempdir(), os.path.basename(path_for(name)))


def let_adapters_go() -> None:
    """Have an unload of adapters wait for the requests that name them, as far as there are any.

    Trap: sglang counts them up and down, and forgets those that were aborted in its queue (0.5.21): the unload then
    waits for ever, with the lock that every later load needs.
    """
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    begin = TokenizerManager.init_lora

    def begun(manager: Any) -> None:
        begin(manager)

        async def unused(lora_id: str) -> None:
            while any(getattr(state.obj, "lora_id", None) == lora_id for state in manager.rid_to_state.values()):
                await asyncio.sleep(0.005)

        manager.lora_registry.wait_for_unload = unused

    TokenizerManager.init_lora = begun


def fork_children() -> None:
    """Have multiprocessing fork, whatever sglang asks for, and every fork end with the process that made it."""
    forks_from = [os.getpid()]

    def die_with_forker() -> None:
        forker, forks_from[0] = forks_from[0], os.getpid()
        die_with(forker)

    os.register_at_fork(after_in_child=die_with_forker)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None


def main(argv: Sequence[str]) -> int:
    """Serve until the process is ended; the exit status."""
    die_with(int(argv[0]))
    if device_of(argv[1:]) == "cpu":
        fork_children()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    settings = prepare_server_args([*grammar_flags(), *argv[1:], *keys_as_flags()])
    guard_endpoints()
    if settings.enable_lora:
        let_adapters_go()
    try:
        run_server(settings)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__mp_main__" and (spawner := multiprocessing.parent_process()) is not None:
    # sglang asks for it too, but only after seconds of imports, in which the spawner may be killed.
    assert spawner.pid is not None
    die_with(spawner.pid)
if __name__ in ("__main__", "__mp_main__"):
    from offtrail.platform.engines.sglang import cpu

    if device_of(sys.argv[2:]) == "cpu":
        cpu.install()
    else:
        cpu.install_features()
    keep_loads_in_temporary()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
