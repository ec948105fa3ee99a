"""Where the documents of packed rows begin, for what passes from token to token.

Borders are computed where the tokens are, from the summed lengths alone: no loop over documents,
and nothing waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.partition.packing import numbers_on_host
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.mimo.layers.gated_delta_net.heads_over_ranks import Dealt, deal_places

__all__ = ["Documents", "documents_of"]

_KNOWN = WeakTensorKeyDictionary()
"""Of the boundaries of a micro-batch: every layer asks again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of one packed row of T tokens.

    Padding behind a document counts as its last tokens (nothing before them depends on it); what
    follows the last place is a document of its own.

    Attributes:
        number_T: of the document of each token; ascending, empty documents left out.
        position_T: of each token in its document.
        sums: summed lengths of the places, integers [documents + 1] from 0 to at most T, on the
            device of the tokens.
        on_host: the same numbers, where they are known without a wait for the device.
    """

    number_T: Tensor
    position_T: Tensor
    sums: Tensor
    on_host: list[int] | None
    _dealt: dict[int, Dealt] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def filled_sums(self) -> tuple[Tensor, Tensor]:
        """Summed lengths from 0 to T of the documents that have tokens, int64: on the device of the
        tokens, and on the host (which waits for the device where only that knows the lengths).
        """
        known = self.sums.tolist() if self.on_host is None else self.on_host
        values = sorted({*known, self.number_T.numel()})
        host = torch.tensor(values)
        return host.to(self.number_T.device, non_blocking=True), host

    def dealt(self, size: int) -> Dealt:
        """How context parallelism of this size deals out the tokens."""
        if size not in self._dealt:
            tokens = self.number_T.numel()
            self._dealt[size] = deal_places(tokens, size, self.sums)
        return self._dealt[size]


def documents_of(
    packed: PackedSeqParams | None, *, tokens: int, device: torch.device
) -> Documents | None:
    """The documents of a packed row; None where rows are not packed.

    Args:
        packed: with ``qkv_format="thd"``; ``cu_seqlens_q_padded``, else ``cu_seqlens_q``, says
            where documents begin, on the host or on the device.
        tokens: T, of the whole row.
        device: of the tokens.

    Raises:
        InputError: boundaries are missing, or (on the host) do not fit the row.
    """
    if packed is None or packed.qkv_format != "thd":
        return None
    name = "cu_seqlens_q" if packed.cu_seqlens_q_padded is None else "cu_seqlens_q_padded"
    sums: Tensor | None = getattr(packed, name)
    if sums is None:
        raise InputError("packed_seq_params.cu_seqlens_q is None; a packed sequence needs it")
    version, known_tokens, documents = _KNOWN.get(sums, (None, None, None))
    if documents is None or (version, known_tokens) != (sums._version, tokens):
        values = numbers_on_host(packed, name)
        _check(values, tokens)
        documents = _find(sums, values, tokens, device)
        _KNOWN[sums] = (sums._version, tokens, documents)
    return documents


def _find(given: Tensor, values: list[int] | None, tokens: int, device: torch.device) -> Documents:
    sums = given.to(device, non_blocking=True)
    place_T = torch.arange(tokens, device=sums.device, dtype=sums.dtype)
    number_T = torch.searchsorted(sums[1:].contiguous(), place_T, right=True)
    position_T = place_T - sums[number_T]
    return Documents(number_T=number_T, position_T=position_T, sums=sums, on_host=values)


def _check(values: list[int] | None, tokens: int) -> None:
    if values is None:
        return
    rising = all(first <= second for first, second in itertools.pairwise(values))
    if not values or values[0] != 0 or not rising or values[-1] > tokens:
        raise InputError(
            f"boundaries of packed documents are {values} for a row of {tokens} tokens; expected "
            "lengths summed up from 0 to at most the tokens: [0, 5, 12]"
        )
