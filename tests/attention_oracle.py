"""Attention as a definition: loops over samples, heads and pairs of tokens, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def make_inputs(
    S: int, B: int, heads: tuple[int, int], D: int, *, K: int | None = None, D_value: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [S, B, H, D], keys, values and the output's gradient [S, B, H * D], in float32."""
    generator = torch.Generator().manual_seed(S * 1009 + B * 101 + sum(heads) + D)
    shapes = (
        (S, B, heads[0], D),
        (K or S, B, heads[1], D),
        (K or S, B, heads[1], D_value or D),
        (S, B, heads[0] * (D_value or D)),
    )
    q, k, v, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    return 2 * q, k, v, gradient


def attention_by_definition(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    seen_BSK: Tensor,
    *,
    scale: float | None = None,
    bias_BHSK: Tensor | None = None,
    kept_BHSK: Tensor | None = None,
) -> list[Tensor]:
    """Output [S, B, H * D] and the gradients of q, k and v; 0 for a query that sees nothing.

    Args:
        inputs: of ``make_inputs``.
        seen_BSK: bool.
        scale: 1 / sqrt(D) by default.
        bias_BHSK: added to the scaled scores.
        kept_BHSK: what dropout multiplies the weights with.
    """
    *leaves, gradient = (tensor.double() for tensor in inputs)
    q, k, v = (leaf.detach().requires_grad_() for leaf in leaves)
    _, B, H, D = q.shape
    per_key_head = H // k.size(2)
    scale = D**-0.5 if scale is None else scale
    samples = []
    for b in range(B):
        heads = []
        for h in range(H):
            scores_SK = q[:, b, h] @ k[:, b, h // per_key_head].T * scale
            if bias_BHSK is not None:
                scores_SK = scores_SK + bias_BHSK[b, h].double()
            weights_SK = torch.where(seen_BSK[b], scores_SK.exp(), 0.0)
            total_S1 = weights_SK.sum(1, keepdim=True)
            weights_SK = weights_SK / torch.where(total_S1 == 0, 1.0, total_S1)
            if kept_BHSK is not None:
                weights_SK = weights_SK * kept_BHSK[b, h].double()
            heads.append(weights_SK @ v[:, b, h // per_key_head])
        samples.append(torch.cat(heads, dim=1))
    out = torch.stack(samples, dim=1)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in (q, k, v) if leaf.grad is not None)]


def pairs(S: int, K: int, rule: Callable[[int, int], bool]) -> Tensor:
    """bool [S, K]: the rule asked for every pair."""
    return torch.tensor([[rule(i, j) for j in range(K)] for i in range(S)])


def packed_pairs(
    lengths: Sequence[int],
    places: Sequence[int],
    tokens: int,
    rule: Callable[[int, int], bool],
) -> Tensor:
    """bool [1, T, T]: the rule inside each document; ``lengths`` tokens in ``places`` rows."""
    owner = [(-1, 0)] * tokens
    start = 0
    for document, (length, place) in enumerate(zip(lengths, places, strict=True)):
        owner[start : start + length] = [(document, position) for position in range(length)]
        start += place

    def seen(i: int, j: int) -> bool:
        (document_i, position_i), (document_j, position_j) = owner[i], owner[j]
        return document_i == document_j >= 0 and rule(position_i, position_j)

    return pairs(tokens, tokens, seen)[None]


def assert_equal(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Output and gradients, each to ``tolerance`` relative to its norm."""
    assert len(results) == len(expected)
    for name, result, truth in zip("oqkv", results, expected, strict=True):
        assert result.shape == truth.shape
        error = (result.double() - truth).norm() / truth.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
