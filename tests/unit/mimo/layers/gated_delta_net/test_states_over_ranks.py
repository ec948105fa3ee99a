"""When states are passed over ranks, and the rule over pieces of rows."""

from __future__ import annotations

import pytest
import torch

from megatron.mimo.layers.gated_delta_net.sizes import Sizes
from megatron.mimo.layers.gated_delta_net.states_over_ranks import states_move_less
from tests.unit.mimo.layers.gated_delta_net.test_delta_rule import Case

# Qwen3.5's: 16 key heads, 32 value heads, of 128.
SIZES = Sizes(key_heads=16, values_per_key=2, key=128, value=128, taps=4)


@pytest.mark.parametrize(
    ("dtype", "lengths", "expected"),
    [
        # Of a key head in bf16: a token 2 * (512 + 4 + 256) = 1,544 bytes, of a piece its matrices
        # 4 * 2 * 128 * 384 = 393,216 and the convolution's inputs 2 * 3 * 512 * 2 = 6,144.
        (torch.bfloat16, [258, 258], False),
        (torch.bfloat16, [259, 259], True),
        (torch.bfloat16, [100, 100, 418, 418], True),
        (torch.bfloat16, [100, 100, 417, 417], False),
        # In fp32 a token is 3,088 bytes, in fp64 as a piece twice that.
        (torch.float32, [131, 131], False),
        (torch.float32, [132, 132], True),
        (torch.float64, [131, 131], False),
        (torch.float64, [132, 132], True),
    ],
)
def test_what_moves_less(dtype: torch.dtype, lengths: list[int], expected: bool) -> None:
    assert states_move_less(lengths, sizes=SIZES, dtype=dtype) is expected


def test_pieces_are_rows_of_their_own() -> None:
    from megatron.mimo.layers.gated_delta_net.delta_rule import (
        delta_rule_of_pieces,
        gated_delta_rule,
    )

    case, borders = Case(lengths=(400,), rows=2), (0, 5, 300, 400)
    *tokens, state = (one.requires_grad_() for one in case.inputs())
    # More columns than the values have, which are 0 there.
    states = torch.stack([state, 2 * state, -state], dim=1).repeat(1, 1, 1, 1, 1, 2)
    out, behind = delta_rule_of_pieces(*tokens, borders, states)
    q, k, v, *gates = tokens
    wide = (q, k, torch.cat([v, torch.zeros_like(v)], dim=-1), *gates)
    parts = [
        gated_delta_rule(*(one[:, start:stop] for one in wide), state_BGRKV=before)
        for start, stop, before in zip(borders, borders[1:], states.unbind(1), strict=False)
    ]
    expected = (
        torch.cat([part for part, _ in parts], dim=1),
        torch.stack([last for _, last in parts], dim=1),
    )
    gradients = []
    for pair in ((out, behind), expected):
        loss = sum((one * one.detach().cos()).sum() for one in pair)
        gradients.append(torch.autograd.grad(loss, [*tokens, state], retain_graph=True))
    for got, want in zip((out, behind, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_what_is_almost_forgotten_is_0() -> None:
    """And no number so small that a processor is slow with it, forward or backward."""
    from megatron.mimo.layers.gated_delta_net.delta_rule import delta_rule_of_pieces

    q, k, v, decay, strength, state = (one.float() for one in Case(lengths=(230,)).inputs())
    states = state.unsqueeze(1).requires_grad_()
    tokens = (q, k, torch.zeros_like(v), decay, strength)
    _, behind = delta_rule_of_pieces(*tokens, (0, 40, 230), states.expand(-1, 2, -1, -1, -1, -1))
    assert behind[:, 0].any()
    assert not behind[:, 1].any()
    (gradient,) = torch.autograd.grad(behind.sum(), states)
    for one in (behind, gradient):
        assert ((one == 0) | (one.abs() > 1e-13)).all()
