"""The one entry: `python launch.py [FILE.yaml] [group=option …] [key=value …] [--dry-run]`; see --help."""

import os
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "src"


def command() -> int:
    """The command of this checkout, whether offtrail is installed or not; the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036  (a checkout can meet any Python)
        print("offtrail: error: Python 3.11 or newer is needed, not", sys.version.split()[0], file=sys.stderr)
        return 2
    # This checkout's package, installed or not; the roles inherit it.
    sys.path.insert(0, str(SOURCE))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    try:
        from offtrail.platform.launcher.command import console
    except ImportError as error:
        words = " ".join(str(error).removeprefix("offtrail: ").split())
        print(f"offtrail: error: {words} (python {sys.executable}; install with `pip install -e .`)", file=sys.stderr)
        return 2
    return console()


if __name__ == "__main__":
    sys.exit(command())
