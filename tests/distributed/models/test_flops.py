"""FLOPs counted from a model and a batch are those that torch counts while transformers computes.

Attention in transformers' eager implementation computes all pairs of a row, ours what is seen: the
comparison takes all of them, and the number of seen pairs has a test of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron.mimo.models import family_names
from tests.rank_pool import RankPool, model_parallel

# What is frozen: parts by our names, and how parameters of transformers' model that are in them
# begin, or where they end up in the module tree.
FROZEN = {
    "nothing": ((), ()),
    "encoders": (("encoders",), ("vision_tower", "audio_tower", "visual.blocks", "visual.p")),
    "language": (("language",), ("language_model", "lm_head")),
}


def comparable(config: Any) -> Any:
    """With attention that torch can count, and without layers that transformers runs in vain."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs or {})):
        part._attn_implementation = "eager"
        part._experts_implementation = "eager"
    if hasattr(config, "vision_feature_layer"):
        config.vision_feature_layer = -1
    return config


def convolve(hidden_states: Any, weight: Any, *_: Any, **__: Any) -> Any:
    """Channel by channel: torch counts a convolution's backward pass as if channels were mixed."""
    taps = weight.size(-1)
    padded = torch.nn.functional.pad(hidden_states, (taps - 1, 0)).unfold(-1, taps, 1)
    return torch.nn.functional.silu((padded * weight[:, None]).sum(-1))


def count_no_delta_net() -> None:
    """transformers computes rule and convolution token by token, with nothing torch can count."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as sparse

    for module in (dense, sparse):
        module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule
        module.causal_conv1d_fn = convolve


def delta_nets(config: Any, length: int) -> int:
    """Forward, of a conversation: convolutions, and in each head three products of the state with
    a vector."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None) or []
    if "linear_attention" not in layers:
        return 0
    values = text.linear_value_head_dim * text.linear_num_value_heads
    channels = 2 * text.linear_key_head_dim * text.linear_num_key_heads + values
    products = 3 * text.linear_key_head_dim * values + text.linear_conv_kernel_dim * channels
    return 2 * layers.count("linear_attention") * length * products


def example_of(family: Any, config: Any) -> dict[str, Any]:
    """A conversation with media whose recordings, if it has any, fill their windows."""
    generator = torch.Generator().manual_seed(3)
    while len(example := family.example(config, generator)) == 1:
        pass
    mask_NF = example.get("feature_attention_mask")
    if mask_NF is None:
        return dict(example)
    from megatron.mimo.models.common.audio_tower import rows_of_clip

    token = getattr(config, "audio_token_index", None)
    ids_L = example["input_ids"][0]
    rows = rows_of_clip(config.audio_config, mask_NF.size(1)) * len(mask_NF)
    audio = torch.full((rows,), token)
    example["input_ids"] = torch.cat([ids_L[ids_L != token], audio])[None]
    example["feature_attention_mask"] = torch.ones_like(mask_NF)
    return dict(example)


def counts(name: str) -> dict[str, tuple[float, float]]:
    """Frozen part -> FLOPs that torch counts, and ours, of one conversation."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.data.row_cache.lookup import BESIDE
    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.family import sample_collator
    from megatron.mimo.models.common.flops import (
        language_amounts,
        media_amounts,
        operations,
        training_costs,
    )

    model_parallel()
    count_no_delta_net()
    family = load_family(name)
    config = comparable(family.tiny())
    example = example_of(family, config)
    model = build_model(family, config, model_settings(family, config), device=torch.device("meta"))
    reference = family.reference(config)
    sample = family.sample(config, example)
    length = len(sample.token_ids)
    vocab_size = config.get_text_config().vocab_size
    collate = sample_collator(family, config, seq_length=length, vocab_size=vocab_size)
    inputs = collate([sample])["modality_inputs"]
    media = media_amounts(model, inputs)
    looked_up = {
        modality: {name: one | dict.fromkeys(BESIDE, ()) for name, one in encoders.items()}
        for modality, encoders in inputs.items()
    }
    assert media_amounts(model, looked_up) == media  # whatever a cache has put beside
    found = {}
    for title, (parts, words) in FROZEN.items():
        model.requires_grad_(True)
        model.freeze(
            *(
                f"{modality}.{part}" if part == "encoders" else part
                for part in parts
                for modality in (model.modality_submodules if part == "encoders" else ("",))
            )
        )
        for path, parameter in reference.named_parameters():
            parameter.requires_grad_(not any(word in path for word in words))
        with FlopCounterMode(display=False) as counter:
            reference(**example, labels=example["input_ids"]).loss.backward()
        costs = training_costs(model)
        all_pairs = {
            amount: length**2 if "pairs" in amount else number
            for amount, number in language_amounts(costs, {length: 1}, spans={}).items()
        }
        ours = operations(costs, media) + operations(costs, all_pairs)
        torchs = counter.get_total_flops() + 3 * delta_nets(config, length)
        found[title] = (float(torchs), ours)
    return found


@pytest.mark.parametrize("name", family_names())
def test_counts_what_torch_counts(ranks: RankPool, name: str) -> None:
    (found,) = ranks(1)(counts, name)
    for title, (torchs, ours) in found.items():
        assert ours == pytest.approx(torchs, rel=0.01), title


def seen(lengths: Sequence[int], window: int | None) -> int:
    return sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(length)
        if key <= query and (window is None or query - key < window)
    )


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_seen_pairs(window: int | None) -> None:
    from megatron.mimo.models.common.flops import attended_pairs

    lengths = [1, 7, 12]
    assert attended_pairs(lengths, window) == seen(lengths, window)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_pairs_that_spans_add(window: int | None) -> None:
    """By the rule that attention goes by: two spans in one document, one in another."""
    from megatron.mimo.layers.attention.visibility import Visibility
    from megatron.mimo.models.common.flops import language_amounts, span_lengths

    spans_BS = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    rule = Visibility.of(causal=True, window=(-1 if window is None else window - 1, 0), spans=True)
    places = torch.arange(10)
    allowed = sum(int(rule.allowed(places, places, ids[None], ids[None]).sum()) for ids in spans_BS)
    amount = "language pairs" if window is None else f"language pairs within {window}"
    found = language_amounts({amount: 1.0}, {10: 2}, spans=span_lengths({"span_ids": spans_BS}))
    assert found[amount] == allowed
