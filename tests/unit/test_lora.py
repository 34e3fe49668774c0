"""LoRA: the adapters alone are trained, what is published is their merged model, and a run goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from offtrail.core.types import Batch
from offtrail.platform.config.compose import compose
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.schema import Config, LoraConfig
from offtrail.platform.engines.adapters import AdaptedEngine
from offtrail.platform.engines.channels import engine_dtype
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.make import local_config
from offtrail.platform.launcher.memory import Shape
from offtrail.platform.learner import checkpoint
from offtrail.platform.learner.adapters import AdaptedReference
from offtrail.platform.learner.checkpoint import CheckpointError, TrainerState
from offtrail.platform.learner.data import make_examples
from offtrail.platform.learner.make import load_trained, make_policy, make_sft_trainer, make_trainer
from offtrail.platform.learner.objectives import rows_of_groups
from offtrail.platform.learner.train import Trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model import fused
from offtrail.platform.model.check import ModelError
from offtrail.platform.model.lora import adapters_of, is_adapter, merged, read
from offtrail.platform.model.packing import lay_out
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.model.text import Text
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.store import Publisher, Subscriber

ALONE = World(0, 1, torch.device("cpu"))
MakeBatch = Callable[..., Batch]
LORA = ("learner.lora.rank=4", "learner.lora.alpha=8", "learner.optim.lr=1e-2", "batch.groups=4", "batch.group_size=3")


def trainer_of(start: Path, *arguments: str) -> Trainer[Batch]:
    config = compose([*LORA, *arguments])
    return make_trainer(config, ALONE, load_trained(config, None, start), start, Activity())


def bits(trainer: Trainer[Batch]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.gather(trainer.module).items()}


def packed_of(batch: Batch, policy: Any) -> Any:
    rows = rows_of_groups(batch)
    return lay_out(rows, range(rows.size), share_up_to=policy.share_up_to)


def saved(run_dir: Path, step: int, trainer: Trainer[Batch], start: Path) -> Path:
    state, tokenizer = TrainerState.of(step, trainer), AutoTokenizer.from_pretrained(start)
    path = checkpoint.save(
        run_dir, ALONE, state, trainer.module.model, tokenizer, trainer, {}, LoraConfig(rank=4, alpha=8.0)
    )
    assert path is not None
    return path


# ---------------------------------------------------------------------- what is trained


def test_only_adapters_have_gradients_and_an_optimizer(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer = trainer_of(start_dir)
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    trainer.step(0, make_batch(0))
    held = dict(trainer.module.named_parameters())
    adapters = adapters_of(trainer.module)
    # two layers of 4 attention and 3 MLP projections, each with A and B
    assert len(adapters) == 2 * 7 * 2
    assert set(trainer.main.optimizer.state) == set(adapters.values())
    assert all(p.requires_grad == is_adapter(name) for name, p in held.items())
    moved = {name for name in held if not torch.equal(held[name], before[name])}
    assert moved == adapters.keys()


def test_a_gradient_is_that_of_the_merged_weight_through_the_adapter(start_dir: Path, make_batch: MakeBatch) -> None:
    """With y = (W + s·B·A)·x: dL/dA = s·Bᵀ·dL/dW and dL/dB = s·dL/dW·Aᵀ, W the merged weight, s = α/r = 2."""
    trainer = trainer_of(start_dir)
    trainer.step(0, make_batch(0))  # B is not 0 any more
    policy, name = trainer.module, "model.layers.1.mlp.up_proj"
    whole = load_model(start_dir)
    whole.load_state_dict(checkpoint.gather(policy), strict=False)
    other = Policy(whole)
    batch = make_batch(1)
    for module in (policy, other):
        packed = packed_of(batch, module)
        loss, _ = module.loss(packed, lambda rows, out: out.logprobs.sum())
        loss.backward()  # type: ignore[no-untyped-call]
    held = {n.removeprefix("model."): p for n, p in policy.named_parameters()}
    a, b = (held[f"{name}.lora_{part}.default.weight"] for part in "AB")
    dense = whole.get_parameter(f"{name}.weight").grad
    assert dense is not None
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, 2 * b.detach().T @ dense, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b.grad, 2 * dense @ a.detach().T, rtol=1e-3, atol=1e-4)
    assert held[f"{name}.base_layer.weight"].grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_says_what_the_adapters_say(start_dir: Path, make_batch: MakeBatch, dtype: str) -> None:
    trainer = trainer_of(start_dir, f"learner.dtype={dtype}")
    for step in (0, 1):
        trainer.step(step, make_batch(step))
    plain = load_model(start_dir)
    at_start = Policy(load_model(start_dir), dtype=dtype)
    plain.load_state_dict(checkpoint.gather(trainer.module), strict=False)
    other, batch = Policy(plain, dtype=dtype), make_batch(2)
    with torch.no_grad():
        said, told, first = (module(packed_of(batch, module))[0] for module in (trainer.module, other, at_start))
    assert float((first - told).abs().max()) > 0.05  # it has learned something
    assert float((said - told).abs().max()) < (1e-6 if dtype == "float32" else 0.05)


def test_merging_sums_in_float32_and_leaves_the_weight(start_dir: Path) -> None:
    """Into bfloat16 1 + 2⁻⁹: too small to be kept, twice it is 2⁻⁸ and is; and what was given stays as it is."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    a, b = torch.full((1, 1), 2.0**-5), torch.full((1, 1), 2.0**-4)
    assert merged(weight, a, b, 1.0).item() == 1.0
    assert merged(weight, a, b, 4.0).item() == 1 + 2.0**-7
    assert merged(weight, a, b, 4.0).dtype == torch.bfloat16
    assert weight.item() == 1.0


