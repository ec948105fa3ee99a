"""Context parallelism by states: tokens stay on their ranks, which tell each other what passes on.

Context parallelism deals every document out in 2 * cp pieces, two to a rank. What a piece does to
the state before it is linear,

    state behind = transition (state before) + own

so each rank passes its pieces from a state of zeros and, in columns behind those of the values,
from the identity. The states behind are then ``own`` and ``transition``, and the outputs what a
token reads of its own piece and of the state before it. Ranks exchange the two matrices of each
piece for those of a share of the heads, put the pieces one behind the other, and send back the
state before each; every token adds what it reads. The convolution needs the last inputs of the
piece before. Autograd has the derivatives: the adjoint of an exchange is an exchange.

Legend: B rows of T tokens of a rank, P pieces of a row; N documents (of a packed row; else rows),
two pieces of each; G key heads, R value heads of each, K and V sizes of a key and a value; F
channels of a key head's group, J taps of the convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron.mimo.layers.gated_delta_net.documents import Documents
from megatron.mimo.layers.gated_delta_net.heads_over_ranks import swap
from megatron.mimo.layers.gated_delta_net.sizes import Sizes

__all__ = ["Pieces", "convolve_pieces", "pass_states", "pieces_of", "states_move_less"]

Rule = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """The pieces that a rank has of each row, one behind the other.

    Attributes:
        borders: summed lengths, from 0 to T.
        group: the ranks that share the documents.
    """

    borders: tuple[int, ...]
    group: dist.ProcessGroup

    def split(self, x_BTD: Tensor, more: int = 0) -> tuple[Tensor, ...]:
        """Each piece's tokens, of which each has ``more``."""
        lengths = [stop - start + more for start, stop in itertools.pairwise(self.borders)]
        return x_BTD.split(lengths, dim=1)


