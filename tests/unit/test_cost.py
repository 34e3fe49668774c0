"""Device hours, FLOPs and money out of a run's ledger: held time over launches, shared devices, stages, known peaks."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from fakes.run import Run
from offtrail.platform.config.compose import compose, to_yaml
from offtrail.platform.config.errors import ConfigError
from offtrail.platform.config.recipe import Stage
from offtrail.platform.engines.make import first_device
from offtrail.platform.launcher.recipe import whole_summary
from offtrail.platform.model.cost import Cost, active, cost_of
from offtrail.platform.model.packing import SampleTable, lay_out
from offtrail.platform.model.policy import Policy, load_model
from offtrail.platform.runtime import devices
from offtrail.platform.runtime.context import RoleContext
from offtrail.platform.tracking import cost
from offtrail.platform.tracking.devices import PEAKS, peak_of
from offtrail.platform.tracking.held import LAUNCHES, Launch, Meter, rows
from offtrail.platform.wire.messages import Hello, Welcome

# ---------------------------------------------------------------------- operations


def table(*samples: tuple[int, int]) -> SampleTable:
    """One group each, of (prompt, output) tokens."""
    import numpy as np

    outputs = [output for _, output in samples]
    return SampleTable(
        prompts=tuple(np.arange(3, 3 + prompt, dtype=np.int32) for prompt, _ in samples),
        group_of=np.arange(len(samples)),
        starts=np.concatenate([[0], np.cumsum(outputs)]),
        tokens=np.full(sum(outputs), 5, np.int32),
        temperatures=np.ones(len(samples), np.float32),
        ids=np.arange(len(samples)),
    )


@pytest.mark.parametrize("share", [0, 64])
def test_a_forward_counts_layers_head_and_attention_and_a_backward_twice_that(start_dir: Path, share: int) -> None:
    model = load_model(start_dir)
    body = 2 * sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    head = 2 * model.get_input_embeddings().weight.numel()  # tied
    position = 4 * 2 * 4 * 8  # layers, heads, head size
    policy = Policy(model)
    # 4 + 3 − 1 and 2 + 1 − 1 inputs, each seeing itself and what is before it: 1+…+6 and 1+2 positions
    packed = lay_out(table((4, 3), (2, 1)), [0, 1], share_up_to=share)
    forward = (6 + 2) * body + (3 + 1) * head + (21 + 3) * position
    assert policy.forward_flops(packed) == forward
    assert policy.training_flops(packed) == (3 * forward, 0.0)
    frozen = Policy(load_model(start_dir).requires_grad_(False))
    norm = frozen.model.model.norm.weight.requires_grad_(True)  # 32 numbers: all that has a gradient of its own
    assert frozen.training_flops(packed) == (2 * forward + 24 * position + 8 * 2 * norm.numel(), 0.0)


def test_layers_that_run_again_are_the_hardwares_and_not_the_models(start_dir: Path) -> None:
    packed = lay_out(table((4, 3)), [0])
    again = Policy(load_model(start_dir), activation_checkpointing=True)
    model, hardware = again.training_flops(packed)
    assert model == 3 * again.forward_flops(packed)
    assert hardware == 6 * again.cost.body + 21 * again.cost.attention


def test_of_experts_only_those_that_a_token_goes_through_count() -> None:
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = 4 * 3 * 16 * 8
    others = sum(p.numel() for p in model.parameters()) - experts - 2 * 50 * 16
    assert cost_of(model) == Cost(2 * 50 * 16, 2 * (others + experts / 4), 4 * 2 * 8)
    assert active({"a.experts.0.w": 8, "b": 3}, {"num_local_experts": 4, "num_experts_per_tok": 2}) == 7
    assert active({"a.experts.0.w": 8, "b": 3}, {}) == 11


# ---------------------------------------------------------------------- devices


def test_processes_are_placed_as_their_engines_place_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["learner.ranks=2", "learner.device=cuda", "engine.device=cuda:2", "generator.count=2"])
    assert [list(devices.gpus_of(config, "learner", i)) for i in (0, 1)] == [[0], [1]]
    assert list(devices.gpus_of(config, "generator", 1)) == [2]  # embedded engines share the one that is named
    monkeypatch.setattr("offtrail.platform.engines.sglang.flags.find_spec", lambda name: object())
    monkeypatch.setattr("offtrail.platform.engines.sglang.versions.installed", lambda: "0.5.21")
    config = compose(
        ["engine=sglang", "engine.device=cuda:2", "engine.tensor_parallel=2", "engine.servers=2", "generator.count=2"]
    )
    for role, index, count in (("generator", 0, 4), ("generator", 1, 4), ("evaluator", 0, 2)):
        mine = devices.gpus_of(config, role, index)
        first = first_device(config.engine, 2, RoleContext(config, Path(), role, index))  # type: ignore[arg-type]
        assert (f"cuda:{mine[0]}", len(mine)) == (first, count)
    config.engine.urls = ["http://a:1"]  # type: ignore[attr-defined]
    assert list(devices.devices_of(config, "generator", 0)) == ["http://a:1 0", "http://a:1 1"]
    assert devices.devices_of(config, "broker", 0) == {}


def test_devices_have_the_names_that_the_driver_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus, model in (("0000:01:00.0", "NVIDIA H100 80GB HBM3"), ("0000:02:00.0", "NVIDIA A100-SXM4-80GB")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 12\n")
    monkeypatch.setattr(devices, "GPUS", tmp_path)
    monkeypatch.setattr(devices.socket, "gethostname", lambda: "here")
    devices.gpu_names.cache_clear()
    try:
        config = compose(["learner.device=cuda:0", "engine.device=cuda:1"])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        assert devices.devices_of(config, "learner", 0) == {"here GPU 1": "NVIDIA A100-SXM4-80GB"}
        assert devices.devices_of(config, "evaluator", 0) == {"here GPU 0": "NVIDIA H100 80GB HBM3"}
    finally:
        devices.gpu_names.cache_clear()
    config = compose([])
    assert devices.devices_of(config, "learner", 0) == devices.devices_of(config, "generator", 0)
    (name,) = devices.devices_of(config, "learner", 0).values()
    assert name.startswith("CPU ")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5), ("NVIDIA H800", 989.5), ("NVIDIA H800 PCIe", 756.5), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 311.9), ("NVIDIA L4", 121), ("NVIDIA L40S", 362.05), ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 990), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA A10G", None), ("CPU AMD EPYC", None),
    ],
)  # fmt: skip
def test_a_peak_is_found_by_the_words_of_a_name(name: str, tflops: float | None) -> None:
    peak = peak_of(name, "bfloat16", {})
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_peak_is_dense_and_says_where_it_stands() -> None:
    """Where a source gives the figure with sparsity alone, it is half of that."""
    for name, peak in PEAKS.items():
        assert peak.source, name
        if found := re.search(r"([\d,.]+) (?:PFLOPS )?with sparsity", peak.source):
            sparse = float(found[1].replace(",", "")) * (1000 if "PFLOPS" in found[0] else 1)
            assert peak.bfloat16 == pytest.approx(sparse / 2, rel=0.02), name
    assert peak_of("NVIDIA H20", "bfloat16", {}) == 148e12
    assert peak_of("NVIDIA H20", "float32", {}) is None  # no source was found


def test_what_the_user_gives_stands_before_the_table() -> None:
    own = {"EPYC": {"float32": 2e12}, "H100": {"bfloat16": 1e15}}
    assert peak_of("CPU AMD EPYC 9654", "float32", own) == 2e12
    assert peak_of("CPU AMD EPYC 9654", "bfloat16", own) is None
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16", own) == 1e15
    assert peak_of("NVIDIA H100 80GB HBM3", "float32", own) == pytest.approx(66.9e12)


# ---------------------------------------------------------------------- held time


def test_a_device_that_two_roles_share_is_held_once() -> None:
    launch = Launch(10.0)
    launch.holds("learner", {"here GPU 0": "H100"})
    launch.holds("generator", {"here GPU 0": "H100"})
    launch.holds("generator", {"here GPU 1": "H100", "here GPU 2": "H100"})
    assert rows([launch]) == [
        {"name": "H100", "roles": {"generator": 2}, "count": 2, "seconds": 20.0},
        {"name": "H100", "roles": {"generator": 1, "learner": 1}, "count": 1, "seconds": 10.0},
    ]
    assert Launch.of_plain(json.loads(json.dumps(launch.to_plain()))) == launch


def test_a_launch_that_ended_before_every_role_was_there_makes_no_second_device() -> None:
    short, whole = Launch(2.0), Launch(10.0)
    for launch, roles in ((short, ("learner",)), (whole, ("learner", "learner", "generator"))):
        for role in roles:
            launch.holds(role, {"here CPU": "CPU x"})
    wanted = {"name": "CPU x", "roles": {"generator": 1, "learner": 2}, "count": 1, "seconds": 12.0}
    assert rows([short, whole]) == rows([whole, short]) == [wanted]


def test_a_broker_notes_what_is_held_and_the_next_launch_adds_to_it(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.clock.now == 1000.0

    def here(run: Run, role: str, names: dict[str, str]) -> None:
        hello = Hello(role=role, index=0, pid=1, run="run", devices=names)
        run.ask(f"{role}-0", hello, Welcome)

    here(run, "learner", {"a GPU 0": "NVIDIA H100"})
    here(run, "generator", {"a GPU 1": "NVIDIA H100"})
    run.clock.now += 30.0
    run.broker.tick()
    run.clock.now += 0.5  # less than a second after the last note: a kill -9 now would lose it
    run.broker.tick()
    again = run.again()
    here(again, "learner", {"a GPU 0": "NVIDIA H100"})
    again.clock.now += 6.0
    again.broker.ending.write_summary()
    assert again.summary()["devices"] == [
        {"name": "NVIDIA H100", "roles": {"generator": 1}, "count": 1, "seconds": 30.0},
        {"name": "NVIDIA H100", "roles": {"learner": 1}, "count": 1, "seconds": 36.0},
    ]
    assert again.summary()["cost/device_hours"] == pytest.approx(66 / 3600)
    again.broker.ledger.records.put({"launch/0/devices": '{"x": 1}'})  # damaged: left out, and nothing else
    last = again.again()
    last.broker.ending.write_summary()
    assert [row["seconds"] for row in last.summary()["devices"]] == [0.0]
    run.close()


def test_a_role_that_is_started_again_holds_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for process in ("one", "two"):
        run.broker.held.holds("generator-0", "generator", {"a GPU 0": "H100"})
        assert process
    run.clock.now += 5.0
    assert run.broker.held.summary() == {
        "devices": [{"name": "H100", "roles": {"generator": 1}, "count": 1, "seconds": 5.0}]
    }
    run.close()


def test_a_job_without_a_broker_counts_over_its_launches(tmp_path: Path) -> None:
    clock = [0.0]
    for seconds, flops in ((10.0, 5.0), (20.0, 7.0)):
        meter = Meter(tmp_path, "evaluator", {"a GPU 0": "H100"}, lambda: clock[0])
        clock[0] += seconds
        meter.note({"flops": flops / 2})
        meter.note({"flops": flops, "decoded_tokens": 3.0, "busy_evaluate_seconds": 2.0})  # cumulative
        assert not meter.due
    clock[0] += 6.0  # a launch that ends before anything is whole
    assert meter.due
    meter.note()
    assert meter.summary() == {
        "devices": [{"name": "H100", "roles": {"evaluator": 1}, "count": 1, "seconds": 36.0}],
        "compute/evaluator_busy_evaluate_seconds": 4.0, "compute/evaluator_decoded_tokens": 6.0,
        "compute/evaluator_flops": 12.0, "compute/flops": 12.0, "compute/busy_seconds": 4.0, "tokens/generated": 6,
    }  # fmt: skip
    (tmp_path / LAUNCHES).write_text("[{")
    Meter(tmp_path, "evaluator", {}).note({})


# ---------------------------------------------------------------------- hours, shares, money


SUMMARY: dict[str, Any] = {
    "devices": [
        {"name": "NVIDIA H100 80GB HBM3", "roles": {"learner": 2}, "count": 2, "seconds": 7200.0},
        {"name": "NVIDIA H20", "roles": {"generator": 1, "evaluator": 1}, "count": 1, "seconds": 3600.0},
    ],
    "compute/learner_busy_train_seconds": 5400.0, "compute/learner_train_flops": 989.4e12 * 1800,
    "compute/learner_prox_flops": 989.4e12 * 360, "compute/learner_repeated_operations": 989.4e12 * 720,
    "compute/learner_trained_tokens": 1e6, "compute/generator_busy_decode_seconds": 2700.0,
    "compute/evaluator_busy_decode_seconds": 900.0, "compute/generator_flops": 148e12 * 270,
    "compute/generator_decoded_tokens": 2e6, "compute/generator_prefilled_tokens": 3e5,
    "compute/generator_reprefilled_tokens": 1e5, "compute/generator_prefix_hit_tokens": 5e5,
    "tokens/discarded": 4000,
}  # fmt: skip
PRICED = ("cost.prices={H100: 2.0, H20: 1.0}", "cost.date=2026-11-01")
BF16 = ("learner.dtype=bfloat16", "engine.dtype=bfloat16")


def folder(path: Path, summary: dict[str, Any], *arguments: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(compose([*BF16, *arguments])))
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_held_hours_are_shared_out_by_busy_time_and_priced(tmp_path: Path) -> None:
    found = cost.cost_of(folder(tmp_path / "run", SUMMARY, *PRICED))
    learner, generator, evaluator = found.roles
    assert found.hours == {"NVIDIA H100 80GB HBM3": 2.0, "NVIDIA H20": pytest.approx(1.0)}
    assert (learner.held_hours, learner.busy_hours, learner.devices) == (2.0, 1.5, {"NVIDIA H100 80GB HBM3": 2})
    assert (generator.held_hours, evaluator.held_hours) == (pytest.approx(0.75), pytest.approx(0.25))
    assert [role.share for role in found.roles] == pytest.approx([2 / 3, 1 / 4, 1 / 12])
    assert learner.mfu == pytest.approx((1800 + 360) / 7200)
    assert learner.hfu == pytest.approx((1800 + 360 + 720) / 7200)
    assert generator.mfu == generator.hfu == pytest.approx(270 / 2700)
    assert [role.money for role in found.roles] == pytest.approx([4.0, 0.75, 0.25])
    assert (found.money, found.currency, found.date) == (pytest.approx(5.0), "USD", "2026-11-01")
    assert generator.tokens == {"prefilled": 4e5, "prefix hits": 5e5, "decoded": 2e6}
    assert found.discarded == 4000
    row = found.row()
    assert row["cost/money"] == pytest.approx(5.0)
    assert row["cost/generator_device_hours"] == pytest.approx(0.75)
    assert "cost/evaluator_mfu" in row  # 0 operations: its peak is known


def test_the_terminals_table_is_narrow_and_says_of_small_runs_what_they_cost(tmp_path: Path) -> None:
    small = SUMMARY | {"devices": [row | {"seconds": 3.6} for row in SUMMARY["devices"]]}
    found = cost.cost_of(folder(tmp_path / "run", small, *PRICED))
    out = io.StringIO()
    Console(width=80, file=out).print(cost.table(found))
    told = [line.rstrip() for line in out.getvalue().splitlines()]
    assert told[0].split() == ["role", "held", "h", "busy", "h", "share", "model", "FLOPs", "MFU", "HFU", "cost"]
    assert [line.split()[0] for line in told[1:]] == ["learner", "generator", "evaluator", "all"]
    assert told[1].endswith("0.002 USD")  # 3.6 s at 2 USD an hour
    (generator,) = (line for line in cost.markdown(found).splitlines() if line.startswith("| generator"))
    assert "| – | " in generator  # nothing was computed again: no HFU beside the MFU


def test_without_a_price_there_is_no_money_and_without_a_peak_no_mfu(tmp_path: Path) -> None:
    cpu = SUMMARY | {"devices": [{"name": "CPU x", "roles": {"learner": 1}, "count": 1, "seconds": 60.0}]}
    found = cost.cost_of(folder(tmp_path / "none", cpu))
    assert (found.money, found.unpriced, found.roles[0].mfu) == (None, ["CPU x"], None)
    assert not {"cost/money", "cost/learner_mfu", "cost/learner_money"} & found.row().keys()
    assert "`cost.prices` has no price for CPU x" in cost.markdown(found)
    part = cost.cost_of(folder(tmp_path / "part", SUMMARY, "cost.prices={H100: 2.0}", "cost.date=2026-11-01"))
    assert (part.money, part.unpriced) == (None, ["NVIDIA H20"])
    assert [role.money for role in part.roles] == [4.0, None, None]
    given = cost.cost_of(folder(tmp_path / "given", cpu, "cost.peaks={CPU: {bfloat16: 1e16}}"))
    assert given.roles[0].mfu == pytest.approx(989.4e12 * 2160 / (60 * 1e16))
    named = cost.cost_of(folder(tmp_path / "named", cpu, *PRICED, "cost.names={learner: H20}"))
    assert named.hours == {"H20": pytest.approx(1 / 60)}


def test_a_recipe_is_the_sum_of_its_stages_and_a_cold_start_counts_once(tmp_path: Path) -> None:
    stages = ("recipe=cold_start", *PRICED)
    whole = folder(tmp_path / "whole", {}, *stages)
    made = {
        "compute/cold_start_flops": 1e15, "compute/cold_start_busy_seconds": 30.0, "compute/cold_start_tokens": 500,
        "cold_start_devices": [{"name": "NVIDIA H20", "roles": {"learner": 1}, "count": 1, "seconds": 1800.0}],
        "compute/flops": 3e15, "compute/busy_seconds": 80.0,
    }  # fmt: skip
    folder(whole / "stages" / "10_rl", SUMMARY | made, *PRICED)  # the same cold start
    second = folder(whole / "stages" / "2_sft", SUMMARY | made, *PRICED)
    folder(second / "stages" / "1_cold_start", SUMMARY, *PRICED)  # what it cost stands in its run
    found = cost.cost_of(whole)
    assert [stage.name for stage in found.stages] == ["2_sft", "10_rl"]
    assert found.device_hours == pytest.approx(3 + 3.5)
    assert found.money == pytest.approx(5 + 5.5)
    roles = {role.role: role for role in found.roles}
    assert roles["cold start"].held_hours == pytest.approx(0.5)
    assert roles["cold start"].tokens == {"trained": 500}
    assert roles["learner"].held_hours == 4.0
    assert roles["learner"].mfu == pytest.approx(2160 / 7200)
    assert (roles["evaluator"].mfu, roles["evaluator"].flops) == (0.0, 0.0)
    assert sum(role.share for role in found.roles) == pytest.approx(1)
    assert sum(role.money or 0 for role in found.roles) == pytest.approx(found.money)
    told = cost.markdown(found)
    assert "| 2_sft | 3.5 | 54% |" in told
    # R1's own parts agree with its total: 101,376 + 5,000 + 40,960 hours
    assert "| all | 147,336 | 100% | 294,672 USD |" in told
    assert "| R1-Zero | 101,376 | 69% |" in told
    cost.write(whole, found)
    assert json.loads((whole / "cost.json").read_text())["stages"][0]["roles"][0]["role"] == "learner"
    handed = [Stage(n, name, "sft", "", (), {}, "") for n, name in ((2, "sft"), (10, "rl"))]
    summed = whole_summary(whole, handed)
    assert (summed["compute/cold_start_flops"], summed["compute/learner_trained_tokens"]) == (1e15, 2e6)
    assert (summed["compute/flops"], summed["compute/busy_seconds"]) == (3e15 + 2e15, 80 + 50)
    dearer = compose(["cost.prices={H100: 4.0, H20: 2.0}", "cost.date=2027-01-01"]).cost
    assert cost.cost_of(whole, dearer).money == pytest.approx(21)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cost.prices={H100: 2.0}"], "cost.date=: cost.prices needs the day of its prices"),
        (["cost.date=yesterday"], "cost.date=yesterday: must be a day"),
        (["cost.prices={H100: -1}", "cost.date=2026-11-01"], "cost.prices.H100=-1.0: must be ≥ 0"),
        (["cost.peaks={H100: {fp8: 1e15}}"], "cost.peaks.H100={fp8: 1000000000000000.0}: must be operations"),
    ],
)
def test_prices_and_peaks_that_mean_nothing_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(arguments)
    assert words in str(error.value)
