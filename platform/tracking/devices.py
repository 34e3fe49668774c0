"""What devices can do at most: dense operations a second by dtype, and how a device's full name is looked up.

Without sparsity, which data sheets double their figures for; float32 outside the tensor cores, as torch multiplies it
unless TF32 is allowed. A device that is not here, such as any CPU, has the peak that `cost.peaks` gives, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

TERA = 1e12


class Peak(NamedTuple):
    """Dense, in 10¹² operations a second; None where no source was found. ``source``: where the figures stand."""

    bfloat16: float
    float32: float | None
    source: str


PEAKS = {
    "B200": Peak(4500 / 2, 75, "NVIDIA HGX B200, figures of one GPU; 4.5 PFLOPS with sparsity"),
    "GH200": Peak(990, 67, "NVIDIA GH200 data sheet; 990 dense, 1,979 with sparsity"),
    "H200": Peak(1979 / 2, 67, "NVIDIA H200 product page; 1,979 with sparsity"),
    "H200 NVL": Peak(1671 / 2, 60, "NVIDIA H200 product page; 1,671 with sparsity"),
    "H100": Peak(989.4, 66.9, "NVIDIA Hopper white paper, H100 SXM5"),
    "H100 NVL": Peak(1671 / 2, 60, "NVIDIA H100 NVL data sheet; 1,671 with sparsity"),
    "H100 PCIe": Peak(756, 51.2, "NVIDIA Hopper white paper, H100 PCIe"),
    "H800": Peak(989.5, None, "arXiv:2512.22560, table 2; NVIDIA publishes no data sheet"),
    "H800 PCIe": Peak(1513 / 2, None, "Lenovo Press LP1814; 1,513 with sparsity"),
    "H20": Peak(148, None, "arXiv:2512.22560, table 2; NVIDIA publishes no data sheet"),
    "A100": Peak(312, 19.5, "NVIDIA A100 data sheet"),
    "A800": Peak(623.8 / 2, 19.5, "NVIDIA A800 40GB Active product page; 623.8 with sparsity"),
    "L40S": Peak(362.05, 91.6, "NVIDIA L40S data sheet; 362.05 dense, 733 with sparsity"),
    "L4": Peak(242 / 2, 30.3, "NVIDIA L4 data sheet; 242 with sparsity"),
    "A10": Peak(125, 31.2, "NVIDIA A10 data sheet; 125 dense, 250 with sparsity"),
    "RTX 4090": Peak(165.2, 82.6, "NVIDIA Ada white paper 2.1, appendix A; float32 accumulation"),
}
"""SXM parts where nothing else is said."""


def words(name: str) -> set[str]:
    """Of a name, small: "NVIDIA H100 80GB HBM3" has h100 among them."""
    return set(re.findall(r"[a-z0-9.]+", name.lower()))


def entry_of(device: str, names: Iterable[str]) -> str | None:
    """The entry whose words are all in the device's full name, the one of most words; None where there is none."""
    found = [name for name in names if words(name) and words(name) <= words(device)]
    return max(found, key=lambda name: len(words(name)), default=None)


def peak_of(device: str, dtype: str, own: Mapping[str, Mapping[str, float]]) -> float | None:
    """Dense operations a second of a device; what the user gives (``own``) stands before the table."""
    if (entry := entry_of(device, own)) is not None and dtype in own[entry]:
        return float(own[entry][dtype])
    if (entry := entry_of(device, PEAKS)) is None:
        return None
    known = {"bfloat16": PEAKS[entry].bfloat16, "float32": PEAKS[entry].float32}.get(dtype)
    return None if known is None else known * TERA
