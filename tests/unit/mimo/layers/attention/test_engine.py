"""Transformer Engine's attention: asked once for the layers of a packed row."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.models.mimo.partition.packing import PackedRow, packed_params
from megatron.core.transformer.enums import AttnMaskType
from megatron.mimo.layers.attention.engine import EngineAttention, is_engine

LENGTHS = (5, 1, 9)
H, G, D = 4, 2, 8


class Fused(nn.Module):
    """A part that attends inside each document with what its layer was made with."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        assert named["fp8_meta"] == {"scale": self.scale}  # the layer's own
        sums = named["cu_seqlens_q"].tolist()
        behind = named["window_size"][0]
        outs = []
        for start, stop in itertools.pairwise(sums):
            q_HSD, k_GSD, v_GSD = (one[start:stop].transpose(0, 1) for one in (q, k, v))
            seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            if behind >= 0:
                seen = seen.triu(-behind)
            out = F.scaled_dot_product_attention(
                q_HSD, k_GSD, v_GSD, attn_mask=seen, scale=self.scale, enable_gqa=True
            )
            outs.append(out.transpose(0, 1))
        return torch.cat(outs).flatten(1)


class TEDotProductAttention(nn.Module):
    """In the form of Transformer Engine's module, which there is none of on a CPU."""

    def __init__(
        self, scale: float, window: tuple[int, int] = (-1, 0), trim: int | None = None
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_parallel_size=1)
        self.flash_attention, self.fused_attention = Fused(scale), Fused(scale)
        self.window_size, self.fp8_meta, self.trim = window, {"scale": scale}, trim
        self.asked = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, attn_mask_type: Any, **given: Any
    ) -> Tensor:
        assert mask is None
        assert attn_mask_type == AttnMaskType.causal
        self.asked += 1
        out: Tensor = self.fused_attention(
            q,
            k,
            v,
            cu_seqlens_q=given["packed_seq_params"].cu_seqlens_q,
            window_size=self.window_size,
            fp8=False,
            fp8_meta=self.fp8_meta,
        )
        return out if self.trim is None else out[..., : self.trim]


def row() -> PackedRow:
    sums = [0, *itertools.accumulate(LENGTHS)]
    made = packed_params({"cu_seqlens_q": sums}, tokens=sum(LENGTHS), device=torch.device("cpu"))
    assert made is not None
    return made


def heads(seed: int, *, strided: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, D, generator=generator) for n in (H, G, G))
    if strided:
        q = q.repeat_interleave(2, dim=1)[:, ::2]
    return [one.requires_grad_() for one in (q, k, v)]


def outcome(attend: Any, packed: PackedRow, tensors: list[Tensor]) -> list[Tensor]:
    out = attend(*tensors, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_layers_of_a_row_share_the_answer(strided: bool) -> None:
    cores = [TEDotProductAttention(scale) for scale in (0.3, 0.5, 0.7)]
    assert is_engine(cores[0])
    attentions = [EngineAttention(core) for core in cores]
    for number, packed in enumerate((row(), row()), start=1):  # two micro-batches
        for seed, (core, attend) in enumerate(zip(cores, attentions, strict=True)):
            tensors = heads(seed, strided=strided)
            found = outcome(attend, packed, tensors)
            expected = outcome(TEDotProductAttention(core.fused_attention.scale), packed, tensors)
            for got, want in zip(found, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
        asked = [core.asked for core in cores]
        assert asked == ([number] * 3 if strided else [number, 0, 0])
    assert not any(core.fused_attention._forward_hooks for core in cores)


def test_what_differs_is_asked_for_itself() -> None:
    plain, windowed = TEDotProductAttention(0.3), TEDotProductAttention(0.3, (2, 0))
    trimmed = TEDotProductAttention(0.3, (3, 0), trim=H * D - 1)
    packed, tensors = row(), heads(1)
    for _ in range(2):
        for core in (plain, windowed, trimmed):
            outcome(EngineAttention(core), packed, tensors)
    assert (plain.asked, windowed.asked) == (1, 1)
    assert trimmed.asked == 2  # what its part returns is not the result
    plain.eval()
    outcome(EngineAttention(plain), packed, tensors)
    assert plain.asked == 2


def test_a_row_keeps_no_activations() -> None:
    packed, tensors = row(), heads(1)
    kept = [weakref.ref(one) for one in tensors]
    outcome(EngineAttention(TEDotProductAttention(0.3)), packed, tensors)
    assert packed.kernel_calls
    del tensors
    gc.collect()
    assert not any(one() is not None for one in kept)


@pytest.mark.te
def test_equals_transformer_engine() -> None:
    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.models import load_family

    family = load_family("llava")
    config = family.tiny()
    changes = {"transformer_impl": "transformer_engine", "gradient_accumulation_fusion": False}
    with process_groups() as device:
        settings = model_settings(family, config, dtype=torch.bfloat16, changes=changes)
        model = build_model(family, config, settings, device=device).train()
        cores = [
            one for name, one in model.named_modules() if is_engine(one) and "language" in name
        ]
        assert len(cores) >= 2
        asked: list[int] = []
        for core in cores:
            core.register_forward_pre_hook(lambda *_: asked.append(1))
        core = cores[0]
        n, g = core.num_attention_heads, core.num_gqa_groups
        size = core.hidden_size_per_attention_head_k
        lengths = (577, 70, 900, 5)
        sums = [0, *itertools.accumulate(lengths)]
        packed = packed_params({"cu_seqlens_q": sums}, tokens=sums[-1], device=device)
        assert packed is not None
        generator = torch.Generator(device).manual_seed(1)
        for core in cores:
            tensors = [
                torch.randn(
                    sums[-1], count, size, generator=generator, device=device, dtype=torch.bfloat16
                ).requires_grad_()
                for count in (n, g, g)
            ]
            found = outcome(EngineAttention(core), packed, tensors)
            before = len(asked)
            expected = outcome(core, packed, tensors)
            assert len(asked) == before + 1
            for got, want in zip(found, expected, strict=True):
                error = (got.float() - want.float()).norm() / want.float().norm()
                assert error < 1e-3  # atomic sums of the gradient of queries
        assert len(asked) == 1 + len(cores)
        assert math.isclose(found[0].float().norm().item(), expected[0].float().norm().item())
