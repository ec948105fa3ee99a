"""Attention without Transformer Engine: a ``core_attention`` for megatron-core's layer specs.

What ``torch.nn.functional.scaled_dot_product_attention`` can do goes there. Packed sequences,
context parallelism, sliding windows, spans and dropout on CPU are computed in tiles
(``attention_tiles``, ``context_parallel``): neither keeps a matrix of scores.

Legend: S queries, K keys, B micro-batch, T packed tokens, H query heads and G key heads of this
tensor-parallel rank, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.mimo.layers.attention.context_group import context_group
from megatron.mimo.layers.attention.paths import Rule, dense_attention, packed_attention
from megatron.mimo.layers.attention.visibility import Visibility

__all__ = ["CoreAttention", "serves"]

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_SUPPORTED_MASKS = (*_CAUSAL, AttnMaskType.no_mask, AttnMaskType.padding, AttnMaskType.arbitrary)


class CoreAttention(MegatronModule):
    """softmax(scale * q k^T) v, in the place and with the arguments of ``DotProductAttention``.

    Under context parallelism (``config.context_parallel_size > 1``) every rank holds, of the
    sequence or of each packed document, chunk r and chunk 2*cp-1-r of 2*cp equal chunks; forward
    and backward are then collective over ``pg_collection.cp``.

    Dropout on the weights is drawn inside Megatron's model-parallel RNG fork (differently on each
    tensor-parallel rank), except under sequence parallelism, where the caller has forked already.

    ``apply_query_key_layer_scaling``, ``attention_softmax_in_fp32`` and ``masked_softmax_fusion``
    change nothing: softmax is fused and in fp32 in any case.

    Args:
        config: of the layer.
        layer_number: from 1.
        attn_mask_type: the rule where ``forward`` is given none.
        attention_type: "self" or "cross".
        attention_dropout: ``config.attention_dropout`` by default.
        softmax_scale: 1 / sqrt(D) by default.
        k_channels, v_channels: head sizes with latent attention; read from the tensors.
        cp_comm_type: how keys travel under context parallelism: None or "p2p", a ring.
        pg_collection: with ``cp`` where that is in use; ``parallel_state``'s by default.

    Raises:
        ConfigError: a setting that is not honoured here, by name.
    """

    # What MimoModel asks of a core attention (model/language/attention_support.py).
    takes_span_ids = True
    reads_lengths_on_host = True
    # What generation asks: a mask of padded keys adds to the rule.
    takes_padded_keys = True

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,  # noqa: ARG002 (latent attention's specs pass it)
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _check_settings(config, cp_comm_type)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        head = k_channels if k_channels is not None else config.kv_channels
        self.softmax_scale = 1 / math.sqrt(head) if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        self.window = config.window_size if windowed else None
        self._last: tuple[Any, Rule | None] = (None, None)  # what was asked without tensors
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            if attention_type != "self":
                raise ConfigError(
                    f"attention_type is {attention_type!r} under context parallelism; expected "
                    "'self': set context_parallel_size=1 for layers with cross-attention"
                )
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
            self.cp_group = groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [S, B, H, D], or [T, H, D] when packed ("thd"). Under context parallelism, S and
                T count this rank's tokens.
            key: [K, B, G, D] or [T, G, D]; H is a multiple of G.
            value: like ``key``; its head size may differ.
            attention_mask: None, or
                bool, broadcastable to [B, H, S, K], True where **not** seen. With a query
                dimension it replaces the causal rule, as in megatron-core; with a query dimension
                of 1 (padded keys) it is added to it. A query that sees nothing gives 0. Not
                packed, not under context parallelism.
                Or integer [B, S] ([1, T] packed), cut as the queries are: span numbers. Tokens of
                one span see each other in both directions, besides what the rule lets them see;
                0 is no span.
            attn_mask_type: causal (or padding_causal), no_mask (or padding, arbitrary).
            attention_bias: broadcastable to [B, H, S, K], added to the scaled scores. Not packed,
                not under context parallelism.
            packed_seq_params: with ``qkv_format="thd"``, where documents begin and end: of the
                whole row also under context parallelism. ``cu_seqlens_*_padded`` are the places,
                ``cu_seqlens_*`` the lengths of what is in them; rows of padding are 0 or see
                padding only. ``cp_group`` and ``local_cp_size`` replace the group.

        Returns:
            [S, B, H * D of value], or [T, H * D of value] when packed.

        Raises:
            InputError: shapes that do not fit each other, the group or the documents.
            UnsupportedError: arguments that cannot be combined.
        """
        heads = self.attend(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
        )
        return heads.flatten(-2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """As ``forward``, which calls it: [S, B, H, D of value], or [T, H, D of value]."""
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        group = context_group(self.cp_group, packed_seq_params)
        mask, spans_BS = None, None
        if attention_mask is not None:
            mask, spans_BS = _mask_or_spans(attention_mask, query, packed=packed)
        if packed or group is not None:
            _refuse_dense(mask, attention_bias, packed=packed)
        rule = self._rule(attn_mask_type, mask, spans_BS, group)
        _check_shapes(query, key, value, packed=packed)
        D, D_value = query.size(-1), value.size(-1)
        if D_value != D:
            query, key, value = _same_head_size(query, key, value)
        attention: Callable[..., Tensor] = packed_attention if packed else dense_attention
        others = (packed_seq_params,) if packed else (mask, attention_bias)
        if rule.dropout > 0 and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                out = attention(query, key, value, rule, *others)
        else:
            out = attention(query, key, value, rule, *others)
        return out[..., :D_value] if D_value < D else out

    def _rule(
        self,
        mask_type: AttnMaskType | None,
        mask: Tensor | None,
        spans_BS: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Rule:
        dropout = self.dropout if self.training else 0.0
        usual = mask is None and spans_BS is None and group is None
        asked = (mask_type, dropout, self.softmax_scale, self.window)
        before, last = self._last
        if usual and last is not None and asked == before:
            return last
        rule = Rule(
            visibility=self._visibility(mask_type, mask, spans_BS),
            scale=self.softmax_scale,
            dropout=dropout,
            group=group,
            spans_BS=spans_BS,
        )
        if usual:
            self._last = (asked, rule)
        return rule

    def _visibility(
        self, mask_type: AttnMaskType | None, mask: Tensor | None, spans_BS: Tensor | None
    ) -> Visibility:
        mask_type = self.attn_mask_type if mask_type is None else mask_type
        if mask_type not in _SUPPORTED_MASKS:
            names = ", ".join(kind.name for kind in _SUPPORTED_MASKS)
            raise UnsupportedError(f"attn_mask_type is {mask_type.name}; expected one of {names}")
        replaced = mask is not None and mask.size(-2) > 1
        return Visibility.of(
            causal=mask_type in _CAUSAL and not replaced,
            window=self.window,
            spans=spans_BS is not None,
        )


def serves(config: TransformerConfig) -> bool:
    """Whether a ``CoreAttention`` honours the settings of a layer without context parallelism."""
    try:
        _check_settings(config, None)
    except ConfigError:
        return False
    return True


def _check_settings(config: TransformerConfig, cp_comm_type: str | None) -> None:
    """Refuses by name what would otherwise be ignored."""
    only_te = "it needs Transformer Engine's attention (--transformer-impl transformer_engine)"
    refused = (
        ("softmax_type", config.softmax_type, "vanilla"),
        ("qk_clip", config.qk_clip, False),
        ("log_max_attention_logit", config.log_max_attention_logit, False),
        ("fp8_dot_product_attention", config.fp8_dot_product_attention, False),
        ("batch_invariant_mode", config.batch_invariant_mode, False),
        ("flash_attention_version", config.flash_attention_version, None),
    )
    for name, got, expected in refused:
        if got != expected:
            raise ConfigError(f"{name} is {got!r}; expected {expected!r}: {only_te}")
    if config.attention_backend not in (AttnBackend.auto, AttnBackend.local):
        raise ConfigError(
            f"attention_backend is {config.attention_backend.name!r}; expected 'auto' or 'local': "
            "the others are names of Transformer Engine's"
        )
    if config.context_parallel_size > 1 and cp_comm_type not in (None, "p2p"):
        raise ConfigError(
            f"cp_comm_type is {cp_comm_type!r}; expected 'p2p', a ring, without Transformer Engine"
        )


def _mask_or_spans(
    mask: Tensor, query: Tensor, *, packed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is in Megatron's one argument: a mask (bool) or span numbers (integer)."""
    if mask.is_floating_point() or mask.dim() < 2:
        raise InputError(
            f"attention_mask is {mask.dtype} of shape {list(mask.shape)}; expected a bool mask, "
            "broadcastable to [B, H, S, K], or integer span numbers [B, S]"
        )
    if mask.dtype == torch.bool:
        return mask, None
    expected = (1, query.size(0)) if packed else (query.size(1), query.size(0))
    if tuple(mask.shape) != expected:
        raise InputError(
            f"span numbers have shape {list(mask.shape)}; expected {list(expected)}: one number "
            "for each of this rank's tokens"
        )
    return None, mask


def _refuse_dense(mask: Tensor | None, bias: Tensor | None, *, packed: bool) -> None:
    for name, tensor in (("attention_mask", mask), ("attention_bias", bias)):
        if tensor is not None:
            where = "packed sequences" if packed else "context parallelism"
            raise UnsupportedError(
                f"{name} of shape {list(tensor.shape)} with {where}; expected None: documents and "
                "padding are told by packed_seq_params, spans by integer span numbers"
            )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, *, packed: bool) -> None:
    dims, layout = (3, "[T, heads, D]") if packed else (4, "[S, B, heads, D]")
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == dims and q == k == v:
        return
    fits = (
        len(q) == len(k) == len(v) == dims
        and k[:-1] == v[:-1]
        and q[-1] == k[-1]
        and q[1:-2] == k[1:-2]
        and q[-2] % k[-2] == 0
    )
    if not fits:
        raise InputError(
            f"query {list(q)}, key {list(k)}, value {list(v)}; "
            f"expected {layout} with the query's heads a multiple of the others'"
        )


def _same_head_size(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind the smaller head, which change no score: fused kernels want one size."""
    D = max(query.size(-1), value.size(-1))
    query, key, value = (F.pad(tensor, (0, D - tensor.size(-1))) for tensor in (query, key, value))
    return query, key, value
