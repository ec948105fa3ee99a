"""The chunked gated delta rule against the recurrence in fp64: outputs, state, every gradient."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError

NAMES = ("output", "state", "q", "k", "v", "decay", "strength", "first state")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Documents of one packed row, or the tokens of ``rows`` that are not packed."""

    lengths: tuple[int, ...]
    rows: int = 1
    heads: tuple[int, int] = (2, 3)  # key heads, value heads of each
    decay: str = "mild"
    strength: tuple[float, float] = (0.0, 1.0)

    def inputs(self) -> tuple[Tensor, ...]:
        """Queries, keys, values, decays, strengths and the first state, in fp64."""
        generator = torch.Generator().manual_seed(sum(self.lengths))
        G, R = self.heads
        B, T, K, V = self.rows, sum(self.lengths), 8, 5

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        share = draw(B, T, G, R).sigmoid()
        decay = {
            "mild": -share,
            "none": torch.zeros_like(share),
            # Tokens that forget all but 1e-40 or everything, between tokens that forget little.
            "mixed": torch.where(share < 0.1, -92.0, torch.where(share < 0.2, -1e4, -1e-3 * share)),
        }[self.decay]
        low, high = self.strength
        strength = (low + (high - low) * 2 * (draw(B, T, G, R).sigmoid() - 0.25)).clamp(0, 1)
        keys = [draw(B, T, G, K), draw(B, T, G, K)]
        return *keys, draw(B, T, G, R, V), decay, strength, draw(B, G, R, K, V)

    def documents(self) -> Tensor | None:
        if len(self.lengths) == 1:
            return None
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor, state: Tensor, **packed: Any
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    documents = packed["documents_T"]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    outputs = []
    for t in range(q.size(1)):
        if documents is not None and t > 0 and documents[t] != documents[t - 1]:
            state = torch.zeros_like(state)
        key, query = k[:, t, :, None, :, None], q[:, t, :, None, :, None]
        state = decay[:, t, :, :, None, None].exp() * state
        held = (state * key).sum(-2)
        correction = strength[:, t, :, :, None] * (v[:, t] - held)
        state = state + key * correction.unsqueeze(-2)
        outputs.append((state * query).sum(-2) * q.size(-1) ** -0.5)
    return torch.stack(outputs, dim=1), state


def results(rule: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    leaves = [one.to(device, dtype).requires_grad_() for one in case.inputs()]
    *tokens, state = leaves
    documents = case.documents()
    named = {"documents_T": None if documents is None else documents.to(device)}
    if rule is recurrence:
        out, last = rule(*tokens, state, **named)
    else:
        out, last = rule(*tokens, state_BGRKV=state, **named)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, last)]
    loss = sum((x * weight.to(x)).sum() for x, weight in zip((out, last), weights, strict=True))
    gradients = torch.autograd.grad(loss, leaves)
    return [one.detach().cpu() for one in (out, last, *gradients)]


CASES = {
    "one token": Case(lengths=(1,), rows=2),
    "a chunk": Case(lengths=(64,), heads=(1, 1)),
    "a chunk and a token": Case(lengths=(65,), rows=2, heads=(3, 1)),
    "a stretch and a token": Case(lengths=(257,), heads=(1, 2)),
    "packed, at borders of chunks": Case(lengths=(64, 1, 63, 0, 1, 1, 126, 70)),
    "gates near 0 and 1": Case(lengths=(300,), decay="mixed", strength=(-0.5, 1.5)),
    "packed, gates near 0 and 1": Case(
        lengths=(90, 0, 1, 170), decay="mixed", strength=(-0.5, 1.5)
    ),
    "nothing forgotten": Case(lengths=(130,), decay="none", strength=(1.0, 1.0)),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrence(name: str, device: str) -> None:
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    expected = results(recurrence, CASES[name], torch.float64)
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for got, want, what in zip(
            results(gated_delta_rule, CASES[name], dtype, device), expected, NAMES, strict=True
        ):
            assert got.dtype == dtype
            # Of what is forgotten, the gradient is nothing: no error relative to it.
            error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
            assert error < limit, f"{what}, {dtype}: relative error {error:.1e}"


def test_random_lengths_equal_the_recurrence() -> None:
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    draw = random.Random(4)
    for _ in range(4):
        lengths = tuple(draw.choice((0, 1, 3, 30, 64, 100)) for _ in range(draw.randint(2, 6)))
        case = Case(lengths=(*lengths, 2), heads=(draw.randint(1, 3), draw.randint(1, 3)))
        expected = results(recurrence, case, torch.float64)
        for got, want in zip(results(gated_delta_rule, case, torch.float32), expected, strict=True):
            assert (got.double() - want).norm() <= 1e-5 * want.norm().clamp(min=1e-6), case


def test_half_precision_keeps_its_state_in_fp32_and_few_bytes() -> None:
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    case = Case(lengths=(520,), heads=(2, 2))
    leaves = [one.bfloat16().requires_grad_() for one in case.inputs()[:3]]
    gates = [one.float().requires_grad_() for one in case.inputs()[3:5]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, state = gated_delta_rule(*leaves, *gates)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = gated_delta_rule(*(one.detach().float() for one in (*leaves, *gates)))
    assert torch.equal(out, expected.bfloat16())
    # Inputs as they are, and a state of fp32 for every 256 tokens of each head.
    inputs = {one.data_ptr() for one in (*leaves, *gates)}
    states = [one for one in kept if one.data_ptr() not in inputs]
    assert len(kept) - len(states) == 5
    assert [tuple(one.shape) for one in states] == [(4, 8, 5)] * 3
    out.sum().backward()
    assert [one.grad.dtype for one in leaves] == [torch.bfloat16] * 3


def test_repeats_to_the_bit() -> None:
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    case = CASES["packed, gates near 0 and 1"]
    once, again = (results(gated_delta_rule, case, torch.float32) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_shapes_that_do_not_fit_are_refused() -> None:
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    q, k, v, decay, strength, _ = Case(lengths=(3,)).inputs()
    with pytest.raises(InputError, match=r"expected \[B, T, G, K\] twice"):
        gated_delta_rule(q, k, v.flatten(2, 3), decay, strength)
