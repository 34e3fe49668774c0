"""What lets an unmodified sglang run on a CPU, or with less than it asks for on a GPU: called by serve.py in a server's
process and in each of its children.

sglang imports modules that a CPU has no use for, and that its CPU installation (requirements/sglang-cpu.txt) lacks:
Triton and sgl_kernel hold GPU kernels, xgrammar, soundfile and torchvision serve features that are off. They are
replaced by stubs with any attribute. With `--attention-backend torch_native` no stub is ever called for a number: a
kernel that is, raises. One function is replaced for speed (`batched_decode`, twice as fast with 64 sequences), and
modules that would pin memory for a GPU (`unpin`) get it as any other.

On a GPU (`install_features`) nothing is replaced that is installed: only grammars and sound, where they are missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

KERNELS = "sgl_kernel"
ALWAYS = ("triton", KERNELS)
"""Stubbed even where they are installed: they would look for a GPU."""
GRAMMARS = "xgrammar"
FEATURES = (GRAMMARS, "soundfile")
"""Imported by sglang whether or not a request asks for what they do."""
WHERE_MISSING = (*FEATURES, "torchvision")
ATTENTION = "sglang.srt.layers.attention.torch_native_backend"
PINNING = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
DECODE_PARAMETERS = (
    "self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens scaling enable_gqa causal "
    "is_cross_attn sliding_window_size"
)


def install() -> None:
    """Make sglang importable and its decoding fast in this process; a second call does nothing."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    if any(isinstance(finder, _Stubs | _Mended) for finder in sys.meta_path):
        return
    # Trap: torch and its compiler look for a real Triton when they are imported: let them see none.
    import torch  # noqa: F401

    sys.meta_path[:0] = [_Stubs({*ALWAYS, *_missing(WHERE_MISSING)}), _Mended()]


def install_features() -> None:
    """On a GPU: make sglang importable where packages of FEATURES are missing; a second call does nothing."""
    if missing := _missing(FEATURES):
        sys.meta_path.insert(0, _Stubs(missing))


def stands_in_for(name: str) -> bool:
    """Whether the package ``name`` is a stub in this process."""
    return any(name in finder.roots for finder in sys.meta_path if isinstance(finder, _Stubs))


def _missing(names: Sequence[str]) -> set[str]:
    return {name for name in names if importlib.util.find_spec(name) is None}


class _Names(type):
    """A class whose members are their names: stands in for enums."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module with any attribute: a capitalised one is an empty class, another one a stub, which as a decorator
    returns what it decorates.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "3.6.0"
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name == "StructuralTag":  # xgrammar's, a field type of the OpenAI protocol
            import pydantic

            value = type(name, (pydantic.BaseModel,), {"__module__": __name__})
        elif name[0].isupper():
            value = _Names(name, (), {"__init__": lambda *_, **__: None})
        else:
            full = f"{self.__name__}.{name}"
            value = sys.modules.setdefault(full, _Stub(full))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        return lambda decorated: decorated


class _Kernels(types.ModuleType):
    """sgl_kernel: any name can be imported, and calling it is an error."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0.0.0"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{KERNELS}.{name} is a GPU kernel: there is none on a CPU")

        return missing


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubbed packages and all that is in them."""

    def __init__(self, roots: set[str]) -> None:
        self.roots = roots

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        if spec.name == KERNELS:
            return _Kernels(spec.name)
        module = sys.modules.get(spec.name) or _Stub(spec.name)
        if spec.name == "triton":  # arithmetic that sglang does at import
            vars(module)["cdiv"] = lambda a, b: -(a // -b)
            vars(module)["next_power_of_2"] = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """A stub has nothing to run."""


class _Mended(importlib.abc.MetaPathFinder):
    """Changes sglang's modules as soon as they are imported, in the child that does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mend = MENDED.get(fullname)
        if mend is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Mending(spec.loader, mend)
        return spec


class _Mending(importlib.abc.Loader):
    """A module's own loader, and what is to be changed after it."""

    def __init__(self, loader: importlib.abc.Loader, mend: Callable[[types.ModuleType], None]) -> None:
        self._loader, self._mend = loader, mend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        self._mend(module)


def decode_in_one(module: types.ModuleType) -> None:
    """Put `batched_decode` into sglang's attention."""
    backend: Any = vars(module)["TorchNativeAttnBackend"]
    slow = backend._run_sdpa_forward_decode
    if list(inspect.signature(slow).parameters) == DECODE_PARAMETERS.split():  # another sglang keeps its own
        backend._run_sdpa_forward_decode = batched_decode(slow)


def unpin(module: types.ModuleType) -> None:
    """Give a module that pins memory a torch that makes it as any other: without a GPU torch refuses to pin."""
    import torch

    def plain(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values, pin_memory=False, **kind: make(*values, **kind)

    without = types.ModuleType("torch")
    vars(without).update(vars(torch), tensor=plain(torch.tensor), zeros=plain(torch.zeros))
    vars(module)["torch"] = without
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[assignment, method-assign, return-value]


MENDED: dict[str, Callable[[types.ModuleType], None]] = {ATTENTION: decode_in_one, **dict.fromkeys(PINNING, unpin)}
"""Module → what is done to it."""


def batched_decode(slow: Callable[..., Any]) -> Callable[..., Any]:
    """Decode attention, in sglang a loop over the sequences, as one padded call; ``slow`` takes the rarer kinds."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def fast(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        encoder_lens: Any = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Any:
        """query, output [B, heads, head]; k_cache, v_cache [slots, kv_heads, head]; seq_lens [B]."""
        window = sliding_window_size is not None and sliding_window_size > -1
        if encoder_lens is not None or is_cross_attn or window:
            rare = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
            return slow(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, *rare)
        longest = int(seq_lens.max())
        there = torch.arange(longest) < seq_lens[:, None]  # [B, T]
        slots = torch.where(there, req_to_token[req_pool_indices.long(), :longest], 0).long()
        keys, values = (cache[slots].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache))
        attended = scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, attn_mask=there[:, None, None], enable_gqa=enable_gqa, scale=scaling
        )
        return output.copy_(attended.squeeze(2))

    return fast
