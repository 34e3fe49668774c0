"""SmolLM2-135M-Instruct, as `make real-model` leaves it: tokens, prompts and greedy answers of both engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offtrail.core.protocols import Completion, Engine, Request
from offtrail.core.types import Problem, Sampling
from offtrail.platform.config.schema import LocalConfig, LoraConfig, PromptConfig, SglangConfig
from offtrail.platform.engines.local import LocalEngine
from offtrail.platform.engines.sglang.engine import SglangEngine
from offtrail.platform.model import lora
from offtrail.platform.model.text import Text

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not MODEL.is_dir(), reason="models/smollm2-135m-instruct is not there: make real-model"),
    pytest.mark.timeout(900),
]

KNOWN = {
    "1234567890 + 3.14159": [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 1232, 216, 35, 30, 33, 36, 33, 37, 41],
    "  multiple   spaces  and\ttabs\n": [216, 2701, 256, 5600, 216, 284, 197, 100, 7366, 198],
    "don't can't won't I'm you're": [12420, 982, 416, 982, 3763, 982, 339, 5248, 346, 2316],
    "😀🚀 emoji test 🎉": [10813, 242, 218, 10813, 244, 218, 649, 33777, 1028, 15107, 232, 227],
    "trailing space ": [4861, 4966, 1898, 216],
}
"""Text → tokens by the original tokenizer of HuggingFaceTB/SmolLM2-135M, as others have recorded them
(github.com/bulebrainbrand/smollm2-135M, reference.json).
"""
SYSTEM = "You answer in one short sentence."
PROMPTS = (
    "What is the capital of France?",
    "What is 12 + 5? Answer with the number only.",
    "Name three colours.",
    "Write a Python function that doubles a number.",
    "Wie heißt die Hauptstadt von Österreich?",
)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(MODEL, PromptConfig(system=SYSTEM))


@pytest.fixture(scope="module")
def asked(text: Text) -> list[Request]:
    problems = [Problem("t", i, prompt, "") for i, prompt in enumerate(PROMPTS)]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=text.stop_token_ids)
    return [Request(i, tokens, 1, sampling) for i, tokens in enumerate(text.encode_all(problems))]


@pytest.fixture(scope="module")
def theirs() -> list[list[int]]:
    """Transformers' own way from a question to an answer: its chat template, its `generate`, its end, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append(answer[0, given["input_ids"].shape[1] :].tolist())
    return found


def local(folder: Path) -> Engine:
    return LocalEngine(MODEL, LocalConfig(), max_length=256, threads=1)


def server(folder: Path) -> Engine:
    config = SglangConfig(max_running=8, start_seconds=300.0)
    return SglangEngine(MODEL, config, max_length=256, threads=1, owner="generator-0", count=1, run_dir=folder)


@pytest.fixture(params=[local, server], ids=["local", "sglang"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    make: Callable[[Path], Engine] = request.param
    made = make(tmp_path)
    yield made
    made.close()


def test_tokens_are_the_original_tokenizers(text: Text) -> None:
    for words, ids in KNOWN.items():
        assert text.tokenizer(words, add_special_tokens=False)["input_ids"] == ids
        assert text.decode(np.array(ids, np.int32)) == words


def test_a_question_is_told_by_the_models_chat_template(text: Text) -> None:
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text.stop_token_ids == (end,)
    assert text.told(Problem("t", 0, "What is 2+2?", "")) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "named SmolLM" in Text(MODEL).told(Problem("t", 0, "What is 2+2?", "")), "the template's own system prompt"


def test_greedy_answers_are_transformers_own(
    engine: Engine, text: Text, asked: list[Request], theirs: list[list[int]]
) -> None:
    engine.generate(asked)
    done: list[Completion] = []
    limit = time.monotonic() + 600
    while engine.unfinished:
        done += engine.step()
        assert time.monotonic() < limit, f"{engine.unfinished} samples never came"
    ours: dict[int, Any] = {completion.request: completion for completion in done}
    assert [ours[i].tokens.tolist() for i in range(len(PROMPTS))] == theirs
    assert {ours[i].finish for i in ours} == {"stop", "length"}, "some answers should end, and some be cut"
    assert "Paris" in text.decode(ours[0].tokens)


def test_merged_weights_and_adapters_are_nearer_to_each_other_than_float32_is_to_the_exact_numbers(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Over 30 layers the sum W + 2·B·A is rounded as often as any other product: no fixed bound holds for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # transformers' own computes in float32, whatever x is
        scaled: torch.Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled

    prose = (Path(__file__).parents[2] / "LICENSE").read_text()[:1500]
    ids = AutoTokenizer.from_pretrained(MODEL)(prose, return_tensors="pt")["input_ids"][:, :256]
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def logprobs(model: Any) -> torch.Tensor:
        table = model(ids).logits[0, :-1].log_softmax(-1)
        return table.gather(1, ids[0, 1:, None])[:, 0].double()

    def whole(dtype: torch.dtype) -> Any:
        made = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        with torch.no_grad():
            for layer, (a, b) in lora.pairs(held).items():
                weight = made.get_parameter(f"{layer}.weight")
                # by hand in float64, and as it is published
                weight.copy_(weight + 2 * b.double() @ a.double() if dtype == torch.float64 else merged(weight, a, b))
        return made

    def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora.merged(weight, a, b, 2.0)

    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    start = logprobs(plain)
    adapted = lora.add(plain, LoraConfig(rank=16, alpha=32.0), 0)
    with torch.no_grad():
        for name, b in lora.adapters_of(adapted).items():
            if ".lora_B." in name:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.02)
    held = {name: parameter.detach().clone() for name, parameter in lora.adapters_of(adapted).items()}
    narrow = {"adapters": logprobs(adapted), "merged": logprobs(whole(torch.float32))}
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    exact, wide = logprobs(whole(torch.float64)), logprobs(adapted.double())
    told = {"float64": wide - exact, "float32": narrow["adapters"] - narrow["merged"]}
    told |= {f"{name} in float32, from the exact": value - exact for name, value in narrow.items()}
    for name, gap in told.items():
        record_property(
            "told", f"{name}: {float(gap.abs().mean()):.2g} in the mean, {float(gap.abs().max()):.2g} at most"
        )
    assert float((narrow["adapters"] - start).abs().mean()) > 0.1, "the adapters should be seen"
    assert float(told["float64"].abs().max()) < 1e-11
    assert float(told["float32"].abs().mean()) < float((narrow["merged"] - exact).abs().mean())
