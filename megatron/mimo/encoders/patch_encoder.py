"""An encoder of images and clips as patches: what it says of itself to whoever calls it.

Legend: T patches of an item, E values per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megatron.core.transformer.module import MegatronModule
from megatron.mimo.encoders.patch_grids import Grid, SquareGeometry

__all__ = ["PatchEncoder"]


class PatchEncoder(MegatronModule):
    """Takes patches of items and the items' grids, and gives a row for each square of patches.

    Attributes:
        geometry: of patches and squares.
        patch_embedding: of E values.
    """

    geometry: SquareGeometry
    patch_embedding: nn.Linear

    def blank_inputs(self) -> dict[str, Any]:
        """Arguments of ``forward`` for one blank square of patches: the smallest input there is.

        A micro-batch without this modality runs it, so that every rank takes part in collectives.
        """
        merge, values = self.geometry.merge, self.patch_embedding.in_features
        blank_TE = self.patch_embedding.weight.new_zeros(merge**2, values)
        return {"pixel_values": [blank_TE], "grid": [(1, merge, merge)]}

    def rows_per_item(
        self,
        pixel_values: Sequence[Tensor],  # noqa: ARG002 (called with all arguments)
        grid: Sequence[Grid],
    ) -> list[int]:
        """Rows of each item: ranks with the same items may encode some each."""
        return [self.geometry.rows(one) for one in grid]
