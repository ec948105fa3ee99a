"""The layer's own parameters and their first values.

First values are drawn whole from the host's generator, which is the same on all tensor-parallel
ranks, and then cut: a run starts from the same model under any layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from megatron.mimo.layers.gated_delta_net.sizes import Sizes

__all__ = ["ConvolutionWeight", "HeadNormWeight", "cut_by_heads", "first_A_log"]

_SMALLEST_A, _LARGEST_A = 0.01, 16.0


class ConvolutionWeight(MegatronModule):
    """The weight of the convolution.

    Attributes:
        weight: [channels, 1, taps], channels by key heads, cut over tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, sizes: Sizes, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        whole = torch.empty(sizes.key_heads * sizes.convolved, 1, sizes.taps)
        bound = sizes.taps**-0.5  # as torch.nn.Conv1d
        nn.init.uniform_(whole, -bound, bound)
        self.weight = cut_by_heads(whole, config, tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


class HeadNormWeight(nn.Module):
    """The weight of the gated norm.

    Attributes:
        weight: [size of a value], one for all heads; multiplied as it is, never plus 1.
    """

    def __init__(self, config: TransformerConfig, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def first_A_log(heads: int) -> Tensor:  # noqa: N802 (the parameter's name)
    """Logarithms of rates from nearly nothing to 16 for each step."""
    return torch.empty(heads).uniform_(_SMALLEST_A, _LARGEST_A).log()


def cut_by_heads(
    whole: Tensor, config: TransformerConfig, tp_group: dist.ProcessGroup
) -> nn.Parameter:
    """A parameter of this rank's heads; the first dimension goes by heads."""
    own = whole.chunk(tp_group.size())[tp_group.rank()]
    parameter = nn.Parameter(own.to(config.params_dtype, copy=True))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter
