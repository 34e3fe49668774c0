"""How close the weight channels come to the machine, and what delta encoding saves on a real run's versions.

    python benchmarks/weights.py [--repeats 9] [--megabytes 16 128 512 1024] [--only shm disk delta sglang]

A channel is a class with ``push`` and ``pull``: the publisher is this process, the reader another one, and both have
their parameters in memory that was touched before. A measurement goes from the call of ``push`` to the reader's word
that its parameters hold the version. Beside each channel stands its floor, the least that the machine can do for the
same bytes, through the same two processes, right before or after (the order turns round in every second repeat):

- shm: two memcpy, tensor by tensor, parameters → a shared mapping → parameters; one thread each.
- disk: one write and one read of the same bytes, without fsync. ``disk_ratio`` is against overwriting a file that is in
  the page cache, as the channel does; ``disk_ratio_new_file`` against writing a new one.

A ratio is floor / channel, the median over repeats of the ratio within a repeat, with its least and greatest. Weights
are random float32, shaped as a Llama's. ``shm_ratio`` and ``disk_ratio`` are the worse of the sizes of 500 MB and more.
Of large versions the channel copies and hashes with two threads where it has two cores, and its reader hashes all of a
version before it hands out any, which reads the bytes once more: with both cores busy elsewhere two memcpy are out of
reach.

``delta_share`` is bytes written over bytes of whole versions, over the versions that the learner makes of the batches
of one real run of the embedded default (weights.full_every=10), at its learning rate and at 1e-6, in float32 as it
trains and as bfloat16. ``delta_share`` itself is bfloat16 at 1e-6, which is what large models use. ``of_a_change``: of
the versions that were not whole; ``without_header``: a file's header names its tensors, and weighs something where the
tensors are as small as the default's (0.3 MB).

``sglang`` is the same way's end in a real SGLang server on the CPU, idle, for each channel: `publish` until the server
answers that it holds the version (pause, flush, transfer, name, continue: seven HTTP calls), beside two memcpy of the
same bytes in this process. It needs `make sglang-cpu`. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from common import Arm, Run, launch, machine, say
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from offtrail.platform.config.schema import Config, SglangConfig
from offtrail.platform.engines.channels import open_channel, open_reader
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.learner.checkpoint import gather
from offtrail.platform.learner.make import make_trainer
from offtrail.platform.learner.world import World
from offtrail.platform.model.policy import load_model
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.weights.files import as_bytes
from offtrail.platform.weights.store import Publisher, Subscriber, remove

SHAPES = {16: (192, 8_000), 128: (512, 32_000), 512: (1024, 32_000), 1024: (1536, 32_000)}
"""Megabytes: (hidden size, vocabulary) of a model that has about so many in float32."""
SERVED: tuple[Literal["shm", "disk", "ipc", "distributed"], ...] = ("shm", "disk", "ipc", "distributed")
WARM = 8
"""Versions until every file is written again and every page of it is in both page tables."""


class Channel(Protocol):
    """One way from a publisher's parameters to a reader's. Made in both processes, from the same ``place``."""

    def __init__(self, place: Path) -> None: ...

    def push(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """In the publisher."""

    def pull(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """In the reader, after ``push``: ``parameters`` hold the version."""

    def close(self) -> None:
        """In the publisher: take away what stands in ``place``."""


class Store:
    """platform/weights/store.py, in shared memory or on a disk."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.publisher: Publisher | None = None
        self.subscriber = Subscriber(place)

    def push(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """As the learner does."""
        self.publisher = self.publisher or Publisher(self.place)
        self.publisher.publish(version, parameters)

    def pull(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """As an engine does."""
        with self.subscriber.open(version) as weights:
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def close(self) -> None:
        """As the launcher does."""
        if self.publisher is not None:
            self.publisher.close()
        remove(self.place)


class Memcpy:
    """The floor of shared memory."""

    def __init__(self, place: Path) -> None:
        self.place = place.with_suffix(".floor")
        self.memory: dict[str, Tensor] = {}

    def push(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """Into the mapping."""
        for name, shared in self._mapped(parameters).items():
            shared.copy_(parameters[name])

    def pull(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """Out of it."""
        for name, shared in self._mapped(parameters).items():
            parameters[name].copy_(shared)

    def close(self) -> None:
        """Remove it."""
        self.place.unlink()

    def _mapped(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.memory:
            size = size_of(parameters)
            with self.place.open("a+b") as file:
                file.truncate(size)
                whole = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
            parts = zip(torch.split(whole, [p.nbytes for p in parameters.values()]), parameters.items(), strict=True)
            self.memory = {name: part.view(p.dtype).view(p.shape) for part, (name, p) in parts}
        return self.memory


class Overwrite:
    """A floor of disks: write over a file, read it."""

    new = False

    def __init__(self, place: Path) -> None:
        self.place = place.with_suffix(".new" if self.new else ".floor")

    def push(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """Write, without fsync."""
        path = self.place.with_suffix(".writing") if self.new else self.place
        with path.open("wb" if self.new or not path.exists() else "r+b", buffering=0) as file:
            for parameter in parameters.values():
                assert file.write(as_bytes(parameter).data) == parameter.nbytes
        os.replace(path, self.place)

    def pull(self, version: int, parameters: Mapping[str, Tensor]) -> None:
        """Read into the parameters."""
        with self.place.open("rb", buffering=0) as file:
            for parameter in parameters.values():
                assert file.readinto(as_bytes(parameter).data) == parameter.nbytes

    def close(self) -> None:
        """Remove it."""
        self.place.unlink()


class NewFile(Overwrite):
    """A floor of disks: write a new file and rename it over the old one, read it."""

    new = True


def shaped(megabytes: int) -> dict[str, Tensor]:
    """Random float32 parameters of a Llama of about so many megabytes."""
    hidden, vocabulary = SHAPES[megabytes]
    inner = 8 * hidden // 3 // 64 * 64
    layer = {
        **{f"self_attn.{x}_proj.weight": (hidden, hidden) for x in "qo"},
        **{f"self_attn.{x}_proj.weight": (hidden // 4, hidden) for x in "kv"},
        **{f"mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, inner),
        **{f"{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")},
    }
    found = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden)}
    number = 0
    while size_of(found) < megabytes * 10**6:
        found |= {f"model.layers.{number}.{name}": torch.randn(shape) for name, shape in layer.items()}
        number += 1
    return found


def size_of(parameters: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(p.nbytes for p in parameters.values())


def reader(
    kinds: Mapping[str, type[Channel]], place: Path, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[str, int], float]:
    """The reader's process: its parameters, and its end of each channel. Gives an element of what it read last."""
    torch.set_num_threads(1)
    channels = {name: kind(place) for name, kind in kinds.items()}
    parameters = {name: torch.full(shape, -1.0) for name, shape in shapes.items()}
    last = parameters[next(iter(parameters))].view(-1)

    def pull(name: str, version: int) -> float:
        channels[name].pull(version, parameters)
        return float(last[0])

    return pull


def race(kinds: Mapping[str, type[Channel]], folder: Path, megabytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each channel by repeat, after WARM that warm up."""
    torch.set_num_threads(1)
    place = folder / f"offtrail-bench-{os.getpid()}"
    parameters = shaped(megabytes)
    channels = {name: kind(place) for name, kind in kinds.items()}
    allowed = os.sched_getaffinity(0)
    arm = Arm(reader, kinds, place, {name: tuple(p.shape) for name, p in parameters.items()}, cores=allowed)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    marked = parameters[next(iter(parameters))].view(-1)
    try:
        for repeat in range(WARM + repeats):
            for name in list(kinds)[:: 1 if repeat % 2 else -1]:
                marked[0] = mark = float(2 * repeat + len(name) / 16)
                began = time.perf_counter()
                channels[name].push(repeat, parameters)
                found = arm.measure(name, repeat)
                seconds[name].append(time.perf_counter() - began)
                assert found == mark, f"{name}: the reader has {found}, published was {mark}"
    finally:
        arm.close()
        for channel in channels.values():
            channel.close()
    return {name: found[WARM:] for name, found in seconds.items()}


def spread(values: list[float], digits: int = 3) -> list[float]:
    """Median, least, greatest."""
    return [round(float(f(values)), digits) for f in (statistics.median, min, max)]


def ratios(seconds: Mapping[str, list[float]], floor: str, channel: str) -> list[float]:
    """Floor / channel by repeat."""
    return [f / c for f, c in zip(seconds[floor], seconds[channel], strict=True)]


def file_channel(name: str, folder: Path, sizes: list[int], repeats: int) -> dict[str, Any]:
    """Figures of ``shm`` or ``disk``."""
    floors: dict[str, type[Channel]] = {"floor": Memcpy} if name == "shm" else {"floor": Overwrite, "new_file": NewFile}
    row: dict[str, Any] = {}
    worst: dict[str, list[float]] = {}
    for megabytes in sizes:
        seconds = race({"channel": Store, **floors}, folder, megabytes, repeats)
        row[f"{name}_{megabytes}_seconds"] = {arm: spread(values, 4) for arm, values in seconds.items()}
        for floor in floors:
            key = f"{name}_ratio" + ("" if floor == "floor" else f"_{floor}")
            found = spread(ratios(seconds, floor, "channel"))
            row[f"{key}_{megabytes}"] = found
            say(f"{key} at {megabytes} MB: {found[0]} ({found[1]}–{found[2]})")
            if megabytes >= 500:
                worst[key] = min(worst.get(key, found), found)
    return (
        {key: found[0] for key, found in worst.items()} | {f"{key}_spread": found for key, found in worst.items()} | row
    )


def versions(run: Run, steps: int, rate: float) -> list[dict[str, Tensor]]:
    """The versions that the learner makes of the run's batches at a learning rate."""
    config = run.config
    config.learner.optim.lr = rate
    torch.set_num_threads(config.learner.threads)
    model = load_model(run.start)
    trainer = make_trainer(config, World(0, 1, torch.device("cpu")), model, run.start, Activity())
    found = [{n: t.clone() for n, t in gather(trainer.module).items()}]
    for batch in run.batches(0, steps):
        trainer.step(batch.step, batch)
        found.append({n: t.clone() for n, t in gather(trainer.module).items()})
    return found


def encoded(channel: Path, found: list[dict[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Any]:
    """Shares of the bytes of whole versions, by the publisher; each version is read back and compared bit for bit."""
    publisher, subscriber = Publisher(channel, dtype=dtype, full_every=10), Subscriber(channel)
    whole, shares, without = 0.0, list[float](), list[float]()
    for version, tensors in enumerate(found):
        publisher.publish(version, tensors)
        whole += publisher.bytes_last / publisher.delta_share
        if publisher.delta_share < 1:
            with (channel / f"v{version:08d}.safetensors").open("rb") as file:
                data = publisher.bytes_last - 8 - int.from_bytes(file.read(8), "little")
            shares.append(publisher.delta_share)
            without.append(data / sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values()))
        with subscriber.open(version) as weights:
            for name, tensor in tensors.items():
                assert torch.equal(weights[name], tensor.to(dtype or tensor.dtype)), f"{name} of {version} differs"
    publisher.close()
    remove(channel)
    changes = {"of_a_change": spread(shares, 4), "of_a_change_without_header": spread(without, 4)} if shares else {}
    return {"all": round(publisher.bytes_published / whole, 4), **changes}


def delta_shares(folder: Path, steps: int) -> dict[str, Any]:
    """Of one real run's batches, trained at its learning rate and at 1e-6."""
    run = launch(folder, "delta", [f"learner.steps={steps}", "eval.every=0"])
    row: dict[str, Any] = {}
    for rate in (run.config.learner.optim.lr, 1e-6):
        found = versions(run, steps, rate)
        for dtype in (None, torch.bfloat16):
            name = f"{'float32' if dtype is None else 'bfloat16'}_lr{rate:g}"
            row[f"delta_share_{name}"] = encoded(folder / "channel", found, dtype)
            say(f"delta_share {name}: {row[f'delta_share_{name}']}")
    return {"delta_share": row["delta_share_bfloat16_lr1e-06"]["all"], **row}


def sglang_channels(folder: Path, sizes: list[int], repeats: int) -> dict[str, Any]:
    """Seconds from publish to applied of every channel into one real server, and of two memcpy."""
    row: dict[str, Any] = {}
    for megabytes in sizes:
        model = folder / f"model-{megabytes}"
        parameters = _qwen(model, megabytes)
        memory = {name: torch.empty_like(tensor) for name, tensor in parameters.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *SERVED)}
        settings = SglangConfig(max_running=8, hang_seconds=300.0)
        engine = SglangEngine(
            model, settings, max_length=64, threads=1, owner="generator-0", count=1, run_dir=folder / f"run-{megabytes}"
        )
        version = 0
        try:
            (folder / f"run-{megabytes}" / "start").symlink_to(model)
            for kind in SERVED:
                config = Config(engine=settings)
                config.weights.channel = kind
                place = (Path("/dev/shm") if kind != "disk" else folder) / f"offtrail-bench-{os.getpid()}"
                channel = open_channel(config, place, folder / f"run-{megabytes}", 2)
                ends = open_reader(config, place)
                for _ in range(WARM // 2 + repeats):
                    version += 1
                    began = time.perf_counter()
                    for name, tensor in parameters.items():
                        memory[name].copy_(tensor)
                        tensor.copy_(memory[name])
                    middle = time.perf_counter()
                    channel.publish(version, parameters)
                    while engine.version != version:
                        with ends.open(version) as weights:
                            engine.load_weights(version, weights)
                    seconds["memcpy"].append(middle - began)
                    seconds[kind].append(time.perf_counter() - middle)
                channel.close()
                remove(place)
        finally:
            engine.close()
        found = {name: spread(values[WARM // 2 :], 4) for name, values in seconds.items()}
        row[f"sglang_{megabytes}_seconds"] = found
        say(f"sglang at {megabytes} MB: " + ", ".join(f"{name} {times[0]} s" for name, times in found.items()))
    return row


def _qwen(folder: Path, megabytes: int) -> dict[str, Tensor]:
    """A random float32 Qwen3 of about so many megabytes, saved with its configuration; its parameters."""
    hidden, vocabulary = SHAPES[megabytes]
    layers = max(1, round((megabytes * 10**6 / 4 - vocabulary * hidden) / (11 * hidden * hidden)))
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    characters = {f"<{i}>": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>").save_pretrained(folder)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--megabytes", type=int, nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20, help="learner steps of the run whose versions are encoded")
    parser.add_argument("--only", nargs="*", default=["shm", "disk", "delta", "sglang"])
    parser.add_argument("--disk", type=Path, default=Path.cwd(), help="a folder on the disk that is measured")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    row: dict[str, Any] = {"benchmark": "weights", **machine()}
    if "shm" in args.only:
        row |= file_channel("shm", Path("/dev/shm"), args.megabytes, args.repeats)
    if "disk" in args.only:
        row |= file_channel("disk", args.disk, args.megabytes, args.repeats)
    if "delta" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            row |= delta_shares(Path(folder), args.steps)
    if "sglang" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            row |= sglang_channels(Path(folder), args.megabytes, args.repeats)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
