"""RMSNorm of queries or keys over all heads together, which tensor parallelism spreads over ranks.

Shape legend: H heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

__all__ = ["WideNorm"]


class WideNorm(nn.Module):
    """RMSNorm whose mean is that over the features of all heads.

    Collectives over ``tp_group``: each rank adds the squares of its heads to a sum [..., 1, 1], in
    forward; the adjoint adds the gradients of that sum.

    Args:
        config: of the layer; as many keys as queries.
        hidden_size: of a head.
        eps: added under the root.
        tp_group: the heads are spread over.

    Attributes:
        weight: [H * D], in ``config.params_dtype``; ranks hold those of their heads.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps, self.tp_group = eps, tp_group
        self.features = config.num_attention_heads * hidden_size
        local = self.features // tp_group.size()
        self.weight = nn.Parameter(torch.ones(local, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """[..., H, D], normed; the same shape and dtype. Sums are taken in fp32."""
        wide = heads.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        if self.tp_group.size() > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normed = wide * torch.rsqrt(squares / self.features + self.eps)
        return (self.weight.view(heads.shape[-2:]) * normed.to(heads.dtype)).to(heads.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weight, spread over the tensor-parallel group."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded
