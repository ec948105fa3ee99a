"""A vision transformer from Megatron's parts.

Shape legend: N images, C channels, P patches per image, E pixel values per patch, H hidden.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.work import EncoderWork

# Of --recompute-modules, what an encoder's dense layers with ordinary attention have.
_RECOMPUTED = ("core_attn", "layernorm", "mlp")
_EXPERTS_AND_LINEAR = ("num_moe_experts", "linear_attention_freq")


def encoder_config(
    language: TransformerConfig,
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int | None = None,
    stages: int = 1,
) -> TransformerConfig:
    """An encoder's configuration beside a language model's, where both share process groups.

    Precision, activation, initialisation, dropout, recomputation and tensor parallelism are the
    language model's. The encoder has no experts or linear layers, and runs whole on each
    tensor-parallel group that has it, or by pipeline stages of its own: no context or sequence
    parallelism. The number of its rows varies with a micro-batch's media, which FP8 and FP4 (tokens
    in multiples of eight) and CUDA graphs (fixed shapes) do not allow: it runs in the language
    model's ``params_dtype``, outside of graphs.

    Args:
        language: configuration of the language model.
        num_layers: layers of the encoder.
        hidden_size: width of its residual stream.
        num_attention_heads: heads of each layer.
        ffn_hidden_size: width inside the MLP; four times ``hidden_size`` by default.
        stages: of its own pipeline.

    Raises:
        ConfigError: the sizes do not fit each other, the tensor-parallel size or the stages.
    """
    sizes = (num_layers, hidden_size, num_attention_heads, ffn_hidden_size)
    _check_sizes(*sizes, tp_size=language.tensor_model_parallel_size, stages=stages)
    return replace(
        language,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
        # Derived from the sizes above when None.
        kv_channels=None,
        num_query_groups=None,
        output_layer_init_method=None,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        variable_seq_lengths=False,
        context_parallel_size=1,
        sequence_parallel=False,
        tp_comm_overlap=False,
        mtp_num_layers=None,
        fp8=None,
        fp4=None,
        cuda_graph_impl="none",
        cuda_graph_modules=[],
        inference_cuda_graph_scope=None,
        recompute_modules=[n for n in language.recompute_modules or () if n in _RECOMPUTED],
        **_only_in_language(language),
    )


def _check_sizes(
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    ffn_hidden_size: int | None,
    *,
    tp_size: int,
    stages: int,
) -> None:
    """Raise ``ConfigError`` for sizes that do not fit each other, or the parallelism."""
    for title, value in (("num_layers", num_layers), ("num_attention_heads", num_attention_heads)):
        if value < 1:
            raise ConfigError(f"the encoder's {title} is {value}; expected at least 1")
    if num_attention_heads % tp_size:
        raise ConfigError(
            f"the encoder's {num_attention_heads} attention heads are not divisible by the "
            f"tensor-parallel size {tp_size}; change either"
        )
    if hidden_size < 1 or hidden_size % num_attention_heads:
        raise ConfigError(
            f"the encoder's hidden size {hidden_size} is not divisible by its "
            f"{num_attention_heads} attention heads"
        )
    if ffn_hidden_size is not None and (ffn_hidden_size < 1 or ffn_hidden_size % tp_size):
        raise ConfigError(
            f"the encoder's MLP has width {ffn_hidden_size}, which is not divisible by the "
            f"tensor-parallel size {tp_size}; change either"
        )
    if num_layers % stages:
        raise ConfigError(
            f"the encoder's {num_layers} layers are not divisible by its {stages} pipeline stages; "
            "change either"
        )


def _only_in_language(config: TransformerConfig) -> dict[str, Any]:
    """Default values of the fields of experts and linear layers, which encoders do not have."""
    defaults = {}
    for field in fields(config):
        if field.name.startswith(("moe_", "expert_")) or field.name in _EXPERTS_AND_LINEAR:
            made = field.default_factory
            defaults[field.name] = field.default if made is MISSING else made()
    return defaults


def check_patches(image_size: tuple[int, int], patch_size: int, channels: int) -> None:
    """Raise ``ConfigError`` unless images can be cut into patches."""
    if patch_size < 1 or channels < 1 or min(image_size) < 1:
        raise ConfigError(
            f"image_size={image_size}, patch_size={patch_size}, channels={channels}; "
            "expected positive numbers"
        )
    if any(side % patch_size for side in image_size):
        raise ConfigError(
            f"an image of {image_size[0]} x {image_size[1]} pixels is not divisible into "
            f"patches of {patch_size} x {patch_size}; resize the images or change patch_size"
        )


def check_runs_whole(config: TransformerConfig, *, staged: bool = False) -> None:
    """Raise ``ConfigError`` for the config of an encoder whose layers or sequence are split.

    Args:
        config: the encoder's.
        staged: its layers may be.
    """
    if (config.pipeline_model_parallel_size != 1 and not staged) or config.sequence_parallel:
        raise ConfigError(
            "a vision transformer runs whole on its ranks: expected a config with "
            "pipeline_model_parallel_size 1 and without sequence_parallel, got "
            f"{config.pipeline_model_parallel_size} and {config.sequence_parallel}; "
            "use encoder_config()"
        )


def check_pixels(pixel_values: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ``InputError`` unless the tensor is images of ``image_shape`` (C, height, width)."""
    if tuple(pixel_values.shape[1:]) != image_shape or not pixel_values.is_floating_point():
        raise InputError(
            f"pixel_values is {pixel_values.dtype} {list(pixel_values.shape)}; expected "
            f"floating point [N, {', '.join(map(str, image_shape))}]"
        )


