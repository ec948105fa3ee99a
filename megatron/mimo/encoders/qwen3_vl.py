"""The vision encoder of Qwen3-VL, from Megatron's parts.

Images and clips of any size, whose frames attend to themselves. A patch's position is learned on a
square grid and interpolated on the item's own; queries and keys turn by line and column. Beside its
last layer some layers in between give what they have for each patch: levels of the rows.

Shape legend: T patches of all items, E values per patch, R rows (squares of merge x merge patches)
of all items, P = merge * merge, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.patch_encoder import PatchEncoder, check_sizes
from megatron.mimo.encoders.patch_grids import Grid
from megatron.mimo.encoders.plain import plain_encoder_config
from megatron.mimo.encoders.qwen3_vl_geometry import FrameGeometry, frame_sequence
from megatron.mimo.encoders.vit import check_runs_whole
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers import borders_on_host

__all__ = ["FrameTransformer", "frame_encoder_config"]

_EPSILON = 1e-6  # Qwen3-VL has no setting for it


def frame_encoder_config(
    language: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int,
    activation: str,
) -> TransformerConfig:
    """The encoder's configuration: LayerNorm, an MLP without a gate, biases everywhere.

    Its layers are recomputed one by one where they are recomputed whole, whatever number of the
    language model's are: what layers in between give is needed at the end.

    Arguments and errors are those of :func:`plain_encoder_config`.
    """
    config = plain_encoder_config(
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
        activation=activation,
        layernorm_epsilon=_EPSILON,
    )
    if config.recompute_method == "uniform":
        config = replace(config, recompute_num_layers=1)
    return config


class FrameTransformer(PatchEncoder):
    """Images and clips to one row per square of patches, which holds the square's patches.

    Args:
        config: of the encoder; see :func:`frame_encoder_config`.
        transformer_layer_spec: see ``frame_layer_spec``.
        patch_values: E, channels * frames * height * width of a patch.
        geometry: of patches, squares and learned positions.
        level_layers: numbers, from 0 and ascending, of the layers that give levels of the rows.
        pg_collection: Megatron's process groups; the global ones by default.

    Attributes:
        num_levels: how many levels rows have.

    Raises:
        ConfigError: sizes that do not fit each other, or a config that divides the encoder.
    """

    geometry: FrameGeometry

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        patch_values: int,
        geometry: FrameGeometry,
        level_layers: Sequence[int] = (),
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        check_runs_whole(config)
        check_sizes(config, patch_values, geometry)
        _check_levels(level_layers, config.num_layers)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.geometry = geometry
        self.level_layers = frozenset(level_layers)
        self.num_levels = len(level_layers)
        # Replicated over the tensor-parallel group: Megatron seeds the default generator equally
        # there, and equal inputs give equal gradients.
        self.patch_embedding = nn.Linear(patch_values, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(geometry.side**2, config.hidden_size))
        if config.perform_initialization:
            nn.init.normal_(self.position_embedding, std=config.init_method_std)
        self.transformer = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            post_layer_norm=False,  # the merger normalises
            pg_collection=pg_collection,
        )

    def work(
        self,
        pixel_values: Sequence[Tensor],  # noqa: ARG002 (called with all arguments)
        grid: Sequence[Grid],
    ) -> EncoderWork:
        """How often the parts run for these items."""
        patches = sum(math.prod(one) for one in grid)
        by_frame = sum(frames * (lines * columns) ** 2 for frames, lines, columns in grid)
        return EncoderWork(
            vectors={"patch_embedding": patches, "transformer": patches},
            pairs={"transformer": by_frame},
            rows=patches // self.geometry.merge**2,
        )

    def forward(self, pixel_values: Sequence[Tensor], grid: Sequence[Grid]) -> Encoded:
        """Encode items.

        Args:
            pixel_values: of each item [frames * lines * columns, E], of any floating dtype: its
                patches square by square, the squares of a frame line by line.
            grid: frames, lines and columns of each item, host integers.

        Returns:
            Rows [R, P * H] and their levels of the same shape, item by item, the squares of an item
            frame by frame and line by line. Each row holds the features of its patches, line by
            line. R is 0 without items.

        Raises:
            InputError: patches and grids that do not fit each other or the model.
        """
        count, weight = len(grid), self.patch_embedding.weight
        pixel_values, grids = self.some_items(pixel_values, grid)
        sequence = frame_sequence(
            grids,
            self.geometry,
            weight.device,
            borders_on_host=borders_on_host(self.config, weight),
        )
        pixels_TE = torch.cat([one_TE.to(weight.dtype) for one_TE in pixel_values])
        hidden_TH = self.patch_embedding(pixels_TE)
        hidden_TH = hidden_TH + self._positions(sequence.taps_T4, sequence.weights_T4)
        hidden_T1H, between = self._layers(hidden_TH.unsqueeze(1), sequence)
        square = self.geometry.merge**2 * self.config.hidden_size
        rows_RF, *levels = (
            (one_T1H if count else one_T1H[:0]).reshape(-1, square)
            for one_T1H in (hidden_T1H, *between)
        )
        return EncodedRows(rows_NH=rows_RF, levels=tuple(levels)).simplest()

    def _positions(self, taps_T4: Tensor, weights_T4: Tensor) -> Tensor:
        """Interpolate the learned positions, in fp32: [T, H]."""
        table = self.position_embedding.float()
        found_TH = F.embedding_bag(taps_T4, table, per_sample_weights=weights_T4, mode="sum")
        return found_TH.to(self.position_embedding.dtype)

    def _layers(self, hidden_T1H: Tensor, sequence: Any) -> tuple[Tensor, list[Tensor]]:
        """The outputs of the last layer and of those in ``level_layers``."""
        given = {"attention_mask": None, "packed_seq_params": sequence}
        if not self.level_layers:
            return self.transformer(hidden_T1H, **given), []
        last, between = self.transformer(
            hidden_T1H, extract_layer_indices=set(self.level_layers), **given
        )
        assert len(between) == self.num_levels, "every layer is a step of its own"
        return last, between


def _check_levels(level_layers: Sequence[int], num_layers: int) -> None:
    ascending = all(one < other for one, other in pairwise(level_layers))
    if not ascending or not set(level_layers) <= set(range(num_layers)):
        raise ConfigError(
            f"levels are given by layers {list(level_layers)}; expected ascending numbers from 0 "
            f"to {num_layers - 1}, of the encoder's layers"
        )
