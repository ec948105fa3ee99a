"""One tile of attention with its log-sum-exp, forward and backward, on the kernel that fits.

Results over different keys can be merged exactly when each comes with the logarithm of its
softmax's denominator, which ``scaled_dot_product_attention`` keeps to itself. Three kernels do:

- CPU without dropout: the ATen operation behind ``scaled_dot_product_attention`` (flash). Seen at
  S=2048: six times faster than matmul, mask, softmax, matmul. It can neither drop nor take heads of
  different sizes, fails on empty tensors, and reports 0 for a row that sees no key.
- CUDA, half precision, no mask: the flash operation.
- Everything else (dropout on CPU, masks and fp32 on CUDA): blocks of plain torch in fp32.

No kernel keeps a score matrix. Legend: S queries, K keys, N micro-batch times key heads, R query
heads per key head, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend", "attend_backward", "generator_of"]

_ROWS = 64
"""Queries per block of the plain torch kernel: bounds its scores to [N, R, 64, K]. Measured at
S=2048 on one thread: as fast as any larger number, with the least memory of these."""

Replay = tuple[Tensor, ...] | None
"""What the backward pass needs to draw the same dropout mask again."""


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of a device: the one that Megatron's RNG tracker switches."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def attend(
    q_SNRD: Tensor,
    k_KND: Tensor,
    v_KND: Tensor,
    *,
    scale: float,
    causal: bool = False,
    allowed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Replay]:
    """Attention of one tile; S and K are positive.

    Args:
        q_SNRD: queries, of any floating dtype; the head size is the last stride.
        k_KND: keys.
        v_KND: values.
        scale: of the scores.
        causal: query i sees keys 0..i; K = S.
        allowed: bool [N or 1, 1, S, K], True where seen; not together with ``causal``.
        dropout: probability of dropping a weight, drawn from the device's default generator.

    Returns:
        Output [S, N, R, D] in q's dtype, 0 for a query that sees nothing; log-sum-exp [N, R, S] in
        at least fp32, -inf for such a query; and what ``attend_backward`` takes as ``replay``.
    """
    kernel = _kernel(q_SNRD, allowed, dropout)
    if kernel == "plain":
        return _plain(q_SNRD, k_KND, v_KND, scale, causal, allowed, dropout)
    q, k, v = _as_batch(q_SNRD, k_KND, v_KND, expand=kernel == "cpu")
    replay: Replay = None
    if kernel == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(allowed, q.dtype), scale=scale
        )
    else:
        out, lse, _, _, _, _, *state, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout, causal, False, scale=scale
        )
        replay = tuple(state)
    if allowed is not None:
        lse = lse.masked_fill(~allowed.any(-1), -math.inf)
    return out.permute(2, 0, 1, 3), lse, replay


def attend_backward(
    grad_SNRD: Tensor,
    q_SNRD: Tensor,
    k_KND: Tensor,
    v_KND: Tensor,
    out_SNRD: Tensor,
    lse_NRS: Tensor,
    *,
    scale: float,
    causal: bool = False,
    allowed: Tensor | None = None,
    dropout: float = 0.0,
    replay: Replay = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This tile's part of the gradients of q, k and v.

    Args:
        grad_SNRD: of the output of all tiles together.
        q_SNRD: as in the forward pass, like the arguments without a word here.
        k_KND: likewise.
        v_KND: likewise.
        out_SNRD: the output of all tiles together.
        lse_NRS: log-sum-exp over the keys of all tiles: what makes the parts sum up exactly.
        scale: as in the forward pass.
        causal: likewise.
        allowed: likewise.
        dropout: likewise.
        replay: what the forward pass returned.
    """
    kernel = _kernel(q_SNRD, allowed, dropout)
    if kernel == "plain":
        return _plain_backward(
            grad_SNRD,
            (q_SNRD, k_KND, v_KND),
            out_SNRD,
            lse_NRS,
            (scale, causal, allowed, dropout),
            replay,
        )
    q, k, v = _as_batch(q_SNRD, k_KND, v_KND, expand=kernel == "cpu")
    grad, out = grad_SNRD.permute(1, 2, 0, 3), out_SNRD.permute(1, 2, 0, 3)
    lse_NRS = lse_NRS.contiguous()
    if kernel == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            q,
            k,
            v,
            out,
            lse_NRS,
            0.0,
            causal,
            attn_mask=_additive(allowed, q.dtype),
            scale=scale,
        )
    else:
        sizes: tuple[Any, ...] = (None, None, q.size(2), k.size(2))
        assert replay is not None
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse_NRS, *sizes, dropout, causal, *replay, scale=scale
        )
    return dq.permute(2, 0, 1, 3), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)


def _kernel(q_SNRD: Tensor, allowed: Tensor | None, dropout: float) -> str:
    if q_SNRD.device.type == "cpu":
        return "cpu" if dropout == 0 else "plain"
    fits = q_SNRD.size(-1) % 8 == 0 and q_SNRD.size(-1) <= 256
    half = q_SNRD.dtype in (torch.float16, torch.bfloat16)
    return "cuda" if half and fits and allowed is None else "plain"


