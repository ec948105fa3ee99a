"""What is recomputed: refused in words where it would have no effect."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import select_backend

DENSE: dict[str, Any] = {
    "recompute_activations": False,
    "recompute_granularity": "selective",
    "recompute_method": None,
    "num_experts": None,
    "moe_grouped_gemm": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_overlap": False,
    "multi_latent_attention": False,
}
EXPERTS = {"num_experts": 4}
SHARED = {**EXPERTS, "moe_shared_expert_intermediate_size": 16}
GROUPED = {**EXPERTS, "moe_grouped_gemm": True}
LATENT = {"multi_latent_attention": True}


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    select_backend("cpu")


def check(modules: str, *, with_te: bool, **changes: Any) -> None:
    from megatron.mimo.arguments.recomputation import check_recomputation

    layers = {"transformer_impl": "transformer_engine" if with_te else "local"}
    args = Namespace(**{**DENSE, **layers, "recompute_modules": modules.split(), **changes})
    check_recomputation(args)


def test_all_of_megatrons_modules_are_known() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.arguments.recomputation import MODULES

    with pytest.raises(AssertionError, match="Allowed modules are") as refused:
        TransformerConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            recompute_granularity="selective",
            recompute_modules=["nothing"],
        )
    allowed = str(refused.value).rpartition("{")[2].rpartition("}")[0]
    assert sorted(allowed.replace("'", "").split(", ")) == sorted(MODULES)


@pytest.mark.parametrize(
    ("modules", "with_te", "changes"),
    [
        ("core_attn layernorm mlp", False, {}),
        ("core_attn mlp", True, {}),
        ("layernorm moe", True, EXPERTS),
        ("layernorm mla_up_proj", True, LATENT),
        ("moe shared_experts", False, SHARED),
        ("moe_act", True, GROUPED),
        ("mlp", False, {"recompute_granularity": None, "recompute_activations": True}),
        ("", False, {"recompute_granularity": None}),
    ],
)
def test_what_has_an_effect_is_accepted(
    modules: str, with_te: bool, changes: dict[str, Any]
) -> None:
    check(modules, with_te=with_te, **changes)


@pytest.mark.parametrize(
    ("modules", "with_te", "changes", "words"),
    [
        ("layernorm", True, {}, "layernorm has no effect: Transformer Engine's"),
        ("moe_act", False, GROUPED, "grouped experts of Transformer Engine"),
        ("moe_act", True, EXPERTS, "--moe-grouped-gemm"),
        ("mlp moe", False, {}, "moe without experts"),
        ("shared_experts", False, EXPERTS, "without shared experts"),
        (
            "shared_experts",
            False,
            {**SHARED, "moe_shared_expert_overlap": True},
            "--moe-shared-expert-overlap",
        ),
        ("core_atn", False, {}, "did you mean core_attn"),
    ],
)
def test_what_has_none_is_refused(
    modules: str, with_te: bool, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(modules, with_te=with_te, **changes)
