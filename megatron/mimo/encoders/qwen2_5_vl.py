"""The vision encoder of Qwen2.5-VL and its patch merger, from Megatron's parts.

Images and clips of any size: a clip is a grid of patches in time, height and width, an image a clip
of one frame. Attention spans a window of a frame, in a few layers the frame.

Shape legend: T patches of all items, E values per patch, R rows (squares of merge x merge patches)
of all items, P = merge * merge, H hidden, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.patch_encoder import PatchEncoder, check_sizes
from megatron.mimo.encoders.patch_grids import Grid
from megatron.mimo.encoders.plain import pretrained_encoder_config
from megatron.mimo.encoders.projectors import Projector
from megatron.mimo.encoders.qwen2_5_vl_geometry import (
    PatchGeometry,
    patch_sequence,
)
from megatron.mimo.encoders.vit import check_runs_whole
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers import borders_on_host
from megatron.mimo.layers.norm import Norm

__all__ = ["PatchMerger", "WindowTransformer", "window_encoder_config"]

_EPSILON = 1e-6  # Qwen2.5-VL has no setting for it


def window_encoder_config(
    language: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int,
) -> TransformerConfig:
    """The encoder's configuration: RMSNorm, SwiGLU, biases everywhere.

    Arguments and errors are those of :func:`pretrained_encoder_config`.
    """
    return pretrained_encoder_config(
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=_EPSILON,
        gated_linear_unit=True,
        activation_func=F.silu,
    )


class WindowTransformer(PatchEncoder):
    """Images and clips to one row per square of patches, which holds the square's patches.

    Args:
        config: of the encoder; see :func:`window_encoder_config`.
        transformer_layer_spec: see ``window_layer_spec``.
        patch_values: E, channels * frames * height * width of a patch.
        geometry: of patches, squares and windows.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that do not fit each other, or a config that divides the encoder.
    """

    geometry: PatchGeometry

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        patch_values: int,
        geometry: PatchGeometry,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        check_runs_whole(config)
        check_sizes(config, patch_values, geometry)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.geometry = geometry
        # Replicated over the tensor-parallel group: Megatron seeds the default generator equally
        # there, and equal inputs give equal gradients.
        self.patch_embedding = nn.Linear(patch_values, config.hidden_size, bias=False)
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
        by_window = sum(self.geometry.window_pairs(one) for one in grid)
        layers: Any = self.transformer.layers
        return EncoderWork(
            vectors={"patch_embedding": patches, "transformer": patches},
            pairs={
                f"transformer.layers.{number}": by_frame
                if layer.self_attention.core_attention.is_full
                else by_window
                for number, layer in enumerate(layers)
            },
            rows=patches // self.geometry.merge**2,
        )

    def forward(self, pixel_values: Sequence[Tensor], grid: Sequence[Grid]) -> Tensor:
        """Encode items.

        Args:
            pixel_values: of each item [frames * lines * columns, E], of any floating dtype: its
                patches square by square, the squares of a frame line by line.
            grid: frames, lines and columns of each item, host integers.

        Returns:
            [R, P * H], item by item, the squares of an item frame by frame and line by line. Each
            row holds the features of its patches, line by line. R is 0 without items.

        Raises:
            InputError: patches and grids that do not fit each other or the model.
        """
        count, weight = len(grid), self.patch_embedding.weight
        pixel_values, grids = self.some_items(pixel_values, grid)
        sequence = patch_sequence(
            grids,
            self.geometry,
            weight.device,
            borders_on_host=borders_on_host(self.config, weight),
        )
        pixels_TE = torch.cat([one_TE.to(weight.dtype) for one_TE in pixel_values])
        hidden_TH = self.patch_embedding(pixels_TE.index_select(0, sequence.order_T))
        hidden_T1H = self.transformer(
            hidden_TH.unsqueeze(1), attention_mask=None, packed_seq_params=sequence
        )
        rows_RF = hidden_T1H.reshape(len(sequence.places_R), -1)
        rows_RF = rows_RF.index_select(0, sequence.places_R)
        return rows_RF if count else rows_RF[:0]


class PatchMerger(MegatronModule):
    """From the patches of a square to one row of the language model's width: norm, then an MLP.

    Args:
        config: of the encoder.
        patches: P.
        output_size: O.
        norm_of: what is normalised, each of the "patches" or their "square".
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that tensor parallelism does not divide.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        patches: int,
        output_size: int,
        norm_of: Literal["patches", "square"] = "patches",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        width = patches * config.hidden_size
        self.norm = Norm(config, width if norm_of == "square" else config.hidden_size)
        self.mlp = Projector(
            config,
            input_size=width,
            output_size=output_size,
            hidden_size=width,
            activation="gelu",
            pg_collection=pg_collection,
        )

    def forward(self, rows_RF: Tensor) -> Tensor:
        """[R, P * H] -> [R, O]; R may be 0."""
        patches_RPH = rows_RF.unflatten(1, (-1, *self.norm.shape))
        merged_RO: Tensor = self.mlp(self.norm(patches_RPH).flatten(1))
        return merged_RO
