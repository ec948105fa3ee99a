"""Cosines and sines of every token, made once for a micro-batch, in the place of rotary angles.

Megatron's angles are of positions: of a packed row those of its longest document, which every layer
would take the cosine of, document by document. Turns are of tokens: the layers find them ready.

Legend: S positions, T tokens of this rank, R half of what turns of a head, D = 2 R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.alignment.cut import packed_context_parallel_positions
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.utils import get_pg_rank, get_pg_size

__all__ = ["TurningGPT", "turns_of"]


def turns_of(
    angles: Tensor,
    packed: PackedSeqParams | None,
    *,
    tokens: int,
    kinds: int,
    cp_group: ProcessGroup | None,
) -> Tensor:
    """Cosines, then sines, of this rank's tokens.

    Args:
        angles: [S, B or 1, 1, kinds * D], each angle twice, as halves of a head. Of this rank's
            tokens where sequences are not packed. Of a packed row: of all tokens of the row, or of
            positions, which count from the begin of each document.
        packed: where the documents of a packed row begin and end.
        tokens: T; read of packed rows alone.
        kinds: of frequencies.
        cp_group: the ranks that a row is dealt out to.

    Returns:
        [T, B or 1, 1, kinds * D] fp32.
    """
    # Layers of a training step may be given what a generation made first.
    with torch.inference_mode(mode=False), torch.no_grad():
        if packed is not None and packed.qkv_format == "thd":
            angles = angles.index_select(0, _rows(packed, angles, tokens, cp_group))
        first = angles.unflatten(-1, (kinds, 2, -1))[..., 0, :]
        return torch.stack([first.cos(), first.sin()], dim=-2).flatten(-3)


def _rows(
    packed: PackedSeqParams, angles: Tensor, tokens: int, cp_group: ProcessGroup | None
) -> Tensor:
    """The row of ``angles`` of each token: int64 [T]; nothing waits for the device."""
    borders = packed.cu_seqlens_q_padded
    borders = packed.cu_seqlens_q if borders is None else borders
    assert borders is not None
    size = get_pg_size(cp_group)
    total = tokens * size
    if size > 1:
        held_T = packed_context_parallel_positions(
            borders, total_tokens=total, cp_rank=get_pg_rank(cp_group), cp_size=size
        )
    else:
        held_T = torch.arange(total, device=borders.device)
    if angles.size(0) != total:
        starts = borders.long()
        document_T = torch.searchsorted(starts[1:], held_T, right=True)
        held_T = (held_T - starts[document_T]).clamp_(max=angles.size(0) - 1)
    if held_T.device == angles.device:
        return held_T
    if angles.device.type == "cuda":
        held_T = held_T.pin_memory()
    return held_T.to(angles.device, non_blocking=True)


class TurningGPT(GPTModel):
    """A GPTModel whose layers are given turns, made once for a micro-batch.

    Where attention is not :class:`CachingSelfAttention` in all layers that have any, or leaves
    turning to Megatron, it is a GPTModel.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        found: list[Any] = [layer.self_attention for layer in self.decoder.layers]
        found = [attention for attention in found if isinstance(attention, Attention)]
        if found and all(getattr(attention, "turns_itself", False) for attention in found):
            for attention in found:
                attention.is_given_turns = True
            hook = _Turns(kinds=found[0].rotary_kinds, cp_group=self.pg_collection.cp)
            self.decoder.register_forward_pre_hook(hook, with_kwargs=True)


class _Turns:
    """Before a decoder: its rotary angles become turns.

    Angles of rows that are not packed depend on their length alone, and Megatron keeps them: the
    turns of those that came last are kept too.
    """

    def __init__(self, *, kinds: int, cp_group: ProcessGroup | None) -> None:
        self._kinds, self._cp_group = kinds, cp_group
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(
        self, decoder: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angles = given.get("rotary_pos_emb")
        if angles is None:
            return arguments, given
        return arguments, {**given, "rotary_pos_emb": self._made(decoder, angles, given)}

    def _made(self, decoder: Any, angles: Tensor, given: dict[str, Any]) -> Tensor:
        packed = given.get("packed_seq_params")
        if packed is None and self._last[0] is angles:
            assert self._last[1] is not None
            return self._last[1]
        tokens = 0 if packed is None else _tokens(decoder, given["hidden_states"])
        turns = turns_of(angles, packed, tokens=tokens, kinds=self._kinds, cp_group=self._cp_group)
        if packed is None:
            self._last = (angles, turns)
        return turns


def _tokens(decoder: Any, hidden: Any) -> int:
    """Tokens of a packed row on this rank."""
    config = decoder.config
    share = config.tensor_model_parallel_size if config.sequence_parallel else 1
    whole: Tensor = hidden if decoder.pre_process else decoder.input_tensor
    return whole.size(0) * share
