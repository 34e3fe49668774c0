"""What devices can do at most: dense operations a second by dtype, and how a device's full name is looked up.

Source: NVIDIA's data sheets, without sparsity; float32 outside the tensor cores, as torch multiplies it unless TF32 is
allowed. A device that is not here, such as any CPU, has the peak that `cost.peaks` gives, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TERA = 1e12
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250 * TERA, "float32": 75 * TERA},
    "GH200": {"bfloat16": 989 * TERA, "float32": 67 * TERA},
    "H200": {"bfloat16": 989 * TERA, "float32": 67 * TERA},
    "H200 NVL": {"bfloat16": 835 * TERA, "float32": 60 * TERA},
    "H100": {"bfloat16": 989 * TERA, "float32": 67 * TERA},
    "H100 NVL": {"bfloat16": 835 * TERA, "float32": 60 * TERA},
    "H100 PCIe": {"bfloat16": 756 * TERA, "float32": 51 * TERA},
    "H800": {"bfloat16": 989 * TERA, "float32": 67 * TERA},
    "H800 PCIe": {"bfloat16": 756 * TERA, "float32": 51 * TERA},
    "H20": {"bfloat16": 148 * TERA, "float32": 44 * TERA},
    "A100": {"bfloat16": 312 * TERA, "float32": 19.5 * TERA},
    "A800": {"bfloat16": 312 * TERA, "float32": 19.5 * TERA},
    "L40S": {"bfloat16": 362 * TERA, "float32": 91.6 * TERA},
    "L4": {"bfloat16": 121 * TERA, "float32": 30.3 * TERA},
    "A10": {"bfloat16": 125 * TERA, "float32": 31.2 * TERA},
    "RTX 4090": {"bfloat16": 165.2 * TERA, "float32": 82.6 * TERA},
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
    for table in (own, PEAKS):
        if (entry := entry_of(device, table)) is not None and dtype in table[entry]:
            return float(table[entry][dtype])
    return None
