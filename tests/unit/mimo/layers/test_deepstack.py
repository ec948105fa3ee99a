"""What decoders with deepstack cannot be: refused when their layers are made."""

from __future__ import annotations

import pytest

from megatron.core.models.mimo.errors import ConfigError
from tests.rank_pool import RankPool


def refused(name: str, value: object) -> str:
    """What is told of a setting of the language model."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import language_layer_spec
    from megatron.mimo.layers.deepstack import deepstack_layers
    from tests.rank_pool import model_parallel

    model_parallel()
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    block = language_layer_spec(config)
    setattr(config, name, value)
    try:
        deepstack_layers(block, config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "value"), [("cuda_graph_impl", "local"), ("overlap_moe_expert_parallel_comm", True)]
)
def test_layers_that_are_not_called_as_they_are(ranks: RankPool, name: str, value: object) -> None:
    (told,) = ranks(1)(refused, name, value)
    assert name in told
