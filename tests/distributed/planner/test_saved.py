"""The formulas of what layers keep, beside what autograd keeps of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.rank_pool import RankPool, model_parallel

FAMILIES = ("llava", "qwen3_vl_moe", "qwen3_5", "gemma3", "internvl", "qwen2_audio")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "mlp", "layernorm"],
}


def compared(
    name: str, dtype: torch.dtype, changes: Mapping[str, object], frozen: tuple[str, ...] = ()
) -> dict[str, tuple[float, float]]:
    """Planned and kept bytes of the encoders, the layers and what is behind them."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.data.micro_batches.batch import LABEL_ROWS, keep_for_stage
    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.family import sample_collator
    from megatron.mimo.planner.activations import Recomputation, kept_by_chunk
    from megatron.mimo.planner.estimate import described
    from megatron.mimo.planner.saved import Kernels
    from megatron.mimo.training.forward_step import model_inputs

    model_parallel()
    family = load_family(name)
    config = family.tiny()
    settings = model_settings(family, config, dtype=dtype, changes=changes)
    model = build_model(family, config, settings, device=torch.device("cpu")).train()
    model.freeze(*frozen)
    generator = torch.Generator().manual_seed(5)
    samples = [family.sample(config, family.example(config, generator)) for _ in range(2)]
    vocab_size = config.get_text_config().vocab_size
    batch = sample_collator(family, config, seq_length=128, vocab_size=vocab_size)(samples)
    kept = keep_for_stage(batch, pre_process=True, post_process=True, dtype=dtype)
    by_part = Counter[str]()
    with kept_by_part(model, by_part):
        model(**model_inputs(kept, labels=kept["labels"]), label_rows=kept[LABEL_ROWS])
    recomputation = Recomputation(
        granularity=settings.transformer.recompute_granularity,
        method=settings.transformer.recompute_method,
        layers=settings.transformer.recompute_num_layers or 1,
        modules=frozenset(settings.transformer.recompute_modules or ()),
    )
    found = kept_by_chunk(model, described(model, batch), recomputation, Kernels())
    return {
        "encoders": (sum(found.encoders.values()), by_part["encoders"]),
        "layers": (found.layers, by_part["layers"]),
        "ends": (found.ends, by_part["ends"]),
    }


@contextmanager
def kept_by_part(model: nn.Module, by_part: Counter[str]) -> Iterator[None]:
    """Adds up what is saved, by where in the model it is, as it stands in the end.

    What is recomputed in place of being kept is saved first, and emptied then.
    """
    inside: list[str] = []
    held: dict[int, tuple[str, torch.Tensor]] = {}
    # Not by address: that of a storage that was emptied is another's soon.
    tensors = (*model.parameters(), *model.buffers())
    apart = {one.untyped_storage()._cdata for one in tensors}
    for path, module in model.named_modules():
        if ".layers." in path and not path.rpartition(".")[2].isdigit():
            continue  # a hook inside a layer changes how it is computed
        module.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
        module.register_forward_hook(lambda *_: (inside.pop(), None)[1])

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = inside[-1] if inside else ""
        part = "layers" if "language_model.decoder" in at else "ends"
        part = "encoders" if at.startswith("modality") else part
        key = tensor.untyped_storage()._cdata
        if key not in apart:
            held.setdefault(key, (part, tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        yield
    for part, tensor in held.values():
        by_part[part] += tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer(ranks: RankPool, name: str) -> None:
    (found,) = ranks(1)(compared, name, torch.float32, {})
    check(found)


def test_half_precision_recomputation_and_frozen_parts(ranks: RankPool) -> None:
    check(ranks(1)(compared, "qwen3_vl_moe", torch.bfloat16, {})[0])
    check(ranks(1)(compared, "llava", torch.float32, FULL)[0])
    check(ranks(1)(compared, "llava", torch.float32, SELECTIVE)[0])
    check(ranks(1)(compared, "llava", torch.float32, {}, ("language", "images.encoders"))[0])


def check(found: Mapping[str, tuple[float, float]]) -> None:
    for part, (planned, kept) in found.items():
        assert planned == pytest.approx(kept, rel=0.08, abs=4096), part


def test_the_benchmark_of_two_billion_parameters(ranks: RankPool) -> None:
    """What one H200 took for it (docs/benchmarks.md), with bf16 weights and moments."""
    for (tokens, measured), got in zip(
        ((7936, 34.6e9), (16128, 53.7e9)), ranks(1)(two_billion)[0], strict=True
    ):
        assert got == pytest.approx(measured, rel=0.15), tokens


def two_billion() -> list[float]:
    """Bytes packed and padded."""
    from benchmarks.step_cases import CASES
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.encoders.work import EncoderWork
    from megatron.mimo.models import load_family
    from megatron.mimo.planner.activations import MicroBatch, Recomputation, kept_by_chunk
    from megatron.mimo.planner.saved import Kernels

    model_parallel()
    case = CASES["llava"]
    family, config = load_family(case.family), case.configuration("2b")
    lengths = [one["input_ids"].size(1) for one in case.given("2b")]
    settings = model_settings(family, config, dtype=torch.bfloat16)
    model = build_model(family, config, settings, device=torch.device("meta")).train()
    encoder = model.modality_submodules["images"].encoders["clip"]
    pixels = torch.empty(len(lengths), 3, 336, 336, device="meta")
    work: EncoderWork = encoder.work(pixel_values=pixels)
    weights = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for tokens in (sum(lengths), len(lengths) * max(lengths)):
        batch = MicroBatch(
            tokens=tokens,
            positions=tokens,
            works={"images": {"clip": work}},
            rows={"images": work.rows},
        )
        kernels = Kernels(on_gpu=True, engine=True)
        kept = kept_by_chunk(model, batch, Recomputation(), kernels)
        found.append(3 * 2 * weights + kept.kept + kept.working)
    return found
