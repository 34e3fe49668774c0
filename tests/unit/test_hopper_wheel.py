"""The smaller wheel of kernels: what stays is as it was, and its RECORD says so."""

from __future__ import annotations

import base64
import hashlib
import runpy
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "hopper_wheel.py"
KEPT = {
    "sgl_kernel/__init__.py": b"import torch",
    "sgl_kernel/flash_attn.py": b"try: ...",
    "sgl_kernel/sm90/common_ops.abi3.so": b"\x7fELF" + bytes(1000),
    "sglang_kernel-0.4.5.dist-info/METADATA": b"Name: sglang-kernel",
}
LEFT_OUT = (
    "sgl_kernel/sm100/common_ops.abi3.so",
    "sgl_kernel/flash_ops.abi3.so",
    "sgl_kernel/flashmla_ops.abi3.so",
    "sgl_kernel/infllm_ops.cpython-310-x86_64-linux-gnu.so",
    "triton_kernels/topk.py",
)
RECORD = "sglang_kernel-0.4.5.dist-info/RECORD"


@pytest.fixture
def cut() -> Callable[[Path, Path], Path]:
    found: Callable[[Path, Path], Path] = runpy.run_path(str(SCRIPT))["cut"]
    return found


def wheel(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


def test_what_a_hopper_gpu_loads_stays_byte_for_byte(cut: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    whole = wheel(tmp_path / "whole.whl", KEPT | dict.fromkeys(LEFT_OUT, b"much") | {RECORD: b"of the whole"})
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(cut(whole, tmp_path / "out")) as smaller:
        assert smaller.testzip() is None
        found = {name: smaller.read(name) for name in smaller.namelist()}
    rows = found.pop(RECORD).decode().splitlines()
    assert found == KEPT
    assert rows.pop() == f"{RECORD},,"
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(d).digest()).decode().rstrip("=") for n, d in KEPT.items()}
    assert sorted(rows) == sorted(f"{name},sha256={digests[name]},{len(data)}" for name, data in KEPT.items())


def test_a_wheel_that_is_laid_out_otherwise_is_refused(cut: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    other = wheel(tmp_path / "other.whl", {"sgl_kernel/common_ops.abi3.so": b"", RECORD: b""})
    with pytest.raises(ValueError, match=r"other\.whl: no RECORD, or no common_ops for sm90"):
        cut(other, tmp_path)
