"""LLaVA in the sizes of the benchmark, its conversations, and its loss on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "SIZES",
    "Loss",
    "configuration",
    "conversations",
    "our_losses",
    "real_flops",
    "reference",
    "theirs",
]

# Text lengths of the conversations, in tokens; an image's rows come on top.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": (128, 512, 4, 4, 56, 14),  # hidden, ffn, layers, heads, image, patch
        "text": (256, 704, 4, 8, 8, 2000),  # hidden, ffn, layers, heads, groups, vocabulary
        "lengths": (16, 24, 40, 48, 64, 96, 160, 240),
        "dtype": torch.float32,
    },
    "2b": {
        "vision": (1024, 4096, 24, 16, 336, 14),
        "text": (2048, 5632, 32, 16, 16, 32064),
        "lengths": (64, 96, 128, 192, 256, 384, 768, 1440),
        "dtype": torch.bfloat16,
    },
}
_IMAGE_TOKEN = 4

Loss = Callable[[], Tensor]


def configuration(size: str) -> Any:
    """The ``LlavaConfig`` of a size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = SIZES[size]
    hidden, ffn, layers, heads, image, patch = sizes["vision"]
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
    )
    hidden, ffn, layers, heads, groups, vocabulary = sizes["text"]
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
        image_token_index=_IMAGE_TOKEN,
        architectures=["LlavaForConditionalGeneration"],
    )


def conversations(config: Any, lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """One image and some text each, in the form that Hugging Face's model takes."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(1)
    rows = (vision.image_size // vision.patch_size) ** 2
    shape = (1, 3, vision.image_size, vision.image_size)
    found = []
    for length in lengths:
        text = torch.randint(5, config.text_config.vocab_size, (length,), generator=generator)
        tokens = torch.cat([text[:4], torch.full((rows,), _IMAGE_TOKEN), text[4:]])
        pixels = torch.randn(shape, generator=generator)
        found.append({"input_ids": tokens[None], "pixel_values": pixels})
    return found


def reference(config: Any, device: Any, dtype: Any) -> Any:
    """The model of transformers, made on the device: the same weights in every process."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(1)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.to(device, dtype).train()


def theirs(model: Any, given: list[dict[str, Tensor]], device: Any, dtype: Any) -> Loss:
    """A function that gives transformers' loss of the padded conversations."""
    longest = max(one["input_ids"].size(1) for one in given)
    shape = (len(given), longest)
    ids, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), None
    for row, one in enumerate(given):
        length = one["input_ids"].size(1)
        ids[row, :length], mask[row, :length] = one["input_ids"][0], 1
    labels = ids.masked_fill((ids == _IMAGE_TOKEN) | (mask == 0), -100).to(device)
    pixels = torch.cat([one["pixel_values"] for one in given]).to(device, dtype)
    ids, mask = ids.to(device), mask.long().to(device)

    def loss() -> Tensor:
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
        value: Tensor = output.loss
        return value

    return loss


def our_losses(size: str, model: Any, device: Any) -> dict[str, Loss]:
    """Our losses of the conversations, packed and padded."""
    from megatron.mimo.data import PackingCollator, SampleCollator
    from megatron.mimo.models import load_family

    family, config = load_family("llava"), configuration(size)
    given = conversations(config, SIZES[size]["lengths"])
    samples = [family.sample(config, one) for one in given]
    lengths = [len(sample.token_ids) for sample in samples]
    media = family.media(config)
    settings: dict[str, Any] = {
        "vocab_size": config.text_config.vocab_size,
        "pad_id": 0,
        "special_token_ids": media.special_token_ids,
        "media_formats": media.formats,
    }
    batches = {
        "padded": SampleCollator(seq_length=max(lengths), **settings)(samples),
        "packed": PackingCollator(seq_length=sum(lengths), **settings)(samples),
    }
    dtype = SIZES[size]["dtype"]
    return {name: _ours(model, batch, device, dtype) for name, batch in batches.items()}


def _ours(model: Any, batch: dict[str, Any], device: Any, dtype: Any) -> Loss:
    """A function that gives our loss of a collated micro-batch."""
    from megatron.mimo.data.batch import keep_for_stage
    from megatron.mimo.data.broadcast import move
    from megatron.mimo.training.forward_step import model_inputs

    batch = move(keep_for_stage(batch, pre_process=True, post_process=True, dtype=dtype), device)

    def loss() -> Tensor:
        losses_BS, mask_BS = model(**model_inputs(batch, labels=batch["labels"]))
        value: Tensor = (losses_BS.float() * mask_BS).sum() / mask_BS.sum()
        return value

    return loss


def real_flops(config: Any, lengths: list[int]) -> float:
    """Floating-point operations of forward and backward that real tokens need, padding none."""
    text, vision = config.text_config, config.vision_config
    hidden, share = text.hidden_size, text.num_key_value_heads / text.num_attention_heads
    layer = hidden * hidden * (2 + 2 * share) + 3 * hidden * text.intermediate_size
    weights = text.num_hidden_layers * layer + hidden * text.vocab_size
    total = 6 * weights * sum(lengths)
    total += 6 * text.num_hidden_layers * hidden * sum(length**2 for length in lengths)
    patches = (vision.image_size // vision.patch_size) ** 2
    rows, width, layers = patches + 1, vision.hidden_size, vision.num_hidden_layers - 1
    one = 6 * layers * rows * (4 * width * width + 2 * width * vision.intermediate_size)
    one += 12 * layers * width * rows**2 + 6 * patches * (width + hidden) * hidden
    return float(total + one * len(lengths))
