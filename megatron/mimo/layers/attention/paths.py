"""The ways to compute one attention: fused on dense tensors, on packed ones, or in tiles.

Legend: S queries, K keys, B micro-batch, T packed tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.partition.packing import PackedRow
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.mimo.backend import capabilities
from megatron.mimo.layers.attention.context_parallel import Tiling, attend_tiles
from megatron.mimo.layers.attention.cudnn import cudnn_attention, prefers_cudnn
from megatron.mimo.layers.attention.packed_lengths import boundaries_with_padding, packed_documents
from megatron.mimo.layers.attention.tiles import Document, plan_tiles
from megatron.mimo.layers.attention.visibility import Visibility

__all__ = ["Rule", "dense_attention", "packed_attention"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What an attention computes, whatever its tensors.

    Attributes:
        visibility: which keys a query sees.
        scale: of the scores.
        dropout: probability of dropping a weight.
        group: the context-parallel group; None for one rank.
        spans_BS: span numbers of this rank's tokens, where the visibility has spans.
    """

    visibility: Visibility
    scale: float
    dropout: float = 0.0
    group: dist.ProcessGroup | None = None
    spans_BS: Tensor | None = None


def dense_attention(
    q_SBHD: Tensor,
    k_KBGD: Tensor,
    v_KBGD: Tensor,
    rule: Rule,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention inside each sample: [S, B, H, D].

    Args:
        q_SBHD: queries; this rank's under context parallelism.
        k_KBGD: keys.
        v_KBGD: values.
        rule: the rule; a single query is the last token of the keys, as in decoding.
        mask: bool, broadcastable to [B, H, S, K], True where not seen, whatever the rule says.
        bias: broadcastable to [B, H, S, K], added to the scaled scores.

    Raises:
        InputError: a rule about positions, but S differs from K; a sequence that cannot be dealt
            out to the context-parallel ranks.
    """
    S, K = q_SBHD.size(0), k_KBGD.size(0)
    if S == 1 < K and rule.group is None:
        if rule.visibility.behind is not None:
            reach = slice(max(0, K - 1 - rule.visibility.behind), None)
            k_KBGD, v_KBGD = k_KBGD[reach], v_KBGD[reach]
            mask, bias = (
                tensor if tensor is None or tensor.size(-1) == 1 else tensor[..., reach]
                for tensor in (mask, bias)
            )
            K = k_KBGD.size(0)
        rule = replace(rule, visibility=replace(rule.visibility, behind=None, ahead=None))
    if S != K and rule.visibility != Visibility():
        raise InputError(
            f"attention of {S} queries over {K} keys has no diagonal for a causal rule, a window "
            "or spans; use attn_mask_type no_mask or an explicit attention_mask"
        )
    in_tiles = (
        rule.group is not None
        or not rule.visibility.is_plain
        or (rule.dropout > 0 and q_SBHD.device.type == "cpu")
    )
    if in_tiles and mask is None and bias is None:
        size = 1 if rule.group is None else rule.group.size()
        queries, keys = (Document(length * size, length * size) for length in (S, K))
        return _in_tiles(q_SBHD, k_KBGD, v_KBGD, rule, (queries,), (keys,))
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q_SBHD, k_KBGD, v_KBGD))
    causal = rule.visibility == Visibility(ahead=0)
    if mask is None and bias is None and not causal and prefers_cudnn(q, k, v, rule.dropout):
        out_BHSD: Tensor = cudnn_attention(q, k, v, rule.scale)
        return out_BHSD.permute(2, 0, 1, 3)
    if mask is not None or bias is not None:
        mask, causal = _additive_mask(q, k, rule.visibility, mask, bias), False
    out_BHSD = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=causal,
        scale=rule.scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    return out_BHSD.permute(2, 0, 1, 3)


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rule: Rule, packed: PackedSeqParams
) -> Tensor:
    """Attention inside each document of a packed sequence: [T, H, D].

    On CUDA in half precision one kernel takes all documents and reads their boundaries on the
    device. Elsewhere each document is a tile, and the boundaries have to be on the host: free on
    CPU, one copy per micro-batch on CUDA.

    Args:
        q_THD: queries; this rank's under context parallelism.
        k_TGD: keys.
        v_TGD: values.
        rule: the rule; positions count from the start of each document.
        packed: the boundaries.

    Raises:
        InputError: boundaries that do not fit each other, the tensors or the group.
    """
    visibility = rule.visibility
    half = q_THD.dtype in (torch.float16, torch.bfloat16)
    fused = q_THD.is_cuda and half and q_THD.size(-1) % 8 == 0 and rule.dropout == 0
    if fused and rule.group is None and not visibility.spans:
        return _packed_fused(q_THD, k_TGD, v_TGD, rule, packed)
    size = 1 if rule.group is None else rule.group.size()
    queries, keys = packed_documents(
        packed, query_tokens=q_THD.size(0) * size, key_tokens=k_TGD.size(0) * size
    )
    if queries != keys and (size > 1 or visibility != Visibility()):
        raise InputError(
            "documents of queries and of keys differ in length under context parallelism, a causal "
            "rule, a window or spans; give cu_seqlens_q and cu_seqlens_kv the same values"
        )
    q, k, v = (tensor.unsqueeze(1) for tensor in (q_THD, k_TGD, v_TGD))
    return _in_tiles(q, k, v, rule, queries, keys).squeeze(1)


def _packed_fused(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rule: Rule, packed: PackedSeqParams
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    behind, ahead = rule.visibility.behind, rule.visibility.ahead
    shared = q_THD.size(1) // k_TGD.size(1)
    known = capabilities().varlen_arguments
    gqa: dict[str, Any] = {}
    if shared > 1 and "enable_gqa" in known:
        gqa = {"enable_gqa": True}
    elif shared > 1:  # before torch 2.12
        k_TGD, v_TGD = (t.repeat_interleave(shared, dim=1) for t in (k_TGD, v_TGD))
    bounds = _bounds_and_longest(packed, q_THD, k_TGD)
    if behind is None and "num_splits" in known:
        # A window that no document exceeds. Without one a newer torch takes cuDNN's kernel, which
        # is compiled for every new size: of packed rows, at almost every micro-batch.
        behind = bounds[-1]
    out = varlen_attn(
        q_THD,
        k_TGD,
        v_TGD,
        *bounds,
        scale=rule.scale,
        window_size=(-1 if behind is None else behind, -1 if ahead is None else ahead),
        **gqa,
    )
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out


def _bounds_and_longest(
    packed: PackedSeqParams, q_THD: Tensor, k_TGD: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries with padding on the device, and lengths that no document exceeds.

    They come ready in a ``PackedRow`` that was made for the device.
    """
    if (
        isinstance(packed, PackedRow)
        and packed.bounds_q is not None
        and packed.bounds_kv is not None
        and packed.bounds_q.device == q_THD.device
    ):
        assert packed.max_seqlen_q is not None
        assert packed.max_seqlen_kv is not None
        return packed.bounds_q, packed.bounds_kv, packed.max_seqlen_q, packed.max_seqlen_kv
    q_bounds, k_bounds = (
        bounds.to(q_THD.device, non_blocking=True)
        for bounds in boundaries_with_padding(
            packed, query_tokens=q_THD.size(0), key_tokens=k_TGD.size(0)
        )
    )
    return q_bounds, k_bounds, q_THD.size(0), k_TGD.size(0)


def _in_tiles(
    q_SBHD: Tensor,
    k_KBGD: Tensor,
    v_KBGD: Tensor,
    rule: Rule,
    queries: tuple[Document, ...],
    keys: tuple[Document, ...],
) -> Tensor:
    S, B, H, D = q_SBHD.shape
    K, _, G, _ = k_KBGD.shape
    rank, size = (0, 1) if rule.group is None else (rule.group.rank(), rule.group.size())
    plan = plan_tiles(queries, keys, rule.visibility, rank=rank, size=size)
    out_SNRD = attend_tiles(
        q_SBHD.reshape(S, B * G, H // G, D),
        k_KBGD.reshape(K, B * G, D),
        v_KBGD.reshape(K, B * G, D),
        Tiling(
            plan=plan,
            visibility=rule.visibility,
            scale=rule.scale,
            dropout=rule.dropout,
            group=rule.group,
        ),
        rule.spans_BS,
    )
    return out_SNRD.view(S, B, H, D)


def _additive_mask(
    q_BHSD: Tensor,
    k_BGKD: Tensor,
    visibility: Visibility,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Mask, bias and rule in one: bool, True where seen, or the bias with -inf where not."""
    S, K = q_BHSD.size(2), k_BGKD.size(2)
    allowed = None if mask is None else ~mask
    if visibility != Visibility():
        positions_S = torch.arange(S, device=q_BHSD.device)
        positions_K = torch.arange(K, device=q_BHSD.device)
        seen_SK = visibility.allowed(positions_S, positions_K)[0]
        allowed = seen_SK if allowed is None else allowed & seen_SK
    if bias is None:
        assert allowed is not None
        return allowed
    bias = bias.to(q_BHSD.dtype)
    return bias if allowed is None else bias.masked_fill(~allowed, -math.inf)
