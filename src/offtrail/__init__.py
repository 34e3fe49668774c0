"""offtrail: asynchronous off-policy RL for LLM reasoning.

The packages live in the repository's root (``platform/``, ``core/``, ``algos/``, …) and are reached through relative
links in this folder, so that ``platform/`` is never importable at top level, where it would shadow Python's own
``platform`` module and break ``import torch``.
"""

from pathlib import Path

__version__ = "0.1.0"

# A checkout without symbolic links (Windows without developer mode, some archives) holds small text files instead.
if not (Path(__file__).parent / "core" / "__init__.py").is_file():
    raise ImportError(
        "offtrail: the links in src/offtrail/ are missing (core/ is not a folder there). "
        "Check out again with `git -c core.symlinks=true clone …`, or install the wheel instead."
    )