def test_at_first_outputs_are_the_models_own_and_a_seed_draws_the_same_adapters(
    start_dir: Path, make_batch: MakeBatch
) -> None:
    batch = make_batch(0)
    first, again, other = (trainer_of(start_dir, f"run.seed={seed}") for seed in (3, 3, 4))
    with torch.no_grad():
        plain = make_policy(Config(), load_model(start_dir))
        ours, theirs = (module(packed_of(batch, module))[0] for module in (first.module, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    drawn = [torch.cat([p.flatten() for p in adapters_of(t.module).values()]) for t in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(torch.equal(bits(first)[name], tensor) for name, tensor in load_model(start_dir).named_parameters())


def test_a_layer_that_passed_an_adapter_by_would_be_refused_at_load(
    start_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters begin at 0, where nobody would see it."""
    monkeypatch.setattr(fused, "_is_plain", lambda module: True)
    with pytest.raises(ModelError, match="the learner's numbers are not those of"):
        trainer_of(start_dir)


@pytest.mark.parametrize(
    ("targets", "names"),
    [("[q_proj]", {"self_attn.q_proj"}), ("[v_proj, down_proj]", {"self_attn.v_proj", "mlp.down_proj"})],
)
def test_targets_are_named_by_the_ends_of_their_names(start_dir: Path, targets: str, names: set[str]) -> None:
    trainer = trainer_of(start_dir, f"learner.lora.targets={targets}")
    found = {name.partition(".lora_")[0] for name in adapters_of(trainer.module)}
    assert found == {f"model.model.layers.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize(
    ("targets", "words"),
    [("[no_proj]", "no_proj is no layer; there are down_proj"),
     ("[lm_head]", "lm_head is no linear layer of a decoder layer"),
     ("[embed_tokens]", "model.embed_tokens is no linear layer of a decoder layer")],
)  # fmt: skip
def test_targets_that_are_no_layers_of_the_decoder_are_refused(start_dir: Path, targets: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"learner\.lora\.targets=") as error:
        trainer_of(start_dir, f"learner.lora.targets={targets}")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- the reference


def test_the_reference_is_the_start_model_without_a_second_one(start_dir: Path, make_batch: MakeBatch) -> None:
    trainer = trainer_of(start_dir, "algo.kl=k3", "algo.kl_coef=0.01")
    assert isinstance(trainer.reference, AdaptedReference)
    assert sum(p.numel() for p in trainer.reference.parameters()) == trainer.main.block._size  # type: ignore[union-attr]
    first = trainer.step(0, make_batch(0)).metrics
    second = trainer.step(1, make_batch(1)).metrics
    assert 0 <= first["policy/kl_ref"] < second["policy/kl_ref"]
    batch, plain = make_batch(2), Policy(load_model(start_dir))
    own = bits(trainer)
    with torch.no_grad():
        ref, start = trainer.reference(packed_of(batch, plain))[0], plain(packed_of(batch, plain))[0]
        policy = trainer.module(packed_of(batch, plain))[0]
    torch.testing.assert_close(ref, start, rtol=1e-5, atol=1e-5)
    assert float((policy - start).abs().max()) > 0.01
    assert all(torch.equal(own[name], tensor) for name, tensor in bits(trainer).items())  # it has its own on again


def test_an_exact_kl_and_a_refreshed_reference(start_dir: Path, make_batch: MakeBatch, tmp_path: Path) -> None:
    keys = ("algo.kl=full", "algo.kl_coef=0.01", "algo.ref_refresh=4", "learner.minibatches=2")
    trainer = trainer_of(start_dir, *keys)
    told = [trainer.step(step, make_batch(step)).metrics for step in range(3)]
    # refreshed before step 2, at its 4th update: there and only there the reference is the policy
    assert [row["policy/ref_age_updates"] for row in told] == [2, 4, 2]
    assert told[2]["policy/kl_ref"] < told[1]["policy/kl_ref"]
    path = saved(tmp_path, 3, trainer, start_dir)
    assert (path / "trainer" / "reference.safetensors").is_file()
    again = trainer_of(start_dir, *keys)
    checkpoint.restore(path, again)
    assert trainer.step(3, make_batch(3)).metrics == again.step(3, make_batch(3)).metrics


# ---------------------------------------------------------------------- what is published and saved


def test_what_is_published_is_the_merged_model(start_dir: Path, make_batch: MakeBatch, tmp_path: Path) -> None:
    trainer = trainer_of(start_dir)
    trainer.step(0, make_batch(0))
    publisher = Publisher(tmp_path / "channel")
    publisher.publish(1, checkpoint.gather(trainer.module))
    with Subscriber(tmp_path / "channel").open(1) as version:
        plain = dict(load_model(start_dir).named_parameters())
        assert {name: tuple(t.shape) for name, t in version.items()} == {n: tuple(p.shape) for n, p in plain.items()}
        held = {n.removeprefix("model."): p.detach() for n, p in trainer.module.named_parameters()}
        for name, tensor in version.items():
            stem = name.removesuffix(".weight")
            if f"{stem}.base_layer.weight" in held:
                a, b = (held[f"{stem}.lora_{part}.default.weight"] for part in "AB")
                torch.testing.assert_close(tensor, held[f"{stem}.base_layer.weight"] + 2.0 * (b @ a))
                assert not torch.equal(tensor, plain[name])
            else:
                assert torch.equal(tensor, held[name])
    publisher.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_merged_by_the_embedded_engine_to_the_same_bits(
    start_dir: Path, make_batch: MakeBatch, tmp_path: Path, dtype: str
) -> None:
    keys = ("learner.lora.publish=adapter", f"engine.dtype={dtype}")
    config, trainer = compose([*LORA, *keys]), trainer_of(start_dir, *keys)
    trainer.step(0, make_batch(0))
    tensors = {1: checkpoint.gather(trainer.module), 2: checkpoint.gather_adapters(trainer.module)}
    whole = Publisher(tmp_path / "merged", dtype=getattr(torch, dtype))
    alone = Publisher(tmp_path / "alone", dtype=engine_dtype(config))
    whole.publish(1, tensors[1])
    alone.publish(2, tensors[2])
    assert alone.bytes_last < whole.bytes_last
    settings = local_config(config.engine)
    engines = [
        LocalEngine(start_dir, settings, max_length=64, threads=1),
        AdaptedEngine(start_dir, settings, config.learner.lora, max_length=64, threads=1),
    ]
    texts = [np.arange(2, 12, dtype=np.int32)], [np.arange(7, 40, dtype=np.int32)]
    assert (engines[0].logprobs(*texts, 1.0)[0] == engines[1].logprobs(*texts, 1.0)[0]).all()  # version 0
    start = engines[0].logprobs(*texts, 1.0)[0]
    for engine, folder, version in zip(engines, ("merged", "alone"), (1, 2), strict=True):
        with Subscriber(tmp_path / folder).open(version) as opened:
            engine.load_weights(version, opened)
    ours, theirs = (engine.logprobs(*texts, 1.0)[0] for engine in engines)
    assert (ours == theirs).all()
    assert np.abs(ours - start).max() > 0.05
    with pytest.raises(ValueError, match=r"nothing else; model\.embed_tokens\.weight is no such"):
        engines[1].load_weights(3, tensors[1])
    for publisher in (whole, alone):
        publisher.close()


def test_a_checkpoint_holds_the_adapters_that_were_published(
    start_dir: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    trainer = trainer_of(start_dir)
    trainer.step(0, make_batch(0))
    published = checkpoint.gather_adapters(trainer.module)
    found = read(saved(tmp_path, 1, trainer, start_dir))
    assert found.keys() == published.keys()
    assert all(torch.equal(found[name], published[name]) for name in found)


def test_a_checkpoint_is_the_merged_model_and_an_adapter_that_peft_opens(
    start_dir: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    trainer = trainer_of(start_dir)
    checkpoint.rehearse(tmp_path, trainer.module.model, AutoTokenizer.from_pretrained(start_dir), trainer)
    trainer.step(0, make_batch(0))
    path = saved(tmp_path, 1, trainer, start_dir)
    ids = torch.tensor([[5, 9, 30, 12]])
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(start_dir)
        start = base(ids).logits
        adapted = PeftModel.from_pretrained(base, path / "adapter")(ids).logits
    torch.testing.assert_close(adapted, whole, rtol=1e-5, atol=1e-5)
    assert float((whole - start).abs().max()) > 0.01
    told = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["peft_type"]) == (4, 8.0, "LORA")
    assert Path(told["base_model_name_or_path"]) == start_dir.resolve()
    moments = load_file(path / "trainer" / "optimizer.safetensors")
    names = {name.rpartition(".")[0] for name in moments} - {""}
    assert names == {name.removeprefix("model.") for name in adapters_of(trainer.module)}


def test_going_on_from_a_checkpoint_gives_the_same_bits(start_dir: Path, make_batch: MakeBatch, tmp_path: Path) -> None:
    trainer = trainer_of(start_dir)
    trainer.step(0, make_batch(0))
    path = saved(tmp_path, 1, trainer, start_dir)
    config = compose([*LORA])
    resumed = make_trainer(config, ALONE, load_trained(config, path, start_dir), start_dir, Activity())
    checkpoint.restore(path, resumed)
    for step in (1, 2):
        assert trainer.step(step, make_batch(step)).metrics == resumed.step(step, make_batch(step)).metrics
    ours, theirs = bits(trainer), bits(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint to go on from"):
        checkpoint.restore(path, resumed)


# ---------------------------------------------------------------------- job=sft


def test_supervised_fine_tuning_learns_through_adapters(start_dir: Path) -> None:
    arguments = ("job=sft", "sft.steps=40", "sft.warmup_steps=2", "sft.lr=2e-2", "sft.batch_size=8")
    losses = []
    for dropout in (0.0, 0.3):
        config = compose([*LORA, *arguments, f"learner.lora.dropout={dropout}"])
        examples = make_examples(config, Text(start_dir))
        trainer = make_sft_trainer(config, ALONE, load_trained(config, None, start_dir), Activity())
        torch.manual_seed(0)
        losses.append([trainer.step(step, examples.table(step)).metrics["loss/sft"] for step in range(40)])
        assert losses[-1][-1] < 0.9 * losses[-1][0]  # embedding and head stay as they were drawn
    assert losses[0][0] == pytest.approx(losses[1][0])  # B is 0: there is nothing to leave out yet
    assert losses[0][5] != losses[1][5]


# ---------------------------------------------------------------------- settings, FLOPs, memory


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learner.lora.dropout=0.1"], "learner.lora.dropout=0.1: must be 0 in job=rl"),
        (["job=sft", "learner.lora.dropout=0.1", "learner.ranks=2"], "needs learner.ranks=1 and no"),
        (["learner.lora.targets=[]"], "learner.lora.targets=[]: must be [all-linear], or names of layers"),
        (["learner.lora.targets=[all-linear, q_proj]"], "must be [all-linear], or names of layers"),
    ],
)
def test_what_adapters_cannot_be_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["learner.lora.rank=4", *arguments])
    assert words in str(error.value)


def test_without_peft_it_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    with pytest.raises(ConfigError, match=r"learner\.lora\.rank=4: needs peft: pip install 'offtrail\[lora\]'"):
        compose(["learner.lora.rank=4"])
    compose([])


def test_frozen_weights_have_no_gradient_to_pay_for(start_dir: Path, make_batch: MakeBatch) -> None:
    whole, adapted = make_policy(Config(), load_model(start_dir)), trainer_of(start_dir).module
    size = sum(p.numel() for p in adapters_of(adapted).values())
    assert adapted.cost.body == whole.cost.body + 2 * size
    assert (adapted.trained_cost.body, adapted.trained_cost.head) == (2 * size, 0.0)
    assert adapted.trained_cost.attention == whole.cost.attention


def test_adapters_are_counted_by_their_layers() -> None:
    shape = Shape(
        parameters=0, vocabulary=0, hidden=32, layers=2, mlp=48, heads=4, kv_heads=2, head_size=8
    )  # fmt: skip
    # q 32+32, k and v 32+16 each, o 32+32, gate, up and down 32+48 each
    assert shape.adapter_numbers(LoraConfig(rank=4)) == 2 * 4 * (64 + 2 * 48 + 64 + 3 * 80)
    assert shape.adapter_numbers(LoraConfig(rank=4, targets=["q_proj", "v_proj"])) == 2 * 4 * (64 + 48)
