"""Sequence sharding behind the public name that scripts written for stock MIMO use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.partition.positions import (
    context_parallel_positions,
    packed_context_parallel_positions,
    require_divisible,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group, get_tensor_model_parallel_group
from megatron.core.utils import get_pg_rank, get_pg_size

Sharded = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, PackedSeqParams | None
]


@dataclass(frozen=True)
class PartitionConfig:
    """How the sequence is cut. Build it with ``from_mp_config``.

    Attributes:
        seq_parallel: cut over the tensor-parallel group.
        use_cp: cut over the context-parallel group.
        tp_comm_overlap: user buffers of fixed size are in use, so S has to be ``max_seq_len``.
        max_seq_len: longest sequence of the language model.
        kv_format: "sbhd" or "thd".
        cp_group, tp_group: the process groups.
    """

    seq_parallel: bool
    use_cp: bool
    tp_comm_overlap: bool
    max_seq_len: int
    kv_format: str = "sbhd"
    cp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None

    @classmethod
    def from_mp_config(
        cls,
        mp: ModelParallelConfig,
        *,
        max_seq_len: int,
        kv_format: str = "sbhd",
        cp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> PartitionConfig:
        """Read the parallel sizes from ``mp``; groups not given come from ``parallel_state``."""
        if not isinstance(mp, ModelParallelConfig):
            raise TypeError(f"mp must be a ModelParallelConfig instance, got {type(mp).__name__}")
        if cp_group is None and mp.context_parallel_size > 1:
            cp_group = get_context_parallel_group()
        if tp_group is None and mp.sequence_parallel:
            tp_group = get_tensor_model_parallel_group()
        return cls(
            seq_parallel=mp.sequence_parallel,
            use_cp=get_pg_size(cp_group) > 1,
            tp_comm_overlap=mp.tp_comm_overlap,
            max_seq_len=max_seq_len,
            kv_format=kv_format,
            cp_group=cp_group,
            tp_group=tp_group,
        )

    def shard_factor(self) -> int:
        """What S has to be divisible by: 2*cp, tp, or 2*cp*tp; 1 when nothing is cut."""
        factor = 2 * get_pg_size(self.cp_group) if self.use_cp else 1
        return factor * (get_pg_size(self.tp_group) if self.seq_parallel else 1)


class PartitionAdapter:
    """Cuts merged embeddings, labels and loss mask for this rank."""

    def __init__(self, cfg: PartitionConfig) -> None:
        self.cfg = cfg

    def shard(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Sharded:
        """Return this rank's part of each; the very objects where nothing is cut.

        Args:
            embeddings: [S, B, H], or None off the first pipeline stage.
            labels: [B, S]. They follow context parallelism only: the loss is taken after the
                tensor-parallel gather.
            loss_mask: [B, S], cut as the labels are.
            packed_seq_params: passed through; its padded lengths steer the cut of packed rows.

        Returns:
            embeddings [S / (cp*tp), B, H], labels and loss_mask [B, S / cp], packed_seq_params.

        Raises:
            AssertionError: S is not divisible by the shard factor, or differs from
                ``max_seq_len`` under tensor-parallel communication overlap.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if embeddings is not None and not packed:
            self.check_length(embeddings.size(0))
        if self.cfg.use_cp:
            row = packed_seq_params if packed else None
            embeddings, labels, loss_mask = self._shard_context(embeddings, labels, loss_mask, row)
        if self.cfg.seq_parallel and embeddings is not None:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(
                embeddings, group=self.cfg.tp_group
            )
        return embeddings, labels, loss_mask, packed_seq_params

    def check_length(self, sequence_length: int) -> None:
        """Assert that a sequence of this length can be cut; see ``shard``."""
        factor = self.cfg.shard_factor()
        # AssertionError is the public contract here (stock MIMO raises it), hence not ValueError.
        assert sequence_length % factor == 0, (
            f"sequence length {sequence_length} should be divisible by {factor} for "
            "sequence/context parallelism; pad it to "
            f"{-(-sequence_length // factor) * factor}"
        )
        if self.cfg.seq_parallel and self.cfg.tp_comm_overlap:
            assert sequence_length == self.cfg.max_seq_len, (
                f"TP Comm overlap needs sequences of exactly max_seq_len = {self.cfg.max_seq_len}, "
                f"got {sequence_length}; pad them or turn tp_comm_overlap off"
            )

    @property
    def cp_size(self) -> int:
        """Ranks that a sequence is cut over by context parallelism."""
        size: int = get_pg_size(self.cfg.cp_group) if self.cfg.use_cp else 1
        return size

    def cut(self, tokens: torch.Tensor, packed_seq_params: PackedSeqParams | None) -> torch.Tensor:
        """This context-parallel rank's part of what every token has: [..., S] to [..., S / cp]."""
        if not self.cfg.use_cp:
            return tokens
        positions_S = self.positions(tokens.size(-1), packed_seq_params)
        return tokens.index_select(-1, positions_S.to(tokens.device, non_blocking=True))

    def positions(
        self, sequence_length: int, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        """Sequence positions that this context-parallel rank holds: long [S / cp], ascending."""
        cp_rank, cp_size = get_pg_rank(self.cfg.cp_group), get_pg_size(self.cfg.cp_group)
        if packed_seq_params is None:
            return context_parallel_positions(sequence_length, cp_rank=cp_rank, cp_size=cp_size)
        cu_seqlens = packed_seq_params.cu_seqlens_q_padded
        if cu_seqlens is None:
            cu_seqlens = packed_seq_params.cu_seqlens_q
        require_divisible(sequence_length, 2 * cp_size, "2*cp")
        return packed_context_parallel_positions(
            cu_seqlens, total_tokens=sequence_length, cp_rank=cp_rank, cp_size=cp_size
        )

    def _shard_context(
        self,
        embeddings_SBH: torch.Tensor | None,
        labels_BS: torch.Tensor | None,
        loss_mask_BS: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        lengths = [
            tensor.size(dim)
            for tensor, dim in ((embeddings_SBH, 0), (labels_BS, 1), (loss_mask_BS, 1))
            if tensor is not None
        ]
        if not lengths:
            return None, None, None
        positions_S = self.positions(lengths[0], packed_seq_params)

        def cut(tensor: torch.Tensor | None, dim: int) -> torch.Tensor | None:
            if tensor is None:
                return None
            return tensor.index_select(dim, positions_S.to(tensor.device, non_blocking=True))

        return cut(embeddings_SBH, 0), cut(labels_BS, 1), cut(loss_mask_BS, 1)
