"""A layer computed in a dozen calls equals megatron-core's, and gives way where it has to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.rank_pool import RankPool, model_parallel

_DOCUMENTS = [0, 5, 12, 13, 21]
_SAMPLES = ("plain", "quick")  # samples of one length, not packed
_TURNED = ("turned", "language")  # with rotary angles


def build(kind: str, groups: Any, **changes: Any) -> Any:
    """A layer of each shape that there is: a plain encoder's, a gated one's, a language model's."""
    from megatron.core.activations import quick_gelu
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import encoder_layer_spec, language_layer_spec

    common: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "init_method_std": 0.3,
    }
    shapes: dict[str, dict[str, Any]] = {
        "plain": {"normalization": "LayerNorm", "bias_activation_fusion": False},
        "gated": {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "bias_activation_fusion": True,
        },
        "quick": {
            "normalization": "LayerNorm",
            "activation_func": quick_gelu,
            "bias_activation_fusion": False,
        },
        "language": {
            "normalization": "RMSNorm",
            "num_query_groups": 2,
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "bias_activation_fusion": True,
        },
    }
    shapes["turned"] = {**shapes["language"], "qk_layernorm": False}
    config = TransformerConfig(**{**common, **shapes[kind], **changes})
    spec = (language_layer_spec if kind in _TURNED else encoder_layer_spec)(config)
    (layer_spec,) = spec.submodules.layer_specs
    torch.manual_seed(3)
    return build_module(layer_spec, config=config, layer_number=1, pg_collection=groups)


def arguments(kind: str) -> dict[str, Any]:
    from megatron.core.models.mimo.partition.packing import packed_params

    generator = torch.Generator().manual_seed(5)
    tokens, samples = (_DOCUMENTS[-1], 1) if kind not in _SAMPLES else (7, 3)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(tokens, samples, 32, generator=generator),
        "attention_mask": None,
    }
    if kind not in _SAMPLES:
        given["packed_seq_params"] = packed_params({"cu_seqlens_q": _DOCUMENTS}, tokens=tokens)
    if kind in _TURNED:
        angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        given["rotary_pos_emb"] = torch.cat([angles, angles], dim=1)[:, None, None]
    return given


def run(layer: Any, given: dict[str, Any], forward: Any) -> dict[str, Tensor]:
    """The output and every gradient."""
    hidden = given["hidden_states"].clone().requires_grad_()
    layer.zero_grad()
    out, _ = forward(**{**given, "hidden_states": hidden})
    assert out._base is None  # a pipeline stage frees its output once it is sent
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    found = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **found}


def compare(kind: str) -> dict[str, float]:
    """Relative distances from megatron-core's pass, whose rotation goes document by document."""
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.mimo.layers.fused import activate
    from megatron.mimo.layers.lean import norms
    from megatron.mimo.layers.lean.reading import read_layer

    layer, given = build(kind, model_parallel()), arguments(kind)
    assert layer._lean_reading(given) is not None
    assert getattr(layer._reading.act, "func", None) in (F.gelu, activate)  # in one launch
    lean = run(layer, given, layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_on_a_gpu", lambda _: True)  # norms with the addition before them
        layer._reading = read_layer(layer)
        in_one = run(layer, given, layer)
    if kind in _TURNED:
        layer.self_attention.turns_itself = False
    assert layer._lean_reading(given) is None or kind not in _TURNED
    theirs = run(layer, given, lambda **named: TransformerLayer.forward(layer, **named))
    assert lean.keys() == in_one.keys() == theirs.keys()
    return {
        name: max(
            ((one[name] - value).norm() / value.norm().clamp(min=1e-6)).item()
            for one in (lean, in_one)
        )
        for name, value in theirs.items()
    }


@pytest.mark.parametrize("kind", ["plain", "quick", "gated", "turned", "language"])
def test_equals_megatron_core(ranks: RankPool, kind: str) -> None:
    (errors,) = ranks(1)(compare, kind)
    assert len(errors) >= 8
    assert max(errors.values()) < 2e-6, errors


def nodes(kind: str) -> Counter[str]:
    """Of the graph of a layer's gradients, by name."""
    layer, given = build(kind, model_parallel()), arguments(kind)
    out, _ = layer(**given | {"hidden_states": given["hidden_states"].requires_grad_()})
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in found)