def pieces_of(
    *,
    tokens: int,
    documents: Documents | None,
    sizes: Sizes,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> Pieces | None:
    """This rank's pieces where states are to be passed; None where heads are to be exchanged.

    The latter where it moves no more bytes, where a document is not divisible by the pieces or a
    piece is shorter than what the convolution reads, and where only the device knows the lengths.
    Every rank of the group comes to the same.

    Args:
        tokens: of a whole row.
        documents: of a packed row.
        sizes: of the layer.
        dtype: of the projections.
        group: the ranks that share the documents.
    """
    sums = [0, tokens]
    if documents is not None:
        if documents.on_host is None:
            return None
        sums = documents.filled_sums[1].tolist()
    ways = [divmod(stop - start, 2 * group.size()) for start, stop in itertools.pairwise(sums)]
    lengths = [length for length, left in ways if left == 0 for _ in range(2)]
    even = len(lengths) == 2 * len(ways)
    if not lengths or not even or min(lengths) < sizes.taps - 1:
        return None
    if not states_move_less(lengths, sizes=sizes, dtype=dtype):
        return None
    return Pieces(borders=(0, *itertools.accumulate(lengths)), group=group)


def states_move_less(lengths: list[int], *, sizes: Sizes, dtype: torch.dtype) -> bool:
    """Whether passing states moves fewer bytes than exchanging heads.

    Both send (cp - 1) / cp of what is counted here, forward and backward, for each key head: tokens
    before the convolution and behind the rule, or matrices of each piece (what it writes and its
    transition there, the state before it back) and the last inputs of the convolution, to and fro.

    Args:
        lengths: of a rank's pieces.
        sizes: of the layer.
        dtype: of the projections; states have at least fp32.
    """
    R, K, V = sizes.values_per_key, sizes.key, sizes.value
    wide = torch.promote_types(dtype, torch.float32)
    token = (sizes.convolved + 2 * R + R * V) * dtype.itemsize
    history = 2 * (sizes.taps - 1) * sizes.convolved * dtype.itemsize
    states = R * K * (K + 2 * V) * wide.itemsize
    return len(lengths) * (states + history) < sum(lengths) * token


def convolve_pieces(
    convolve: Callable[[Tensor], Tensor], x_BTGF: Tensor, taps: int, pieces: Pieces
) -> Tensor:
    """The causal convolution along documents that are dealt out: [B, T, G, F].

    Collective over the group, forward and backward.

    Args:
        convolve: of rows before which there is nothing.
        x_BTGF: what is convolved.
        taps: J.
        pieces: none of fewer than J - 1 tokens.
    """
    before = taps - 1
    if before == 0:
        return convolve(x_BTGF)
    own = pieces.split(x_BTGF)
    last_BPGJF = torch.stack([piece[:, -before:].transpose(1, 2) for piece in own], dim=1)
    first_BPGJF = _along_documents(_one_later, last_BPGJF, pieces.group)
    parts: list[Tensor] = []
    for history_BGJF, piece in zip(first_BPGJF.unbind(1), own, strict=True):
        parts += [history_BGJF.transpose(1, 2), piece]
    convolved = pieces.split(convolve(torch.cat(parts, dim=1)), before)
    return torch.cat([piece[:, before:] for piece in convolved], dim=1)


def pass_states(
    rule: Rule,
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTGRV: Tensor,
    decay_BTGR: Tensor,
    strength_BTGR: Tensor,
    pieces: Pieces,
) -> Tensor:
    """The outputs of the rule along documents that are dealt out: [B, T, G, R, V].

    Collective over the group, forward and backward.

    The arguments are those of ``gated_delta_rule``; ``rule`` is ``delta_rule_of_pieces`` of some
    kernels.
    """
    B, _, G, R, V = v_BTGRV.shape
    K, P = k_BTGK.size(-1), len(pieces.borders) - 1
    wide = torch.promote_types(v_BTGRV.dtype, torch.float32)
    first_KU = F.pad(torch.eye(K, dtype=wide, device=v_BTGRV.device), (V, 0))
    mixed_BTGRU, behind_BPGRKU = rule(
        q_BTGK,
        k_BTGK,
        v_BTGRV,
        decay_BTGR,
        strength_BTGR,
        pieces.borders,
        first_KU.expand(B, P, G, R, K, V + K),
    )
    before_BPGRKV = _along_documents(_states_before, behind_BPGRKU, pieces.group)
    read = [
        (piece[..., V:].movedim(1, 3).to(wide) @ before_BGRKV).movedim(3, 1)
        for piece, before_BGRKV in zip(
            pieces.split(mixed_BTGRU), before_BPGRKV.unbind(1), strict=True
        )
    ]
    return (mixed_BTGRU[..., :V] + torch.cat(read, dim=1)).to(v_BTGRV.dtype)


def _along_documents(
    function: Callable[[Tensor], Tensor], x_BPGD: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """A function of all pieces of each document, in their order, [2 cp, N, G / cp, ...].

    Collective over the group, forward and backward: each rank computes it for a share of the heads.
    """
    size = group.size()
    x_NHGD = x_BPGD.flatten(0, 1).unflatten(0, (-1, 2))
    # Of ranks r, halves H = 0 and 1 are pieces r and 2 cp - 1 - r.
    first, second = swap(x_NHGD.unflatten(2, (size, -1)).movedim(2, 0), group).unbind(2)
    y = function(torch.cat([first, second.flip(0)]))
    halves = torch.stack([y[:size], y[size:].flip(0)], dim=2)
    y_NHGD = swap(halves, group).movedim(0, 2).flatten(2, 3)
    return y_NHGD.flatten(0, 1).unflatten(0, x_BPGD.shape[:2])


def _one_later(x_P: Tensor) -> Tensor:
    """Each piece gets what the piece before it has, the first one zeros."""
    return torch.cat([torch.zeros_like(x_P[:1]), x_P[:-1]])


def _states_before(behind_PNGRKU: Tensor) -> Tensor:
    """The state before each piece, from what it writes and its transition."""
    K = behind_PNGRKU.size(-2)
    own, transition = behind_PNGRKU.split([behind_PNGRKU.size(-1) - K, K], dim=-1)
    states = [torch.zeros_like(own[0])]
    for i in range(len(own) - 1):
        states.append(own[i] + transition[i] @ states[-1])
    return torch.stack(states)
