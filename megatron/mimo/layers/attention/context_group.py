"""Which ranks share the tokens of a micro-batch by context parallelism."""

from __future__ import annotations

import torch.distributed as dist

from megatron.core.models.mimo.errors import InputError
from megatron.core.packed_seq_params import PackedSeqParams

__all__ = ["context_group"]


def context_group(
    own: dist.ProcessGroup | None, packed: PackedSeqParams | None
) -> dist.ProcessGroup | None:
    """The group of this micro-batch; None where a rank has all tokens.

    Args:
        own: the layer's group.
        packed: ``cp_group`` and ``local_cp_size`` replace it.

    Raises:
        InputError: ``local_cp_size`` says several ranks and not which.
    """
    group = own
    if packed is not None and packed.cp_group is not None:
        group = packed.cp_group
    elif packed is not None and packed.local_cp_size is not None:
        if packed.local_cp_size != 1:
            raise InputError(
                f"packed_seq_params.local_cp_size is {packed.local_cp_size} without a "
                "cp_group; give the group, or 1"
            )
        group = None
    return group if group is not None and group.size() > 1 else None
