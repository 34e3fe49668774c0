"""The head: scores, losses and gradients equal float64's over the full logits, whatever the cut."""

from __future__ import annotations

import gc
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offtrail.platform.model import head as module
from offtrail.platform.model.head import Head, Reference, TokenOutputs, loss_in_head, pieces, token_logprobs

M, H, V = 11, 8, 19
CUTS = {"one piece": 1 << 20, "tiles": 100, "a column a tile": 11}


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_COLUMNS", 1)


class Case:
    """Inputs in a dtype, with gradient; ``bias`` or not, soft caps or not; a reference of another width."""

    def __init__(self, dtype: torch.dtype, *, bias: bool = False, cap: float = 0.0) -> None:
        draw, self.cap = torch.Generator().manual_seed(5), cap

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.hidden, self.weight = (t.to(dtype).requires_grad_() for t in (make(M, H), make(V, H)))
        self.bias = make(V).to(dtype).requires_grad_() if bias else None
        self.targets = torch.randint(V, (M,), generator=draw)
        self.ref_hidden, self.ref_weight = make(M, 5).to(dtype), make(V, 5).to(dtype)
        self.inverse = torch.linspace(0.5, 2.0, M, dtype=dtype).unsqueeze(1)

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, cap=self.cap)

    @property
    def reference(self) -> Reference:
        return Reference(self.ref_hidden, Head(self.ref_weight, cap=self.cap / 2))

    def full(self) -> TokenOutputs:
        """By autograd over the full logits."""
        y, y_ref = torch.nn.functional.linear(self.hidden, self.weight, self.bias), self.ref_hidden @ self.ref_weight.T
        if self.cap:
            y, y_ref = self.cap * (y / self.cap).tanh(), self.cap / 2 * (y_ref / (self.cap / 2)).tanh()
        logp, logq = torch.log_softmax(y * self.inverse, -1), torch.log_softmax(y_ref * self.inverse, -1)
        return TokenOutputs(
            logp.gather(1, self.targets[:, None])[:, 0],
            -(logp.exp() * logp).sum(-1),
            (logp.exp() * (logp - logq)).sum(-1),
        )

    def grads(self) -> list[Tensor]:
        out = [t.grad for t in (self.hidden, self.weight, self.bias) if t is not None]
        assert all(g is not None for g in out)
        return [g for g in out if g is not None]


def weigh(scores: TokenOutputs, coefficients: tuple[float, float, float], rows: slice = slice(None)) -> Tensor:
    """A loss with another weight for each row and score."""
    each = torch.linspace(-1, 1, M, dtype=scores.logprobs.dtype)[rows]
    return sum((c * (each * s).sum() for c, s in zip(coefficients, scores, strict=True) if c), torch.zeros(()))


