"""Generation with a cache, against running whole sequences again and against transformers.

    python benchmarks/generation.py            # a table
    python benchmarks/generation.py --json     # one JSON object

A LLaVA of random weights (``--hidden``, ``--layers``) answers prompts with two images each,
greedily, always to the full length; all sides have the same weights and give the same tokens,
which is checked first. ``prefill`` is an answer of one token. Times are medians of interleaved
repetitions on one thread (on CPU the process's own time, which others on the machine disturb less);
``times_faster`` are medians of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
from megatron.mimo.checkpoints.weights import load_hugging_face
from megatron.mimo.inference import Generator, SamplingOptions
from megatron.mimo.models import load_family
from megatron.mimo.models.common.family import sample_collator

Tokens = list[list[int]]
IMAGE_SIDE, PATCH = 112, 14


def make_config(args: argparse.Namespace) -> Any:
    """A LLaVA with 64 rows per image."""
    family = load_family("llava")
    config = family.tiny()
    config.text_config.hidden_size = args.hidden
    config.text_config.intermediate_size = 3 * args.hidden
    config.text_config.num_hidden_layers = args.layers
    config.text_config.num_attention_heads = args.hidden // 64
    config.text_config.num_key_value_heads = args.hidden // 128
    config.text_config.head_dim = 64
    config.text_config.max_position_embeddings = 2048
    config.vision_config.image_size, config.vision_config.patch_size = IMAGE_SIDE, PATCH
    return config


def make_prompts(config: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What transformers takes: prompts of one length, as its batches are without padding."""
    rows = (IMAGE_SIDE // PATCH) ** 2
    token = config.image_token_index
    ids_BL = torch.randint(20, 200, (args.batch, 2 * rows + args.text))
    for start in (4, 8 + rows):
        ids_BL[:, start : start + rows] = token
    pixels = torch.randn(2 * args.batch, 3, IMAGE_SIDE, IMAGE_SIDE)
    return {
        "input_ids": ids_BL,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(ids_BL),
    }


def make_sides(
    args: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[int], Tokens]]:
    """Functions from a number of new tokens to the answers."""
    family, config = load_family("llava"), make_config(args)
    theirs = family.reference(config).eval().to(device)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    settings = model_settings(family, config, changes={"transformer_impl": "local"})
    ours = build_model(family, config, settings, device=device)
    load_hugging_face(ours, theirs.state_dict(), family.keys(config))
    features = make_prompts(config, args)
    prompts = [
        family.sample(
            config,
            {
                "input_ids": features["input_ids"][i : i + 1],
                "pixel_values": features["pixel_values"][2 * i : 2 * i + 2],
            },
        )
        for i in range(args.batch)
    ]
    media = family.media(config)
    collate = sample_collator(family, config, seq_length=2048, vocab_size=settings.tokens)

    def generator(*, use_cache: bool) -> Callable[[int], Tokens]:
        generate = Generator(
            ours,
            collate,
            vocab_size=settings.tokens,
            batch_size=args.batch,
            use_cache=use_cache,
        )
        return lambda length: generate(prompts, SamplingOptions(max_new_tokens=length))

    @torch.no_grad()
    def transformers(length: int) -> Tokens:
        whole = theirs.generate(
            **{name: value.to(device) for name, value in features.items()},
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=sorted(media.special_token_ids.values()),
        )
        answers: Tokens = whole[:, features["input_ids"].size(1) :].tolist()
        return answers

    return {
        "cache": generator(use_cache=True),
        "whole_sequences": generator(use_cache=False),
        "transformers": transformers,
    }


def measure(
    sides: dict[str, Callable[[int], Tokens]], length: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each repetition, the sides in turn and each round in another order."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            start = clock()
            sides[name](length)
            if number:  # the first is for warming up
                times[name].append(clock() - start)
    return times


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how many times faster generation with a cache is than each other side."""
    ratios = {
        name: statistics.median(
            other / own for other, own in zip(values, times["cache"], strict=True)
        )
        for name, values in times.items()
        if name != "cache"
    }
    return {
        "seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "times_faster": {name: round(ratio, 2) for name, ratio in ratios.items()},
    }


def main() -> None:
    """Measure prefill and whole answers, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=64, help="tokens of a prompt besides images")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with process_groups() as device:
        sides = make_sides(args, device)
        answers = {name: side(args.new_tokens) for name, side in sides.items()}
        assert answers["cache"] == answers["whole_sequences"] == answers["transformers"]
        result = {
            "answer": report(measure(sides, args.new_tokens, args.repeats, device)),
            "prefill": report(measure(sides, 1, args.repeats, device)),
            "settings": {
                "hidden": args.hidden,
                "layers": args.layers,
                "batch": args.batch,
                "prompt_tokens": 2 * (IMAGE_SIDE // PATCH) ** 2 + args.text,
                "new_tokens": args.new_tokens,
                "device": device.type,
            },
        }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for part in ("answer", "prefill"):
        print(part)
        for name, seconds in result[part]["seconds"].items():
            faster = result[part]["times_faster"].get(name)
            note = "" if faster is None else f"{faster:8.2f} times as long as with a cache"
            print(f"  {name:18s}{seconds:10.3f} s{note}")


if __name__ == "__main__":
    main()
