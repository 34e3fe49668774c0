"""Whether a device of the configuration is on this machine, asked before torch fails at it in its own words."""

from __future__ import annotations


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
