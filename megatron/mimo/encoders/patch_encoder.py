"""What encoders of images and clips as patches have in common.

Legend: T patches of an item, E values per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.patch_grids import Grid, SquareGeometry, check_items

__all__ = ["PatchEncoder", "check_sizes"]


def check_sizes(config: TransformerConfig, patch_values: int, geometry: SquareGeometry) -> None:
    """Raise ``ConfigError`` for sizes of patches and heads that an encoder cannot have."""
    if patch_values < 1:
        raise ConfigError(f"patch_values is {patch_values}; expected at least 1")
    if config.kv_channels != geometry.head_size:
        raise ConfigError(
            f"the geometry's head size is {geometry.head_size}; expected "
            f"{config.kv_channels}, the config's"
        )


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

    def some_items(
        self, pixel_values: Sequence[Tensor], grid: Sequence[Grid]
    ) -> tuple[Sequence[Tensor], tuple[Grid, ...]]:
        """The items of a call, checked; a blank one where there are none.

        The blank item gives every parameter a gradient of zero instead of none, so that this rank
        takes part in the reductions that others enter; the caller drops its rows.

        Raises:
            InputError: patches and grids that do not fit each other or the model.
        """
        check_items(pixel_values, grid, self.geometry, self.patch_embedding.in_features)
        if not len(grid):
            blank = self.blank_inputs()
            pixel_values, grid = blank["pixel_values"], blank["grid"]
        return pixel_values, tuple((frames, lines, columns) for frames, lines, columns in grid)
