"""The families whose training step is measured: ``CASES``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.step_sides import Case, Conversations, Size

__all__ = ["CASES"]

_SHORT = (16, 24, 40, 48, 64, 96, 160, 240)
_LONG = (64, 96, 128, 192, 256, 384, 768, 1440)
_TINY = Size(lengths=_SHORT, dtype=torch.float32)

_LLAVA_IMAGE = 4
_LLAVA: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {
        "vision": (128, 512, 4, 4, 56, 14),  # hidden, ffn, layers, heads, image, patch
        "text": (256, 704, 4, 8, 8, 2000),  # hidden, ffn, layers, heads, groups, vocabulary
    },
    "2b": {
        "vision": (1024, 4096, 24, 16, 336, 14),
        "text": (2048, 5632, 32, 16, 16, 32064),
    },
}
# Squares of the images of Qwen3-VL's conversations, down and across, in turn.
_SQUARES = {
    "tiny": ((2, 2), (3, 4), (4, 3), (1, 6)),
    "gpu": ((16, 16), (12, 20), (24, 14), (8, 30)),
}


def llava_configuration(size: str) -> Any:
    """The ``LlavaConfig`` of a size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    hidden, ffn, layers, heads, image, patch = _LLAVA[size]["vision"]
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
    )
    hidden, ffn, layers, heads, groups, vocabulary = _LLAVA[size]["text"]
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_LLAVA_IMAGE,
        architectures=["LlavaForConditionalGeneration"],
    )


def llava_conversations(config: Any, lengths: Sequence[int]) -> Conversations:
    """One image and some text each."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(1)
    rows = (vision.image_size // vision.patch_size) ** 2
    shape = (1, 3, vision.image_size, vision.image_size)
    found = []
    for length in lengths:
        text = torch.randint(5, config.text_config.vocab_size, (length,), generator=generator)
        tokens = torch.cat([text[:4], torch.full((rows,), _LLAVA_IMAGE), text[4:]])
        pixels = torch.randn(shape, generator=generator)
        found.append({"input_ids": tokens[None], "pixel_values": pixels})
    return found


def llava_flops(config: Any, given: Conversations) -> float:
    """Of CLIP and the projector."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    rows, width, layers = patches + 1, vision.hidden_size, vision.num_hidden_layers - 1
    one = 6 * layers * rows * (4 * width * width + 2 * width * vision.intermediate_size)
    one += 12 * layers * width * rows**2 + 6 * patches * (width + hidden) * hidden
    return float(one * len(given))


def qwen3_vl_configuration(size: str) -> Any:
    """The ``Qwen3VLConfig`` of a size; those of a GPU are the published ones."""
    if size != "tiny":
        from megatron.mimo.recipes import load_recipe

        make = load_recipe(f"qwen3_vl_{size}").hf_config
        assert make is not None
        return make()
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 4,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "out_hidden_size": 256,
        },
        text_config={
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "vocab_size": 2000,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [6, 5, 5],
            },
        },
        vision_start_token_id=1,
        vision_end_token_id=2,
        video_token_id=3,
        image_token_id=4,
        architectures=["Qwen3VLForConditionalGeneration"],
    )


def qwen3_vl_conversations(config: Any, lengths: Sequence[int]) -> Conversations:
    """One image, of another size each time, and some text each."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(1)
    merge, image = vision.spatial_merge_size, config.image_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    words = min(config.text_config.vocab_size, 150_000)  # behind them are special tokens
    squares = _SQUARES["tiny" if vision.hidden_size < 1024 else "gpu"]
    found = []
    for number, length in enumerate(lengths):
        down, across = squares[number % len(squares)]
        text = torch.randint(5, words, (length,), generator=generator)
        tokens = torch.cat([text[:4], torch.full((down * across,), image), text[4:]])[None]
        patches = down * across * merge**2
        found.append(
            {
                "input_ids": tokens,
                "mm_token_type_ids": (tokens == image).long(),
                "pixel_values": torch.randn(patches, values, generator=generator),
                "image_grid_thw": torch.tensor([[1, down * merge, across * merge]]),
            }
        )
    return found


def qwen3_vl_flops(config: Any, given: Conversations) -> float:
    """Of the encoder, the merger and those of the levels."""
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    width, square = vision.hidden_size, vision.hidden_size * merge**2
    layer = 4 * width * width + 2 * width * vision.intermediate_size
    mergers = 1 + len(vision.deepstack_visual_indexes)
    merger = mergers * square * (square + vision.out_hidden_size) / merge**2
    patches = [int(one["image_grid_thw"].prod()) for one in given]
    total = 6 * (vision.depth * layer + merger + width * given[0]["pixel_values"].size(1))
    attention = 12 * vision.depth * width * sum(count**2 for count in patches)
    return float(total * sum(patches) + attention)


CASES = {
    "llava": Case(
        family="llava",
        sizes={"tiny": _TINY, "2b": Size(lengths=_LONG)},
        configuration=llava_configuration,
        conversations=llava_conversations,
        media_flops=llava_flops,
    ),
    "qwen3_vl": Case(
        family="qwen3_vl",
        sizes={"tiny": _TINY, "2b": Size(lengths=_LONG), "4b": Size(lengths=_LONG)},
        configuration=qwen3_vl_configuration,
        conversations=qwen3_vl_conversations,
        media_flops=qwen3_vl_flops,
    ),
}