def test_takes_no_views_that_change_nothing(ranks: RankPool) -> None:
    (found,) = ranks(1)(nodes, "plain")
    assert found["AddmmBackward0"] == 4
    assert found["AliasBackward0"] == found["ReshapeAliasBackward0"] == 0
    assert found["ViewBackward0"] <= 4  # to vectors, to heads and back, to samples


def gives_way() -> dict[str, bool]:
    """What leaves a layer to megatron-core, and that what hangs on a module is then called."""
    from megatron.mimo.lora.adapter import adapt
    from megatron.mimo.lora.settings import LoraSettings

    groups = model_parallel()
    given, found = arguments("plain"), {}
    layer = build("plain", groups)
    found["plain"] = layer._lean_reading(given) is None
    for module in (layer.mlp.linear_fc1, layer.self_attention.core_attention):
        called: list[Any] = []
        hook = module.register_forward_hook(lambda *_, called=called: called.append(1))
        layer(**given)
        found[f"hook on {type(module).__name__}"] = bool(called)
        hook.remove()
    found["hook removed"] = layer._lean_reading(given) is None
    found["cache"] = layer._lean_reading({**given, "inference_context": object()}) is None
    for name, changes in {
        "dropout": {"hidden_dropout": 0.1},
        "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "fp32 residual": {"fp32_residual_connection": True},
    }.items():
        found[name] = build("plain", groups, **changes)._lean_reading(given) is None
    with torch.no_grad():
        before, _ = layer(**given)
        adapt(layer.mlp.linear_fc2, LoraSettings(modules=("x",), rank=2), path="x", seed=1)
        layer.mlp.linear_fc2.adapter.up.fill_(1.0)
        after, _ = layer(**given)
    found["adapter"] = not torch.allclose(before, after)
    return found


def gathered() -> tuple[bool, set[str]]:
    """Whether a layer whose weights are gathered is left to megatron-core; what was waited for."""
    from megatron.core.distributed import DistributedDataParallel

    layer, given = build("plain", model_parallel()), arguments("plain")
    waited: set[str] = set()
    names = {module: name for name, module in layer.named_modules()}

    def hook(module: Any, *_: Any) -> None:
        waited.add(names[module])

    hook.__module__ = DistributedDataParallel.__module__  # whose hooks wait
    for module in layer.modules():
        module.register_forward_pre_hook(hook)
    reading = layer._lean_reading(given)
    layer(**given)
    return reading is None, {
        name
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None and name not in waited
    }


def test_waits_for_gathered_weights(ranks: RankPool) -> None:
    assert ranks(1)(gathered) == [(False, set())]


def test_gives_way_to_megatron_core(ranks: RankPool) -> None:
    (found,) = ranks(1)(gives_way)
    expected = {name: name not in ("plain", "hook removed") for name in found}
    assert found == expected


def turned(cp: int, by_row: bool) -> float:
    """How far queries turned by ready turns are from megatron-core's, document by document."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
    from megatron.core.models.mimo.partition.packing import packed_params
    from megatron.mimo.layers.fused import rotate
    from megatron.mimo.layers.turns import turns_of

    groups = model_parallel(cp=cp)
    borders, heads = [0, 8, 12, 24, 24], torch.randn(24 // cp, 3, 12)
    packed = packed_params({"cu_seqlens_q": borders}, tokens=24, cp_size=cp)
    assert packed is not None
    # Of every token of the row, as multimodal positions are, or of positions from 0 on.
    angles = torch.randn(24 if by_row else 12, 1, 1, 4).repeat(1, 1, 1, 2)
    turns = turns_of(angles, packed, tokens=24 // cp, kinds=1, cp_group=groups.cp)
    query, key = rotate(heads, heads[:, :1], turns.flatten(0, -2), scale=1.5)
    expected = _apply_rotary_pos_emb_thd(
        heads, packed.cu_seqlens_q, angles, mscale=1.5, cp_group=groups.cp
    )
    assert torch.equal(key, query[:, :1])
    return (query - expected).abs().max().item()


@pytest.mark.parametrize("by_row", [False, True], ids=["positions", "row"])
@pytest.mark.parametrize("cp", [1, 2])
def test_turns_are_megatron_cores(ranks: RankPool, cp: int, by_row: bool) -> None:
    assert max(ranks(cp)(turned, cp, by_row)) < 1e-6
