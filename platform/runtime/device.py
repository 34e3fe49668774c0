"""Whether a device of the configuration is on this machine, asked before torch fails at it in its own words."""

from __future__ import annotations

from pathlib import Path

DEV = Path("/dev")
GPU_FILES = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd")
"""Where Linux has a GPU that torch calls cuda, one of these is in /dev: NVIDIA, Tegra, WSL, AMD."""


def without_gpu(key: str, device: str) -> str:
    """What is wrong with ``key``=``device`` on a Linux without any GPU's device file, asked without torch; "" where
    that is not known.
    """
    if not device.startswith("cuda") or not DEV.is_dir() or any(any(DEV.glob(name)) for name in GPU_FILES):
        return ""
    return f"{key}={device}: this machine has no GPU (no {DEV}/nvidia*); take {key}=cpu, or a machine that has one"


def require_device(key: str, device: str) -> None:
    """Raise ValueError, one line with the way out, when ``key``=``device`` is a CUDA device that torch lacks here."""
    if not device.startswith("cuda"):
        return
    import torch  # not at the top: the broker needs none

    if not torch.cuda.is_available():
        raise ValueError(
            f"{key}={device}: torch {torch.__version__} finds no CUDA device on this machine; take {key}=cpu, or "
            "install a CUDA build of torch and its driver"
        )
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"{key}={device}: this machine has {torch.cuda.device_count()}, counted from cuda:0")
