"""Sequence sharding behind the public name that scripts written for stock MIMO use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
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
            packed_seq_params: passed through; its padded lengths steer the cut of packed sequences.

        Returns:
            embeddings [S / (cp*tp), B, H], labels and loss_mask [B, S / cp], packed_seq_params.

        Raises:
            AssertionError: S is not divisible by the shard factor, or differs from
                ``max_seq_len`` under tensor-parallel communication overlap.
        """
        cut = self.sequence_cut(packed_seq_params)
        if embeddings is not None:
            if cut.places is None:
                cut.check_length(embeddings.size(0))
            embeddings = cut.context_share(embeddings, dim=0)
            if self.cfg.seq_parallel:
                embeddings = tensor_parallel.scatter_to_sequence_parallel_region(
                    embeddings, group=self.cfg.tp_group
                )
        labels, loss_mask = (
            None if tokens is None else cut.context_share(tokens) for tokens in (labels, loss_mask)
        )
        return embeddings, labels, loss_mask, packed_seq_params

    def sequence_cut(self, packed_seq_params: PackedSeqParams | None) -> SequenceCut:
        """How the sequences of one micro-batch are cut.

        Args:
            packed_seq_params: of a packed sequence, else None.
        """
        cfg = self.cfg
        places = None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            places = packed_seq_params.cu_seqlens_q_padded
            if places is None:
                places = packed_seq_params.cu_seqlens_q
        return SequenceCut(
            cp_rank=get_pg_rank(cfg.cp_group) if cfg.use_cp else 0,
            cp_size=get_pg_size(cfg.cp_group) if cfg.use_cp else 1,
            tp_rank=get_pg_rank(cfg.tp_group) if cfg.seq_parallel else 0,
            tp_size=get_pg_size(cfg.tp_group) if cfg.seq_parallel else 1,
            places=places,
            only_length=cfg.max_seq_len if cfg.seq_parallel and cfg.tp_comm_overlap else None,
        )

    @property
    def cp_size(self) -> int:
        """Ranks that a sequence is cut over by context parallelism."""
        size: int = get_pg_size(self.cfg.cp_group) if self.cfg.use_cp else 1
        return size


def sequence_cut(
    adapter: PartitionAdapter | None, packed_seq_params: PackedSeqParams | None
) -> SequenceCut:
    """The cut of a model's ``partition_adapter``; where that is None, nothing is cut."""
    return SequenceCut() if adapter is None else adapter.sequence_cut(packed_seq_params)


def build_partition_adapter(
    mimo_config: MimoModelConfig, cp_group: ProcessGroup | None, tp_group: ProcessGroup | None
) -> PartitionAdapter | None:
    """What cuts the sequence for this rank; None where nothing does."""
    config = language_config(mimo_config)
    params = mimo_config.language_model_spec.params
    if config.context_parallel_size <= 1 and not config.sequence_parallel:
        return None
    return PartitionAdapter(
        PartitionConfig.from_mp_config(
            config,
            max_seq_len=params.get("max_sequence_length", 4096),
            kv_format=mimo_config.kv_format,
            cp_group=cp_group,
            tp_group=tp_group,
        )
    )