def _as_batch(
    q_SNRD: Tensor, k_KND: Tensor, v_KND: Tensor, *, expand: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Views [N, R, S, D], [N, R or 1, K, D]: a batch of N with R query heads on one key head."""
    q = q_SNRD.permute(1, 2, 0, 3)
    k, v = (tensor.transpose(0, 1).unsqueeze(1) for tensor in (k_KND, v_KND))
    if expand:
        k, v = (tensor.expand(-1, q.size(1), -1, -1) for tensor in (k, v))
    return q, k, v


def _additive(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if allowed is None:
        return None
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -math.inf)


def _scores(
    q_NRbD: Tensor, k_NKD: Tensor, start: int, causal: bool, allowed: Tensor | None
) -> Tensor:
    """Scores [N, R, b, K] of the block of queries from ``start`` on, -inf where unseen."""
    N, R, rows, _ = q_NRbD.shape
    keys = k_NKD.size(1)
    scores = (q_NRbD.reshape(N, R * rows, -1) @ k_NKD.transpose(1, 2)).view(N, R, rows, keys)
    if causal:
        later = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).triu_(start + 1)
        scores.masked_fill_(later, -math.inf)
    if allowed is not None:
        scores.masked_fill_(~allowed[:, :, start : start + rows], -math.inf)
    return scores


def _kept(weights: Tensor, dropout: float) -> Tensor:
    """What the weights are multiplied with: 0, or 1 / (1 - dropout)."""
    return torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout)


def _plain(
    q_SNRD: Tensor,
    k_KND: Tensor,
    v_KND: Tensor,
    scale: float,
    causal: bool,
    allowed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Replay]:
    wide = torch.promote_types(q_SNRD.dtype, torch.float32)
    replay = (generator_of(q_SNRD.device).get_state(),) if dropout > 0 else None
    k_NKD, v_NKD = (tensor.transpose(0, 1).to(wide) for tensor in (k_KND, v_KND))
    S, N, R, D = q_SNRD.shape
    out_SNRD = q_SNRD.new_empty(S, N, R, D)
    lse_NRS = torch.empty(N, R, S, dtype=wide, device=q_SNRD.device)
    for start in range(0, S, _ROWS):
        rows = slice(start, min(start + _ROWS, S))
        keys = rows.stop if causal else k_NKD.size(1)
        q = q_SNRD[rows].permute(1, 2, 0, 3).to(wide) * scale
        scores = _scores(q, k_NKD[:, :keys], start, causal, allowed)
        lse_NRS[:, :, rows] = torch.logsumexp(scores, dim=-1)
        weights = _weights(scores, lse_NRS[:, :, rows])
        if dropout > 0:
            weights *= _kept(weights, dropout)
        out = (weights.view(N, -1, keys) @ v_NKD[:, :keys]).view(N, R, -1, D)
        out_SNRD[rows] = out.permute(2, 0, 1, 3)
    return out_SNRD, lse_NRS, replay


def _plain_backward(
    grad_SNRD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_SNRD: Tensor,
    lse_NRS: Tensor,
    rule: tuple[float, bool, Tensor | None, float],
    replay: Replay,
) -> tuple[Tensor, Tensor, Tensor]:
    q_SNRD, k_KND, v_KND = inputs
    scale, causal, allowed, dropout = rule
    wide = lse_NRS.dtype
    k_NKD, v_NKD = (tensor.transpose(0, 1).to(wide) for tensor in (k_KND, v_KND))
    dq_SNRD = torch.empty_like(q_SNRD, dtype=wide)
    dk_NKD, dv_NKD = torch.zeros_like(k_NKD), torch.zeros_like(v_NKD)
    S, N, R, D = q_SNRD.shape
    if replay is not None:
        drawn = generator_of(q_SNRD.device).get_state()
        generator_of(q_SNRD.device).set_state(replay[0])
    for start in range(0, S, _ROWS):
        rows = slice(start, min(start + _ROWS, S))
        keys = rows.stop if causal else k_NKD.size(1)
        q, grad, out = (
            tensor[rows].permute(1, 2, 0, 3).to(wide) for tensor in (q_SNRD, grad_SNRD, out_SNRD)
        )
        scores = _scores(q * scale, k_NKD[:, :keys], start, causal, allowed)
        weights = _weights(scores, lse_NRS[:, :, rows])
        grad_flat = grad.reshape(N, -1, D)
        dweights = (grad_flat @ v_NKD[:, :keys].transpose(1, 2)).view_as(weights)
        dropped = weights
        if dropout > 0:
            kept = _kept(weights, dropout)
            dweights *= kept
            dropped = weights * kept
        dv_NKD[:, :keys] += dropped.view(N, -1, keys).transpose(1, 2) @ grad_flat
        dscores = dweights.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dscores = dscores.view(N, -1, keys)
        dq_SNRD[rows] = (dscores @ k_NKD[:, :keys]).view(N, R, -1, D).permute(2, 0, 1, 3)
        dk_NKD[:, :keys] += dscores.transpose(1, 2) @ q.reshape(N, -1, D)
    if replay is not None:
        generator_of(q_SNRD.device).set_state(drawn)
    return dq_SNRD, dk_NKD.transpose(0, 1), dv_NKD.transpose(0, 1)


def _weights(scores: Tensor, lse_NRb: Tensor) -> Tensor:
    """exp(scores - lse) in place of the scores, 0 for a query that sees nothing."""
    return scores.sub_(lse_NRb.masked_fill(lse_NRb == -math.inf, 0.0).unsqueeze(-1)).exp_()
