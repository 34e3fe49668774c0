"""Versions of adapters on their way to a server: what it is started with, what is written, loaded and unloaded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from offtrail.core.protocols import Request
from offtrail.core.types import Sampling
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import LoraConfig, SglangConfig
from offtrail.platform.engines.adapters import onto
from offtrail.platform.engines.decoder import read_weights
from offtrail.platform.engines.sglang import versions
from offtrail.platform.engines.sglang.adapters import FromAdapter, Loaded, check_adapters, server_flags, write
from offtrail.platform.engines.sglang.client import under_version
from offtrail.platform.engines.sglang.control import ControlError
from offtrail.platform.engines.sglang.job import Job
from offtrail.platform.engines.sglang.servers import Address
from offtrail.platform.engines.sglang.shapes import read_shapes

SHAPES = {
    "model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32), "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.input_layernorm.weight": (32,), "model.layers.0.mlp.gate.weight": (4, 32),
    "model.layers.0.mlp.experts.0.up_proj.weight": (48, 32),
}  # fmt: skip


RANK = "learner.lora.rank=4"


def adapter(layer: str, rows: int, columns: int, rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.lora_A.default.weight": torch.randn(rank, columns),
        f"{layer}.lora_B.default.weight": torch.randn(rows, rank),
    }


# ---------------------------------------------------------------------- flags


def test_a_server_is_started_with_room_for_the_adapters() -> None:
    config, lora = SglangConfig(), LoraConfig(rank=16)
    assert server_flags(config, lora, SHAPES) == [
        "--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "k_proj", "o_proj", "q_proj", "v_proj",
        "--lora-backend", "torch_native",
    ]  # fmt: skip
    lora.targets, config.device = ["self_attn.q_proj", "down_proj"], "cuda"
    assert server_flags(config, lora, SHAPES)[3:] == ["--lora-target-modules", "down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "learner.lora.publish=adapter: needs learner.lora.rank, which is 0; or take merged"),
        ([RANK, "weights.channel=ipc"], "weights.channel=ipc: not with learner.lora.publish=adapter"),
        ([RANK, "weights.channel=distributed"], "weights.channel=distributed: not with learner.lora.publish"),
        ([RANK, "engine.urls=[http://a:1]", "eval.engine=local"], "with learner.lora.publish=adapter: nobody knows"),
        ([RANK, "engine.router=true"], "engine.router=true: not with learner.lora.publish=adapter"),
        ([RANK, "engine.pause_mode=retract"], "engine.pause_mode=retract: not with learner.lora.publish=adapter"),
    ],
)
def test_what_adapters_cannot_be_published_by_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["engine=sglang", "learner.lora.publish=adapter", *arguments])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_older_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["engine=sglang", RANK, "learner.lora.publish=adapter"]
    compose(keys)
    monkeypatch.setattr(versions, "installed", lambda: "0.5.20")
    compose(keys[:2])
    with pytest.raises(ConfigError, match=r"learner\.lora\.publish=adapter: has not been tried with SGLang 0\.5\.20"):
        compose(keys)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("layers", [("self_attn.q_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("self_attn.k_proj",)])
def test_what_is_written_is_a_peft_adapter_with_zeros_for_what_is_one_layer_in_sglang(
    start_dir: Path, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    shapes, lora = read_shapes(start_dir), LoraConfig(rank=4, alpha=8.0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in (f"model.layers.{i}.{name}" for i in (0, 1) for name in layers):
        tensors |= adapter(layer, *shapes[f"{layer}.weight"])
    check_adapters(1, tensors, shapes)
    write(tmp_path, tensors, lora, shapes)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    together = {"self_attn.q_proj": {"q_proj", "k_proj", "v_proj"}, "self_attn.k_proj": {"q_proj", "k_proj", "v_proj"},
                "mlp.up_proj": {"gate_proj", "up_proj"}, "self_attn.o_proj": {"o_proj"}}  # fmt: skip
    assert set(told["target_modules"]) == set().union(*(together[name] for name in layers))
    ids = torch.tensor([[5, 9, 30, 12]])
    base = AutoModelForCausalLM.from_pretrained(start_dir)
    whole = AutoModelForCausalLM.from_pretrained(start_dir)
    whole.load_state_dict(onto(1, read_weights(start_dir), tensors, 2.0), strict=False)
    with torch.no_grad():
        start, expected = base(ids).logits, whole(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - start).abs().max()) > 0.01


def test_adapters_that_fit_no_layer_are_refused() -> None:
    for layer, rows, columns in (("model.layers.0.mlp.up_proj", 48, 32), ("model.layers.0.self_attn.q_proj", 32, 31)):
        with pytest.raises(ValueError, match=rf"version 7 is of another model: no layer .* fits {layer}'s adapter"):
            check_adapters(7, adapter(layer, rows, columns), SHAPES)
    half = adapter("model.layers.0.self_attn.q_proj", 32, 32)
    del half["model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    with pytest.raises(ValueError, match=r"q_proj\.lora_B\.default\.weight is no such"):
        check_adapters(7, half, SHAPES)


# ---------------------------------------------------------------------- what is loaded, and named


class Noting:
    """Server, as far as Loaded knows one."""

    def __init__(self, address: Address) -> None:
        self.address, self.asked = address, list[tuple[str, str]]()
        self.error: Exception | None = None

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.asked.append((path, body["lora_name"]))
        return {}


def test_a_version_is_loaded_once_and_unloaded_when_nobody_uses_it() -> None:
    loaded, servers = Loaded(), [Noting(Address(f"http://{i}", "", "", 1)) for i in range(2)]
    by_address = {server.address: server for server in servers}

    async def run() -> None:
        def keep(*used: set[int]) -> None:
            loaded.keep({s.address: u for s, u in zip(servers, used, strict=False)}, by_address.__getitem__)  # type: ignore[arg-type]

        for version in (0, 3, 4, 5, 4):
            for server in servers:
                await loaded.bring(server, FromAdapter(Path("/f"), version))  # type: ignore[arg-type]
        assert [name for _, name in servers[0].asked] == ["v3", "v4", "v5"]
        keep({3, 5}, {4})
        await asyncio.sleep(0)
        assert ("/unload_lora_adapter", "v3") not in servers[0].asked
        assert servers[1].asked[3:] == [("/unload_lora_adapter", "v3"), ("/unload_lora_adapter", "v5")]
        keep({5}, {0})  # 4 was loaded last: it stays, though nobody names it yet
        await asyncio.sleep(0)
        assert servers[0].asked[3:] == [("/unload_lora_adapter", "v3")]
        keep({5})  # the second is gone, and comes back without any
        await loaded.bring(servers[1], FromAdapter(Path("/f"), 4))  # type: ignore[arg-type]
        assert servers[1].asked[-1] == ("/load_lora_adapter", "v4")

    asyncio.run(run())


def test_a_version_that_was_not_loaded_is_tried_again() -> None:
    loaded, server = Loaded(), Noting(Address("http://0", "", "", 1))

    async def run() -> None:
        server.error = ControlError("no")
        with pytest.raises(ControlError):
            await loaded.bring(server, FromAdapter(Path("/f"), 3))  # type: ignore[arg-type]
        server.error = None
        await loaded.bring(server, FromAdapter(Path("/f"), 3))  # type: ignore[arg-type]
        assert server.asked == [("/load_lora_adapter", "v3")]

    asyncio.run(run())


def test_a_request_names_its_adapter_and_its_tokens_are_of_that_version() -> None:
    assert under_version(3, adapted=True) == {"extra_key": "version-3", "lora_path": "v3"}
    assert under_version(0, adapted=True) == {"extra_key": "version-0"}
    assert under_version(3, adapted=False) == {"extra_key": "version-3"}
    job = Job(Request(0, torch.tensor([4, 5]).numpy(), 1, Sampling(8)), 0, 0, 0.0)
    for version, tokens in ((3, [7, 8]), (5, [9])):
        job.version, job.segment_start = version, len(job.tokens)
        job.tokens += tokens
        job.logprobs += [-1.0] * len(tokens)
        job.stamp({"weight_version": "0", "weight_versions": [{"version": "0", "start": 0, "end": len(tokens)}]})
    assert job.completion("stop").versions.tolist() == [3, 3, 5]