def patchify(pixels_NCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row.

    Returns:
        [N, P, E], where a patch lists its values channel by channel, each row by row.
    """
    count, channels, height, width = pixels_NCHW.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels_NCHW.reshape(count, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(
        count, rows * columns, channels * patch_size * patch_size
    )


class VisionTransformer(MegatronModule):
    """Images to one embedding row per patch, with bidirectional attention inside each image.

    With pipeline stages of its own, the first one embeds the patches; each later one goes on from
    the hidden states that ``set_input_tensor`` gives it, and the last one ends in the rows.

    Args:
        config: of the encoder; see :func:`encoder_config`. Its pipeline-parallel size is the
            number of stages.
        transformer_layer_spec: of one layer whose attention has no mask.
        image_size: height and width of every image, in pixels.
        patch_size: side of a patch, in pixels.
        channels: colour channels.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: the image is not divisible into patches.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        channels: int = 3,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        check_patches(image_size, patch_size, channels)
        check_runs_whole(config, staged=True)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.image_shape = (channels, *image_size)
        self.patch_size = patch_size
        self.num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        stages = config.pipeline_model_parallel_size
        self.is_first_stage = stages == 1 or pg_collection.pp.rank() == 0
        self.is_last_stage = stages == 1 or pg_collection.pp.rank() == stages - 1
        if self.is_first_stage:
            # Both are replicated over the tensor-parallel group: Megatron seeds the default
            # generator equally there, and equal inputs give equal gradients.
            width = config.hidden_size
            self.patch_embedding = nn.Linear(channels * patch_size**2, width)
            self.position_embedding = nn.Parameter(torch.empty(self.num_patches, width))
            if config.perform_initialization:
                nn.init.normal_(self.position_embedding, std=config.init_method_std)
        self.transformer = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            pre_process=self.is_first_stage,
            post_process=self.is_last_stage,
            pg_collection=pg_collection,
        )

    def set_input_tensor(self, hidden_PNH: Tensor) -> None:
        """The hidden states with which the next call begins, on a stage behind the first."""
        self.transformer.set_input_tensor(hidden_PNH)

    def blank_inputs(self) -> dict[str, Tensor]:
        """Arguments of ``forward`` for one blank image: the smallest input there is.

        A micro-batch without this modality runs it, so that every rank takes part in collectives.
        """
        like = next(self.parameters())
        return {"pixel_values": like.new_zeros(1, *self.image_shape)}

    def rows_per_item(self, pixel_values: Tensor) -> list[int]:
        """Rows of each image: ranks with the same images may encode some each."""
        return [self.num_patches] * len(pixel_values)

    def work(self, pixel_values: Tensor) -> EncoderWork:
        """How often the parts run for these images."""
        patches = len(pixel_values) * self.num_patches
        return EncoderWork(
            vectors={"patch_embedding": patches, "transformer": patches},
            pairs={"transformer": patches * self.num_patches},
            rows=patches,
        )

    def forward(self, pixel_values: Tensor | None) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [N, C, height, width], of any floating dtype; N may be 0. None on a stage
                behind the first.

        Returns:
            [N * P, H], image by image, the patches of an image row by row; on a stage before the
            last [P, N, H].

        Raises:
            InputError: the images have another shape or dtype.
        """
        if pixel_values is None:
            return self._leave(self.transformer(None, attention_mask=None))
        check_pixels(pixel_values, self.image_shape)
        count = len(pixel_values)
        if count == 0:
            # Megatron's attention does not take an empty batch. A blank image, whose rows are
            # dropped below, gives every parameter a gradient of zero instead of none, so that
            # this rank takes part in the reductions that others enter.
            pixel_values = pixel_values.new_zeros(1, *self.image_shape)
        dtype = self.patch_embedding.weight.dtype
        patches_NPE = patchify(pixel_values.to(dtype), self.patch_size)
        hidden_NPH = self.patch_embedding(patches_NPE) + self.position_embedding
        hidden_PNH = hidden_NPH.transpose(0, 1).contiguous()
        return self._leave(self.transformer(hidden_PNH, attention_mask=None)[:, :count])

    def _leave(self, hidden_PNH: Tensor) -> Tensor:
        """The output of this stage."""
        if not self.is_last_stage:
            return hidden_PNH
        return hidden_PNH.transpose(0, 1).reshape(-1, hidden_PNH.shape[-1])
