"""A HybridModel in a MimoModel computes what a GPTModel with the same weights does.

megatron-core's HybridModel counts attention and feed-forward as layers of their own: "G-*-" are a
gated delta net, a feed-forward, attention and a feed-forward; two layers of a GPTModel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.distributed.core.layouts import Layout, model_inputs
from tests.distributed.core.reference import (
    PLACEHOLDERS,
    SEQUENCE,
    VOCABULARY,
    Design,
    build_model,
    make_batches,
    transformer_config,
)
from tests.rank_pool import RankPool, model_parallel

DESIGN = Design(linear=True)
# Prefixes of a layer's parameters in the GPTModel and of the two layers in the other.
_HALVES = {
    "input_layernorm.": (0, "input_layernorm."),
    "self_attention.": (0, "self_attention."),
    "pre_mlp_layernorm.": (1, "pre_mlp_layernorm."),
    "mlp.": (1, "mlp."),
}


def hybrid_spec(config: Any, groups: Any) -> Any:
    """The language model, of the same parts as ``language_layer_spec`` gives a GPTModel."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.mimo.layers import language_layer_spec
    from megatron.mimo.layers.norm import Norm

    class Stack(HybridStack):
        """With our norm behind the last layer: megatron-core's is Transformer Engine's."""

        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, post_layer_norm=False, **given)
            self.post_layer_norm = True
            self.final_norm = Norm(config, config.hidden_size)

    nothing = {"mlp": IdentityOp, "mlp_bda": IdentityFuncOp, "pre_mlp_layernorm": IdentityOp}
    no_attention = {
        "self_attention": IdentityOp,
        "self_attn_bda": IdentityFuncOp,
        "input_layernorm": IdentityOp,
    }
    linear, full = (one.submodules for one in language_layer_spec(config).submodules.layer_specs)

    def layer(parts: Any, changes: dict[str, Any]) -> Any:
        return ModuleSpec(module=TransformerLayer, submodules=dataclasses.replace(parts, **changes))

    stack = HybridStackSubmodules(
        gdn_layer=layer(linear, nothing),
        attention_layer=layer(full, nothing),
        mlp_layer=layer(full, no_attention),
    )
    return ModuleSpec(
        module=HybridModel,
        params={
            "config": config,
            "hybrid_stack_spec": ModuleSpec(module=Stack, submodules=stack),
            "hybrid_layer_pattern": "G-*-",
            "vocab_size": VOCABULARY,
            "max_sequence_length": SEQUENCE,
            "position_embedding_type": "rope",
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": groups,
        },
    )


def renamed(name: str) -> str:
    """What a parameter of the GPTModel's side is called in the other."""
    name = name.replace("decoder.final_layernorm.", "decoder.final_norm.")
    head, found, rest = name.partition("language_model.decoder.layers.")
    if not found:
        return name
    number, _, inner = rest.partition(".")
    half, prefix = next(one for start, one in _HALVES.items() if inner.startswith(start))
    return f"{head}{found}{2 * int(number) + half}.{prefix}{inner.removeprefix(prefix)}"


def compare() -> dict[str, float]:
    """Relative errors of every gradient, and of the losses."""
    from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from tests.distributed.core.encoders import image_parts, sound_spec
    from tests.distributed.core.reference import HIDDEN

    groups = model_parallel()
    torch.manual_seed(0)
    plain = build_model(transformer_config(DESIGN), DESIGN, groups, first=True, last=True)
    config = transformer_config(DESIGN, num_layers=4, linear_attention_freq=None)
    two = transformer_config(DESIGN)
    images = ModuleSpec(module=VisionModalitySubmodules, submodules=image_parts(config, groups, 0))
    spec = hybrid_spec(two, groups)
    spec.params["config"] = config
    other = MimoModel(
        MimoModelConfig(
            language_model_spec=spec,
            modality_submodules_spec={"images": images, "sounds": sound_spec(HIDDEN)},
            special_token_ids=PLACEHOLDERS,
        ),
        cp_group=groups.cp,
        tp_group=groups.tp,
    )
    weights = {renamed(name): tensor for name, tensor in plain.state_dict().items()}
    other.load_state_dict(weights)
    losses = {}
    for model in (plain, other):
        batch = model_inputs(
            make_batches()[0][:3], Layout(), DESIGN, dtype=torch.float32, plan=False
        )
        losses_BS, mask_BS = model(**batch)
        losses[id(model)] = (losses_BS * mask_BS).sum()
        losses[id(model)].backward()
    theirs = dict(other.named_parameters())
    errors = {
        name: ((theirs[renamed(name)].grad - one.grad).norm() / one.grad.norm()).item()
        for name, one in plain.named_parameters()
        if one.grad is not None
    }
    first, second = losses.values()
    return {**errors, "loss": (first - second).abs().item() / first.item()}


def test_hybrid_model_gives_what_gpt_model_does(ranks: RankPool) -> None:
    (errors,) = ranks(1)(compare)
    assert any(".self_attention.A_log" in name for name in errors)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
