"""A training step of LLaVA beside transformers': ``python benchmarks/llava.py [--json]``.

The same model, from the same Hugging Face configuration with random weights, is trained on the same
conversations (one image each, texts of very different lengths) in three ways:

- ``packed``: ours, the conversations side by side in rows without padding;
- ``padded``: ours, one conversation per row, padded to the longest;
- ``transformers``: theirs, padded in the same way, with ``attention_mask``.

A step is forward, backward and AdamW, after which the weights have changed. Times are medians over
rounds in which the three take turns in one process; ``memory_gb`` is what a step takes at its peak
and the model's own weights and optimizer state, and is left out on CPU. ``same_loss`` says how far
the three losses of the first step are apart, relatively: the same weights, the same batch.

``--size 2b`` (bf16) wants a GPU; ``--size tiny``, the default without one, is small enough for a
laptop and says nothing about the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.mimo.backend import select_backend

# Text lengths of the conversations, in tokens; an image's rows come on top.
_SIZES: dict[str, dict[str, Any]] = {
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


def configuration(size: str) -> Any:
    """The ``LlavaConfig`` of a size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = _SIZES[size]
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


def theirs(model: Any, given: list[dict[str, Tensor]], device: Any, dtype: Any) -> Any:
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


def ours(model: Any, batch: dict[str, Any], device: Any, dtype: Any) -> Callable[[], Tensor]:
    """A function that gives our loss of a collated micro-batch."""
    from megatron.mimo.training.broadcast import move
    from megatron.mimo.training.data import stage_part
    from megatron.mimo.training.step import model_inputs

    batch = move(stage_part(batch, pre_process=True, post_process=True, dtype=dtype), device)

    def loss() -> Tensor:
        losses_BS, mask_BS = model(**model_inputs(batch, labels=batch["labels"]))
        value: Tensor = (losses_BS.float() * mask_BS).sum() / mask_BS.sum()
        return value

    return loss


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: Any) -> Any:
    """One training step: its loss, seconds, and bytes above those before it (0 on CPU)."""
    accelerated = device.type != "cpu"
    before = 0
    if accelerated:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if accelerated:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if accelerated else 0
    return float(value), seconds, peak


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and optimizer state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in (*weights, *kept))


def measure(size: str, rounds: int) -> dict[str, Any]:
    """The report of one size."""
    from megatron.mimo.convert.load import load_hugging_face
    from megatron.mimo.data import PackingCollator, SampleCollator
    from megatron.mimo.models import load_family
    from megatron.mimo.models.standalone import build_model, model_arguments, process_groups

    family, config = load_family("llava"), configuration(size)
    dtype = _SIZES[size]["dtype"]
    given = conversations(config, _SIZES[size]["lengths"])
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
        "packed": PackingCollator(seq_length=sum(lengths), **settings)(samples),
        "padded": SampleCollator(seq_length=max(lengths), **settings)(samples),
    }
    with process_groups() as device:
        args = model_arguments(family, config, dtype=dtype)
        torch.manual_seed(1)
        reference = family.reference(config).to(device, dtype).train()
        models: dict[str, Any] = {"transformers": reference}
        losses = {"transformers": theirs(reference, given, device, dtype)}
        for name, batch in batches.items():
            models[name] = build_model(family, config, args, device=device).train()
            load_hugging_face(models[name], reference.state_dict(), family.keys(config))
            losses[name] = ours(models[name], batch, device, dtype)
        optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()
        }
        return _report(losses, optimizers, lengths, rounds, device) | {
            "parameters": sum(parameter.numel() for parameter in reference.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
        }


def _report(losses: Any, optimizers: Any, lengths: list[int], rounds: int, device: Any) -> Any:
    steps: dict[str, list[Any]] = {name: [] for name in losses}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            steps[name].append(step(loss, optimizers[name], device))
    first = [made[0][0] for made in steps.values()]
    report: dict[str, Any] = {
        "tokens": sum(lengths),
        "padded_tokens": len(lengths) * max(lengths),
        "same_loss": max(abs(value / first[0] - 1) for value in first),
    }
    baseline = [seconds for _, seconds, _ in steps["transformers"][1:]]
    for name, made in steps.items():
        timed = made[1:]
        row = {
            "step_ms": round(1e3 * statistics.median(seconds for _, seconds, _ in timed), 2),
            "speedup": round(
                statistics.median(
                    other / seconds for other, (_, seconds, _) in zip(baseline, timed, strict=True)
                ),
                2,
            ),
        }
        if device.type != "cpu":
            peak = max(peak for *_, peak in timed) + held(optimizers[name])
            row["memory_gb"] = round(peak / 1e9, 2)
        report[name] = row
    return report


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--size", choices=_SIZES, help="tiny without a GPU, 2b with one")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    backend = select_backend()
    size = arguments.size or ("tiny" if backend == "cpu" else "2b")
    report = measure(size, arguments.rounds) | {"size": size, "torch": torch.__version__}
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    for name in ("transformers", "padded", "packed"):
        sys.stdout.write(f"{name:<14}{report[name]['step_ms']:>10.1f} ms")
        sys.stdout.write(f"{report[name]['speedup']:>8.2f} x transformers\n")


if __name__ == "__main__":
    main()
