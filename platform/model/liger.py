"""Optional Triton kernels of liger-kernel (RMS norm, rotary embedding, SwiGLU) in the decoder, on CUDA devices.

Policy calls ``apply``. The head is not Liger's: head.py gives entropy and exact KL in the same pass. What is applied is
what liger-kernel itself knows for the model's architecture, on the model's own modules; names and parameters stay. Its
rotary embedding replaces a function of transformers' module, so it counts for all models of that architecture in the
process.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

WANTED = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
"""What is asked for, of what liger-kernel offers for an architecture."""


def missing(device: str) -> str | None:
    """Why Liger's kernels cannot run here and the way out; None where they can."""
    if not device.startswith("cuda"):
        return f"its kernels need a CUDA device, and learner.device={device}; take learner.liger=never or auto"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install --no-deps liger-kernel, or take learner.liger=never or auto"
    return None


def apply(model: Any, setting: str) -> bool:
    """Patch ``model`` in place, as learner.liger says (auto: where it can; always; never). Whether it was done.

    Raises ValueError where ``always`` cannot be done: no CUDA, no liger-kernel, an architecture that it does not know.
    """
    if setting == "never":
        return False
    reason = missing(model.device.type)
    patch = None
    if reason is None:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
        if patch is None:
            reason = f"it has no kernels for model_type={model.config.model_type}; take learner.liger=never or auto"
    if patch is None:
        if setting == "always":
            raise ValueError(f"learner.liger=always: {reason}")
        return False
    known = inspect.signature(patch).parameters
    patch(model=model, **{name: value for name, value in WANTED.items() if name in known})
    return True
