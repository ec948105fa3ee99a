"""The image encoders of CLIP and SigLIP from Megatron's parts.

Shape legend: N images, C channels, P patches per image, R rows per image (P, and 1 with a class
token), H hidden, F features (H for each feature layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.vit import check_patches, check_pixels, check_runs_whole, patchify
from megatron.mimo.encoders.work import EncoderWork

__all__ = ["ClipEncoder", "layer_numbers"]


def layer_numbers(feature_layers: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Feature layers counted from the embedding, which is 0.

    Args:
        feature_layers: one or several indices into the list that starts with the embedding and
            goes on with the output of every layer; negative ones count from its end.
        num_layers: layers of the whole transformer.

    Raises:
        ConfigError: an index out of range, none, or none that needs a layer.
    """
    given = [feature_layers] if isinstance(feature_layers, int) else list(feature_layers)
    numbers = tuple(index + num_layers + 1 if index < 0 else index for index in given)
    if any(not 0 <= number <= num_layers for number in numbers) or max(numbers, default=0) < 1:
        raise ConfigError(
            f"feature layers are {given}; expected indices from {-num_layers - 1} to {num_layers}, "
            f"one of them behind a layer: the transformer has {num_layers}"
        )
    return numbers


class ClipEncoder(MegatronModule):
    """Images to rows of features, as the vision towers of CLIP and SigLIP give them.

    With ``class_token`` and ``pre_norm`` it is CLIP's, with ``patch_bias`` SigLIP's. Features are
    the residual stream at some layers, concatenated; layers above the last of them are not built.

    Args:
        config: of the encoder, see :func:`plain_encoder_config`; ``num_layers`` is the highest
            feature layer.
        transformer_layer_spec: of one layer whose attention has no mask.
        image_size: height and width of every image, in pixels.
        patch_size: side of a patch, in pixels.
        channels: colour channels.
        class_token: a learned embedding stands before the patches.
        pre_norm: the embedding is normalised before the first layer.
        patch_bias: patches are embedded with a bias.
        feature_layers: layers whose output makes the features, 0 for the embedding; the last one
            by default.
        drop_first_row: leave out the first row of every image: the class token, where there is
            one.
        post_norm: features are the output of the last layer, normalised.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: no patch fits into the image; feature layers that do not fit
            ``config.num_layers``, or several of them with ``post_norm``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        channels: int = 3,
        class_token: bool = True,
        pre_norm: bool = True,
        patch_bias: bool = False,
        feature_layers: Sequence[int] | None = None,
        drop_first_row: bool = True,
        post_norm: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if config.recompute_method == "uniform" and len(feature_layers or ()) > 1:
            # Of layers that are recomputed together, Megatron gives the output of the last only.
            config = replace(config, recompute_num_layers=1)
        super().__init__(config=config)
        # As in a convolution, what is left at the right and below after the last patch is not seen.
        lines, columns = (side // max(patch_size, 1) for side in image_size)
        check_patches((lines * patch_size, columns * patch_size), patch_size, channels)
        check_runs_whole(config)
        self.feature_layers = tuple(feature_layers or (config.num_layers,))
        if max(self.feature_layers) != config.num_layers or min(self.feature_layers) < 0:
            raise ConfigError(
                f"feature_layers are {list(self.feature_layers)} and config.num_layers is "
                f"{config.num_layers}; expected the highest to be the last layer that is built"
            )
        if post_norm and len(self.feature_layers) > 1:
            raise ConfigError(
                f"post_norm=True with feature_layers {list(self.feature_layers)}; expected the "
                "last layer alone, as the norm belongs to its output"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.image_shape = (channels, *image_size)
        self.patch_size = patch_size
        self.drop_first_row = drop_first_row
        hidden = config.hidden_size
        self.seen = (lines * patch_size, columns * patch_size)  # pixels that are in a patch
        self.num_positions = lines * columns + class_token
        # All but the transformer is replicated over the tensor-parallel group: Megatron seeds the
        # default generator equally there, and equal inputs give equal gradients.
        self.patch_embedding = nn.Linear(channels * patch_size**2, hidden, bias=patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(hidden)) if class_token else None
        self.position_embedding = nn.Parameter(torch.empty(self.num_positions, hidden))
        if config.perform_initialization:
            for parameter in (self.class_embedding, self.position_embedding):
                if parameter is not None:
                    nn.init.normal_(parameter, std=config.init_method_std)
        self.pre_layernorm = nn.LayerNorm(hidden, config.layernorm_epsilon) if pre_norm else None
        self.transformer = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            post_layer_norm=post_norm,
            pg_collection=pg_collection,
        )

    @property
    def rows_per_image(self) -> int:
        """Rows that an image gives."""
        return self.num_positions - self.drop_first_row

    def blank_inputs(self) -> dict[str, Tensor]:
        """Arguments of ``forward`` for one blank image: the smallest input there is.

        A micro-batch without this modality runs it, so that every rank takes part in collectives.
        """
        return {"pixel_values": self.position_embedding.new_zeros(1, *self.image_shape)}

    def rows_per_item(self, pixel_values: Tensor | Sequence[Tensor]) -> list[int]:
        """Rows of each item; an item of a list is as many images as its tensor holds."""
        if torch.is_tensor(pixel_values):
            return [self.rows_per_image] * len(pixel_values)
        return [len(images_NCHW) * self.rows_per_image for images_NCHW in pixel_values]

    def work(self, pixel_values: Tensor | Sequence[Tensor]) -> EncoderWork:
        """How often the parts run for these items."""
        rows = sum(self.rows_per_item(pixel_values))
        images, positions = rows // self.rows_per_image, self.num_positions
        return EncoderWork(
            vectors={
                "patch_embedding": images * (positions - (self.class_embedding is not None)),
                "transformer": images * positions,
            },
            pairs={"transformer": images * positions**2},
            rows=rows,
        )

    def forward(self, pixel_values: Tensor | Sequence[Tensor]) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [N, C, height, width], of any floating dtype; N may be 0. Or a list of
                such tensors: items that are several images each.

        Returns:
            [N * R, F], image by image, the patches of an image row by row.

        Raises:
            InputError: the images have another shape or dtype.
        """
        if not torch.is_tensor(pixel_values):
            for images_NCHW in pixel_values:
                check_pixels(images_NCHW, self.image_shape)
            none_0CHW = self.position_embedding.new_zeros(0, *self.image_shape)
            pixel_values = torch.cat([*pixel_values] or [none_0CHW])
        check_pixels(pixel_values, self.image_shape)
        count = len(pixel_values)
        if count == 0:
            # As in VisionTransformer: a blank image gives every parameter a gradient of zero.
            pixel_values = pixel_values.new_zeros(1, *self.image_shape)
        features_RNF = self._features(self._embed(pixel_values).transpose(0, 1).contiguous())
        if self.drop_first_row:
            features_RNF = features_RNF[1:]
        return features_RNF.transpose(0, 1)[:count].reshape(-1, features_RNF.shape[-1])

    def _embed(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, R, H]: patches and class token with their positions."""
        height, width = self.seen
        pixels_NCHW = pixels_NCHW[..., :height, :width].to(self.patch_embedding.weight.dtype)
        hidden_NRH = self.patch_embedding(patchify(pixels_NCHW, self.patch_size))
        if self.class_embedding is not None:
            first_N1H = self.class_embedding.expand(len(hidden_NRH), 1, -1)
            hidden_NRH = torch.cat([first_N1H, hidden_NRH], dim=1)
        hidden_NRH = hidden_NRH + self.position_embedding
        return hidden_NRH if self.pre_layernorm is None else self.pre_layernorm(hidden_NRH)

    def _features(self, hidden_RNH: Tensor) -> Tensor:
        """[R, N, F]: the outputs of the feature layers, side by side."""
        last = self.config.num_layers
        between = {number - 1 for number in self.feature_layers if 0 < number < last}
        outputs_RNH = {0: hidden_RNH}
        if between:
            outputs_RNH[last], taken = self.transformer(
                hidden_RNH, attention_mask=None, extract_layer_indices=between
            )
            outputs_RNH.update(zip((index + 1 for index in sorted(between)), taken, strict=True))
        else:
            outputs_RNH[last] = self.transformer(hidden_RNH, attention_mask=None)
        features = [outputs_RNH[number] for number in self.feature_layers]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)