@pytest.mark.parametrize("cap", [0.0, 3.0], ids=["", "cap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("coefficients", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.5, -2)], ids=["lp", "S", "KL", "all"])
@pytest.mark.parametrize("cut", CUTS)
def test_scores_and_gradients_equal_float64(cut: str, coefficients: Any, bias: bool, cap: float) -> None:
    exact, mine = Case(torch.float64, bias=bias, cap=cap), Case(torch.float32, bias=bias, cap=cap)
    expected = exact.full()
    weigh(expected, coefficients).backward()
    scores = token_logprobs(
        mine.hidden, mine.head, mine.targets, mine.inverse, reference=mine.reference, elements=CUTS[cut]
    )
    weigh(scores, coefficients).backward()
    for a, b in zip([*scores, *mine.grads()], [*expected, *exact.grads()], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("cap", [0.0, 3.0], ids=["", "cap"])
@pytest.mark.parametrize("elements", [1 << 20, 100, 11])
def test_loss_inside_the_head_equals_the_loss_behind_it(elements: int, cap: float) -> None:
    exact, mine = Case(torch.float64, bias=True, cap=cap), Case(torch.float32, bias=True, cap=cap)
    coefficients = (1.0, 0.5, -2.0)
    expected = exact.full()
    (3 * weigh(expected, coefficients)).backward()
    seen = []

    def loss(rows: slice, scores: TokenOutputs) -> Tensor:
        seen.append(rows)
        return weigh(scores, coefficients, rows)

    total, scores = loss_in_head(
        mine.hidden, mine.head, mine.targets, loss, mine.inverse,
        pieces=pieces([4, 1, 6], V, elements), reference=mine.reference, elements=elements,
    )  # fmt: skip
    (3 * total).backward()
    assert seen == {1 << 20: [slice(0, 11)], 100: [slice(0, 5), slice(5, 11)]}.get(
        elements, [slice(0, 4), slice(4, 5), slice(5, 11)]
    )
    assert not any(s.requires_grad for s in scores if s is not None)
    for a, b in zip([*scores, *mine.grads()], [*expected, *exact.grads()], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("cut", CUTS)
def test_rows_without_gradient_cost_nothing_and_change_nothing(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, widths = Case(torch.float32), []
    plain = module._Gradients.add_weight

    def spy(self: Any, columns: slice, d_z: Tensor, hidden: Tensor, products: torch.dtype) -> None:
        widths.append(len(d_z))
        plain(self, columns, d_z, hidden, products)

    monkeypatch.setattr(module._Gradients, "add_weight", spy)
    weights = torch.zeros(M)
    weights[[2, 7]] = torch.tensor([1.0, -3.0])
    (token_logprobs(case.hidden, case.head, case.targets, elements=CUTS[cut]).logprobs * weights).sum().backward()
    assert set(widths) == {2}
    exact = Case(torch.float64)
    logp = torch.log_softmax(exact.hidden @ exact.weight.T, -1).gather(1, exact.targets[:, None])[:, 0]
    (logp * weights).sum().backward()
    for a, b in zip(case.grads(), exact.grads(), strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(("rows", "signal"), [(0, 1.0), (M, 0.0)], ids=["no rows", "no signal"])
@pytest.mark.parametrize("inside", [False, True])
def test_without_rows_or_signal_gradients_are_zero(rows: int, signal: float, inside: bool) -> None:
    case = Case(torch.float32, bias=True)
    hidden, targets = case.hidden[:rows], case.targets[:rows]
    if inside:
        cut = pieces([rows] if rows else [], V, 100)
        loss, _ = loss_in_head(
            hidden, case.head, targets, lambda _, s: s.logprobs.sum() * signal, pieces=cut, elements=100
        )
    else:
        loss = token_logprobs(hidden, case.head, targets, elements=100).logprobs.sum() * signal
    loss.backward()
    assert not any(g.any() for g in case.grads())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("inside", [False, True], ids=["tiles", "pieces"])
def test_bfloat16_weights_lose_nothing_to_the_cut(inside: bool) -> None:
    """One rounding, at the end: the error is that of rounding the exact gradient itself, not of 64 rounded sums."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=draw).bfloat16().requires_grad_() for s in ((512, 16), (64, 16)))
    targets = torch.randint(64, (512,), generator=draw)
    exact = weight.detach().double().requires_grad_()
    logp = torch.log_softmax(hidden.detach().double() @ exact.T, -1).gather(1, targets[:, None])
    logp.sum().backward()
    assert exact.grad is not None
    if inside:
        total, _ = loss_in_head(
            hidden, Head(weight), targets, lambda _, s: s.logprobs.sum(), pieces=pieces([8] * 64, 64, 512), elements=512
        )
        total.backward()
    else:
        token_logprobs(hidden, Head(weight), targets, elements=512).logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    rounding = relative(exact.grad.bfloat16(), exact.grad)
    assert relative(weight.grad, exact.grad) < 1.01 * rounding


def test_bfloat16_products_round_the_operands_only() -> None:
    case = Case(torch.float32)
    scores = token_logprobs(case.hidden, Head(case.weight, None, torch.bfloat16), case.targets, elements=100)
    rounded = case.hidden.detach().bfloat16().double() @ case.weight.detach().bfloat16().double().T
    expected = torch.log_softmax(rounded, -1).gather(1, case.targets[:, None])[:, 0]
    assert (scores.logprobs - expected).abs().max() < 1e-5
    scores.logprobs.sum().backward()
    exact = Case(torch.float64)
    torch.log_softmax(exact.hidden @ exact.weight.T, -1).gather(1, exact.targets[:, None]).sum().backward()
    assert 0 < relative(case.grads()[1], exact.grads()[1]) < 1e-2


@pytest.mark.parametrize("elements", [1 << 20, 40])
def test_a_model_is_no_nats_from_itself(elements: int) -> None:
    case = Case(torch.float32)
    itself = Reference(case.hidden.detach(), Head(case.weight.detach()))
    scores = token_logprobs(case.hidden, case.head, case.targets, reference=itself, elements=elements)
    assert scores.kl is not None
    assert scores.kl.tolist() == [0.0] * M
    scores.kl.sum().backward()
    assert max(float(g.abs().max()) for g in case.grads()) < 1e-6


def test_a_small_kl_survives_large_logits() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 32, generator=draw), 3 * torch.randn(500, 32, generator=draw)
    moved = weight + 1e-4 * torch.randn(500, 32, generator=draw)
    logp, logq = (torch.log_softmax(hidden.double() @ w.double().T, -1) for w in (weight, moved))
    expected = (logp.exp() * (logp - logq)).sum(-1)
    targets = torch.zeros(64, dtype=torch.long)
    kl = token_logprobs(hidden, Head(weight), targets, reference=Reference(hidden, Head(moved)), elements=3200).kl
    assert kl is not None
    assert 1e-9 < expected.mean() < 1e-6
    assert (kl - expected).abs().max() < 1e-6


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    case = Case(torch.float32)
    with pytest.raises(ValueError, match="the reference's vocabulary has 7 entries, the policy's 19"):
        token_logprobs(
            case.hidden, case.head, case.targets, reference=Reference(case.ref_hidden, Head(torch.zeros(7, 5)))
        )


def test_temperature_by_hand() -> None:
    # logits 0 and ln 3 at T = 1: p = 1/4, 3/4; at T = 1/2: 1 : 9
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    scores = token_logprobs(hidden, Head(weight), torch.tensor([0, 1]), torch.tensor([[1.0], [2.0]]))
    assert scores.logprobs.exp().tolist() == pytest.approx([0.25, 0.9])
    assert scores.entropy[0].item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 400))
def test_pieces_are_whole_samples_within_the_limit(lengths: list[int], elements: int) -> None:
    cut = pieces(lengths, 10, elements)
    starts = {0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()}
    assert cut[0].start == 0
    assert cut[-1].stop == sum(lengths)
    for a, b in itertools.pairwise(cut):
        assert a.stop == b.start
        assert a.stop in starts
    for piece in cut:
        samples = sum(piece.start < s <= piece.stop for s in starts)
        assert samples <= 1 or (piece.stop - piece.start) * 10 <= elements


@pytest.mark.parametrize("elements", [1 << 20, 40])
def test_no_logits_outlive_their_use(elements: int) -> None:
    """A cycle through the autograd node would keep a micro-batch's logits until the collector runs."""
    gc.collect()
    gc.disable()
    try:
        case = Case(torch.float32)
        scores = token_logprobs(case.hidden, case.head, case.targets, reference=case.reference, elements=elements)
        weigh(scores, (1, 1, 1)).backward()
        del scores
        alive = [o for o in gc.get_objects() if type(o) is module._Piece]
        assert alive == []
    finally:
        gc.enable()
