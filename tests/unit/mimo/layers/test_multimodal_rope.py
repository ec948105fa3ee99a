"""Interleaved multimodal RoPE against transformers' of Qwen3-VL."""

from __future__ import annotations

import pytest
import torch

from megatron.mimo.layers.multimodal_rope import interleaved_axes
from tests.rank_pool import RankPool

SECTIONS = [(24, 20, 20), (4, 4, 4), (2, 1, 1), (6, 1, 1), (2, 3, 3)]


def compare(section: tuple[int, int, int]) -> float:
    """Largest difference of cosines and sines for random positions."""
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    from megatron.mimo.layers.multimodal_rope import InterleavedRotaryEmbedding
    from tests.rank_pool import model_parallel

    model_parallel()
    size = 2 * sum(section)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section)}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=size, rope_parameters=rope))
    ours = InterleavedRotaryEmbedding(
        section=section, kv_channels=size, rotary_percent=1.0, rotary_base=5_000_000
    )
    positions_3BS = torch.randint(0, 5000, (3, 2, 40), generator=torch.Generator().manual_seed(1))
    angles_SB1D = ours(positions_3BS, list(section))
    assert angles_SB1D.shape == (40, 2, 1, size)
    cos_BSD, sin_BSD = theirs(torch.zeros(()), positions_3BS)
    angles_BSD = angles_SB1D.squeeze(2).transpose(0, 1)
    return max(
        (angles_BSD.cos() - cos_BSD).abs().max().item(),
        (angles_BSD.sin() - sin_BSD).abs().max().item(),
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_turns_as_transformers_does(ranks: RankPool, section: tuple[int, int, int]) -> None:
    assert ranks(1)(compare, section) == [0.0]


def test_axes_take_turns_while_they_have_any_left() -> None:
    assert interleaved_axes((4, 2, 2), 8) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert interleaved_axes((2, 3, 3), 8) == [0, 1, 2, 0, 1, 2, 0, 1]
