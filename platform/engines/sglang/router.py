"""sglang-router before a role's servers: `python -m offtrail.platform.engines.sglang.router PARENT_PID …`.

It runs the installed sglang-router with the flags that follow, and the user key out of the environment: whoever sends
requests must know it, and it is passed on to the servers. The kernel kills it when the parent dies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from offtrail.platform.engines.sglang.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from offtrail.platform.runtime.host import die_with


def main(argv: Sequence[str]) -> int:
    """Route until the process is ended; the exit status."""
    die_with(int(argv[0]))
    os.environ.pop(ADMIN_KEY_VARIABLE, None)
    from sglang_router.launch_router import launch_router, parse_router_args

    launch_router(parse_router_args([*argv[1:], "--api-key", os.environ.pop(KEY_VARIABLE)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
