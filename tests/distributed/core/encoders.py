"""The encoders of the small model of ``reference``. Legend: N rows, F features, H hidden."""

from __future__ import annotations

from typing import Any

import torch

SOUND_WIDTH = 5
PIXELS = (2, 4, 4)  # channels, height, width


class SoundEncoder(torch.nn.Module):
    """A plain PyTorch encoder: [N, F] to [N, H]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen = torch.nn.Linear(width, 2 * hidden)
        self.narrow = torch.nn.Linear(2 * hidden, hidden)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.widen(waves)))


def sound_spec(hidden: int) -> Any:
    from megatron.core.models.mimo import AudioModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    # Knows nothing of Megatron: replicated over the tensor-parallel group.
    encoder = ModuleSpec(module=SoundEncoder, params={"width": SOUND_WIDTH, "hidden": hidden})
    return ModuleSpec(module=AudioModalitySubmodules, submodules={"encoders": {"linear": encoder}})


def _leveled_transformer(levels: int) -> type[torch.nn.Module]:
    """A vision transformer that gives levels of its rows."""
    from megatron.core.models.mimo.alignment import EncodedRows
    from megatron.mimo.encoders import VisionTransformer

    class LeveledTransformer(VisionTransformer):
        num_levels = levels

        def forward(self, pixel_values: torch.Tensor) -> Any:
            rows_NH = super().forward(pixel_values)
            levels = tuple(torch.tanh(rows_NH * (2 + level)) for level in range(self.num_levels))
            return EncodedRows(rows_NH=rows_NH, levels=levels)

    return LeveledTransformer


def image_parts(config: Any, groups: Any, levels: int, stages: int = 1) -> dict[str, Any]:
    from dataclasses import replace

    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.encoders import VisionTransformer, encoder_config
    from megatron.mimo.layers import encoder_layer_spec
    from megatron.mimo.models.common.place import Place, config_at

    config = config_at(config, Place(groups=groups))
    vision = encoder_config(
        config, num_layers=2, hidden_size=8, num_attention_heads=4, stages=stages
    )
    encoder = ModuleSpec(
        module=_leveled_transformer(levels) if levels else VisionTransformer,
        params={
            "config": vision,
            "transformer_layer_spec": encoder_layer_spec(vision),
            "image_size": PIXELS[1:],
            "patch_size": 2,
            "channels": PIXELS[0],
            "pg_collection": groups,
        },
    )
    projection = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": replace(config, sequence_parallel=False, variable_seq_lengths=False),
            "submodules": MLPSubmodules(
                linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
            ),
            "projector_type": "mlp",
            "input_size": vision.hidden_size,
            "pg_collection": groups,
        },
    )
    specs: dict[str, Any] = {"encoders": {"vit": encoder}, "input_projections": [projection]}
    return specs | ({"level_projections": [projection] * levels} if levels else {})
