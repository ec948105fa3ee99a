"""Qwen2-Audio's encoder on clips of different lengths, beside transformers'.

    python benchmarks/audio.py            # a table
    python benchmarks/audio.py --json     # one JSON object

transformers encodes the whole window of 30 seconds for every clip and masks what is silence; here
clips are packed and only their own frames are encoded. Both have the same weights, run forward and
backward on the same clips, and are checked to give the same rows and gradients before anything is
timed. Times are medians of interleaved repetitions, on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from alignment import median_ms, start_megatron
from torch import Tensor

FRAMES_PER_SECOND, WINDOW, MELS = 100, 3000, 128


def make_reference(args: argparse.Namespace) -> Any:
    """The encoder of transformers, with random weights."""
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    torch.manual_seed(0)
    config = Qwen2AudioEncoderConfig(
        d_model=args.hidden,
        encoder_layers=args.layers,
        encoder_attention_heads=args.hidden // 64,
        encoder_ffn_dim=4 * args.hidden,
    )
    return Qwen2AudioEncoder(config)


def make_encoder(reference: Any) -> Any:
    """Ours with the same weights, and its parameters by their names in transformers."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.models.common.audio_tower import audio_entries, audio_spec
    from megatron.mimo.models.common.place import Place

    language = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=1, use_cpu_initialization=True,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    place = Place(groups=groups)
    encoder = build_module(audio_spec(reference.config, language, place))
    weights, ours = reference.state_dict(), encoder.state_dict()
    with torch.no_grad():
        for row in audio_entries(reference.config, mimo="", hf=""):
            for one in row.each():
                parameter = one.transform.to_mimo([weights[name] for name in one.hf])
                ours[one.mimo].copy_(parameter)
    return encoder


def run_reference(
    encoder: Any, clips_NMF: Tensor, lengths: list[int], weights_NH: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward as ``Qwen2AudioModel`` does them."""
    counts_N, rows_N = encoder._get_feat_extract_output_lengths(torch.tensor(lengths))
    hidden_NP = torch.arange(WINDOW // 2) >= counts_N[:, None]
    mask = torch.zeros(len(lengths), 1, WINDOW // 2, WINDOW // 2)
    mask.masked_fill_(hidden_NP[:, None, None], -torch.inf)
    kept_NP = torch.arange(WINDOW // 4) < rows_N[:, None]

    def run() -> Tensor:
        encoder.zero_grad()
        rows_NH: Tensor = encoder(clips_NMF, attention_mask=mask).last_hidden_state[kept_NP]
        (rows_NH * weights_NH).sum().backward()
        return rows_NH.detach()

    return run


def run_ours(
    encoder: Any, clips_NMF: Tensor, lengths: list[int], weights_NH: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward on the frames that matter."""
    from megatron.mimo.encoders.whisper import frames_needed

    clips = [
        clip_MF[:, : frames_needed(length, WINDOW)]
        for clip_MF, length in zip(clips_NMF, lengths, strict=True)
    ]

    def run() -> Tensor:
        encoder.zero_grad()
        rows_NH: Tensor = encoder(clips, lengths)
        (rows_NH * weights_NH).sum().backward()
        return rows_NH.detach()

    return run


def check_equal(runs: dict[str, Callable[[], Tensor]], encoder: Any, reference: Any) -> None:
    """Refuse to time two sides that do not compute the same."""
    theirs, ours = runs["transformers"](), runs["ours"]()
    difference = (theirs - ours).abs().max().item()
    wanted = reference.conv1.weight.grad
    error = ((encoder.conv1.weight.grad - wanted).norm() / wanted.norm()).item()
    if not difference < 1e-4 or not error < 1e-3:
        raise SystemExit(
            f"the two encoders differ: rows by {difference:.1e}, the first layer's gradient by "
            f"{error:.1e} relatively"
        )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Times of both, and how much of the windows is sound."""
    start_megatron()
    torch.set_num_threads(1)
    reference = make_reference(args)
    encoder = make_encoder(reference)
    generator = torch.Generator().manual_seed(1)
    shortest, longest = (int(seconds * FRAMES_PER_SECOND) for seconds in args.seconds)
    lengths = torch.randint(shortest, longest + 1, (args.clips,), generator=generator).tolist()
    clips_NMF = torch.randn(args.clips, MELS, WINDOW, generator=generator)
    weights_NH = torch.randn(
        sum(encoder.rows_of(length) for length in lengths), args.hidden, generator=generator
    )
    runs = {
        "transformers": run_reference(reference, clips_NMF, lengths, weights_NH),
        "ours": run_ours(encoder, clips_NMF, lengths, weights_NH),
    }
    check_equal(runs, encoder, reference)
    times = median_ms(runs, args.repeats)
    return {
        "clips": args.clips,
        "seconds": [length / FRAMES_PER_SECOND for length in lengths],
        "sound_share": sum(lengths) / (args.clips * WINDOW),
        "times_faster": times["transformers"] / times["ours"],
        "ms": times["ours"],
        "transformers_ms": times["transformers"],
    }


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(2, 14), help="shortest and longest clip"
    )
    parser.add_argument("--hidden", type=int, default=256, help="width; a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    result = compare(parser.parse_args())
    if parser.parse_args().json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    main()
