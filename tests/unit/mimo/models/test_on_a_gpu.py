"""Packed rows of every family on a GPU: nothing waits for it, and lean layers compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mimo.models import family_names, load_family

LAYERS = [
    pytest.param("local", marks=pytest.mark.gpu),
    pytest.param("transformer_engine", marks=pytest.mark.te),
]
# Megatron's dispatcher of experts reads the number of each expert's tokens.
WITHOUT_EXPERTS = [name for name in family_names() if not name.endswith("_moe")]


_ALLOWED_IN_BF16 = 0.05  # relative, of gradients that were rounded on two ways


def build(name: str, layers: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A tiny model, and the arguments of its forward pass for a packed row of four samples."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.data import PackingCollator
    from megatron.mimo.data.micro_batches.batch import keep_for_stage
    from megatron.mimo.data.micro_batches.broadcast import move
    from megatron.mimo.training.forward_step import model_inputs

    family = load_family(name)
    config = family.tiny()
    changes = {"transformer_impl": layers, "gradient_accumulation_fusion": False}
    settings = model_settings(family, config, dtype=dtype, changes=changes)
    torch.manual_seed(5)
    model = build_model(family, config, settings, device=device).train()
    generator = torch.Generator().manual_seed(3)
    samples = [family.sample(config, family.example(config, generator)) for _ in range(4)]
    media = family.media(config)
    collator = PackingCollator(
        seq_length=sum(len(sample.token_ids) for sample in samples) + 3,
        vocab_size=settings.tokens,
        pad_id=0,
        special_token_ids=media.special_token_ids,
        media_formats=media.formats,
        span_modalities=media.spans,
        mrope=media.mrope,
    )
    batch = keep_for_stage(collator(samples), pre_process=True, post_process=True, dtype=dtype)
    batch = move(batch, device)
    return model, model_inputs(batch, labels=batch["labels"])


def step(model: Any, inputs: dict[str, Any]) -> Tensor:
    losses_BS, mask_BS = model(**inputs)
    loss: Tensor = (losses_BS * mask_BS).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.filterwarnings("ignore:flash-linear-attention is installed")  # and refuses
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_nothing_waits_for_the_device(name: str, layers: str) -> None:
    from megatron.mimo.arguments.standalone import process_groups

    with process_groups() as device:
        model, inputs = build(name, layers, torch.bfloat16, device)
        step(model, inputs)  # compiles kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = step(model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "qwen2_audio"])
def test_lean_layers_equal_megatron_cores(
    name: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.mimo.arguments.standalone import process_groups
    from megatron.mimo.layers.lean import LeanLayer

    with process_groups() as device:
        # Transformer Engine attends to packed rows in half precision alone.
        dtype, allowed = (
            (torch.float32, 1e-4) if layers == "local" else (torch.bfloat16, _ALLOWED_IN_BF16)
        )
        model, inputs = build(name, layers, dtype, device)
        read = LeanLayer._lean_reading
        lean: list[bool] = []

        def remembered(layer: LeanLayer, given: dict[str, Any]) -> Any:
            lean.append(read(layer, given) is not None)
            return read(layer, given)

        found = []
        for function in (remembered, lambda *_: None):
            monkeypatch.setattr(LeanLayer, "_lean_reading", function)
            model.zero_grad()
            loss = step(model, inputs)
            gradients = {
                key: weight.grad.clone()
                for key, weight in model.named_parameters()
                if weight.grad is not None
            }
            found.append((loss, gradients))
        assert lean
        assert all(lean)
        (loss, gradients), (expected, others) = found
        torch.testing.assert_close(loss, expected, rtol=allowed / 10, atol=0)
        for key, gradient in gradients.items():
            wide, other = gradient.float(), others[key].float()
            error = (wide - other).norm() / other.norm().clamp(min=1e-6)
            assert error < allowed, f"{key}: {error:.1e}"
