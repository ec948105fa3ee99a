"""A perceiver resampler: any number of an item's rows to a fixed, smaller one.

Shape legend: N items, P rows of an item, Q queries, I width of rows, H output width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.mimo.encoders.plain import plain_encoder_config
from megatron.mimo.encoders.projectors import Projector
from megatron.mimo.layers.attention.core_attention import CoreAttention
from megatron.mimo.layers.norm import Norm

__all__ = ["PerceiverResampler"]


class PerceiverResampler(MegatronModule):
    """Learned queries attend to the rows of an item, item by item; a projection follows.

    Every layer is cross-attention from the queries to the item's normalised rows, and an MLP, each
    behind a norm and on a residual stream. Queries do not see each other. Layers are Megatron's,
    tensor-parallel.

    Args:
        config: of the language model: precision, initialisation, tensor parallelism.
        rows_per_item: P.
        num_queries: Q.
        num_layers: layers.
        num_attention_heads: heads of each layer.
        input_size: I, also the width of the queries.
        output_size: H.
        ffn_hidden_size: width inside the MLPs; four times ``input_size`` by default.
        activation: of the MLPs, by its name in Hugging Face's configurations.
        layernorm_epsilon: of every norm.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that are not positive or do not fit each other or tensor parallelism.
        UnsupportedError: unknown activation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rows_per_item: int,
        num_queries: int,
        num_layers: int,
        num_attention_heads: int,
        input_size: int,
        output_size: int,
        ffn_hidden_size: int | None = None,
        activation: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        own = plain_encoder_config(
            config,
            num_layers=num_layers,
            hidden_size=input_size,
            num_attention_heads=num_attention_heads,
            ffn_hidden_size=ffn_hidden_size or 4 * input_size,
            activation=activation,
            layernorm_epsilon=layernorm_epsilon,
        )
        super().__init__(own)
        if rows_per_item < 1 or num_queries < 1:
            raise ConfigError(
                f"rows_per_item={rows_per_item}, num_queries={num_queries}; expected positive "
                "numbers"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.rows_per_item = rows_per_item
        # Queries and the norm of rows are replicated over the tensor-parallel group.
        self.queries = nn.Parameter(torch.empty(num_queries, input_size))
        if own.perform_initialization:
            nn.init.normal_(self.queries, std=own.init_method_std)
        self.norm = nn.LayerNorm(input_size, layernorm_epsilon)
        self.transformer = TransformerBlock(own, _block(num_layers), pg_collection=pg_collection)
        self.projector = Projector(
            config,
            input_size=input_size,
            output_size=output_size,
            num_layers=1,
            pg_collection=pg_collection,
        )

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N * P, I] -> [N * Q, H]; N may be 0.

        Raises:
            InputError: rows that are not whole items.
        """
        if len(rows_NI) % self.rows_per_item:
            raise InputError(
                f"{len(rows_NI)} rows; expected a multiple of rows_per_item {self.rows_per_item}"
            )
        count = len(rows_NI) // self.rows_per_item
        if count == 0:
            # Attention does not take an empty batch. A blank item, whose rows are dropped below,
            # gives every parameter a gradient of zero instead of none.
            blank_PI = rows_NI.new_zeros(self.rows_per_item, rows_NI.size(1))
            rows_NI = torch.cat([rows_NI, blank_PI])
        context_PNI = self.norm(rows_NI).unflatten(0, (-1, self.rows_per_item)).transpose(0, 1)
        queries_QNI = self.queries[:, None].expand(-1, context_PNI.size(1), -1)
        hidden_QNI = self.transformer(
            queries_QNI.contiguous(), attention_mask=None, context=context_PNI.contiguous()
        )
        hidden_NI = hidden_QNI.transpose(0, 1)[:count].reshape(-1, rows_NI.size(1))
        output_NH: Tensor = self.projector(hidden_NI)
        return output_NH


def _block(num_layers: int) -> TransformerBlockSubmodules:
    """Layers of cross-attention without self-attention, and a norm behind the last."""
    attention = CrossAttentionSubmodules(
        linear_q=ColumnParallelLinear,
        linear_kv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_cross_attn_layernorm=Norm,
            cross_attention=ModuleSpec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=attention,
            ),
            cross_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
