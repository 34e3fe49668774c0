"""Cut a wheel of sglang-kernel down to what a Hopper GPU loads with SGLang's Triton attention: 365 MiB to about 15.

    python benchmarks/gpu/hopper_wheel.py WHEEL FOLDER

Called by bundle.sh. The result is a wheel like any other, of the same name, with a RECORD of what is in it; code and
kernels that stay are byte for byte those of the original. Not in it, and an ImportError where it is asked for: kernels
for Blackwell, FlashAttention 3, FlashMLA and the models that need them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import zipfile
from pathlib import Path

LEFT_OUT = re.compile(r"(^|/)(sm100/|[^/]*(infllm_ops|flashmla_ops|flash_ops)|triton_kernels/)")
NEEDED = re.compile(r"(^|/)sm90/[^/]*common_ops[^/]*\.so$")
"""The kernels that every model runs; a wheel that lacks them was laid out anew, and LEFT_OUT no longer fits it."""


def cut(wheel: Path, folder: Path) -> Path:
    """Write the smaller wheel into ``folder``. Raises ValueError when ``wheel`` is not laid out as expected."""
    target = folder / wheel.name
    with zipfile.ZipFile(wheel) as source:
        record = next((name for name in source.namelist() if name.endswith(".dist-info/RECORD")), "")
        kept = [entry for entry in source.infolist() if not (entry.is_dir() or LEFT_OUT.search(entry.filename))]
        if not record or not any(NEEDED.search(entry.filename) for entry in kept):
            raise ValueError(f"{wheel}: no RECORD, or no common_ops for sm90; take sglang-kernel 0.4.5")
        rows = []
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as smaller:
            for entry in kept:
                if entry.filename == record:
                    continue
                data = source.read(entry)
                smaller.writestr(entry, data, zipfile.ZIP_DEFLATED)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append(f"{entry.filename},sha256={digest},{len(data)}\n")
            smaller.writestr(record, "".join([*rows, f"{record},,\n"]))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    smaller = cut(args.wheel, args.folder)
    print(f"{smaller.name}: {args.wheel.stat().st_size / 2**20:.1f} → {smaller.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
