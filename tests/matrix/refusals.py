"""What is refused, and the words of it: asked of the code, never written down twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.distributed.core.layouts import Layout, config_changes
from tests.distributed.core.reference import SEQUENCE, Design, build_model, transformer_config
from tests.rank_pool import RankPool, model_parallel

WORLD_SIZE = 8

SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")

# What it is about -> flags of a run of eight processes.
FLAGS: dict[str, tuple[str, ...]] = {
    "TP and attention heads": ("--tensor-model-parallel-size", "8"),
    "sizes and processes": ("--tensor-model-parallel-size", "3"),
    "PP and layers": ("--pipeline-model-parallel-size", "8"),
    "VPP without PP": ("--num-layers-per-virtual-pipeline-stage", "1"),
    "VPP and layers": (
        *("--pipeline-model-parallel-size", "2"),
        *("--num-layers-per-virtual-pipeline-stage", "3"),
    ),
    "VPP and micro-batches": (
        *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
        *("--micro-batch-size", "8", "--global-batch-size", "96"),
    ),
    "VPP on two stages without overlap": (
        *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
        "--no-overlap-p2p-communication",
    ),
    "CP, SP and sequence length": (
        *("--context-parallel-size", "2", "--tensor-model-parallel-size", "2"),
        *("--sequence-parallel", "--seq-length", "66", "--max-position-embeddings", "66"),
    ),
    "EP without experts": ("--expert-model-parallel-size", "2"),
    "EP and experts": ("--num-experts", "3", "--expert-model-parallel-size", "2"),
    "EP and processes": ("--num-experts", "16", "--expert-model-parallel-size", "16"),
    "experts and TP without SP": ("--num-experts", "4", "--tensor-model-parallel-size", "2"),
    "experts cut by TP, with gloo": (
        *("--num-experts", "4", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--moe-token-dispatcher-type", "alltoall"),
    ),
    "latent attention and TP": (
        *("--multi-latent-attention", "--tensor-model-parallel-size", "2"),
    ),
    "recomputed modules without granularity": ("--recompute-modules", "mlp"),
    "recomputed modules and whole layers": (
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", "1", "--recompute-modules", "mlp"),
    ),
    "recomputed modules that do not exist": (*SELECTIVE, "core_attention"),
    "recomputed layers without a method": ("--recompute-granularity", "full"),
    "recomputing moe": (*SELECTIVE, "moe"),
    "recomputing shared_experts": (*SELECTIVE, "shared_experts"),
    "recomputing moe_act": (
        *("--num-experts", "4", "--disable-bias-linear", "--moe-grouped-gemm"),
        *(*SELECTIVE, "moe_act"),
    ),
    "recomputing mla_up_proj": (*SELECTIVE, "mla_up_proj"),
    "recomputing gdn_norm_out": (*SELECTIVE, "gdn_norm_out"),
}


def messages_of_flags() -> dict[str, str]:
    """Of ``FLAGS`` with the default recipe, on CPU."""
    from megatron.mimo.backend import capabilities, select_backend
    from megatron.mimo.recipes import load_recipe

    select_backend("cpu")
    from megatron.mimo.arguments.command_line import parse_arguments

    def parse(argv: tuple[str, ...]) -> Callable[[], object]:
        return lambda: parse_arguments(
            load_recipe("digits"),
            machine=capabilities(),
            config={},
            argv=(*argv, "--no-output"),
        )

    with _environment(RANK="0", WORLD_SIZE=str(WORLD_SIZE)):
        return {what: _refused(parse(argv)) for what, argv in FLAGS.items()}


def messages_of_library(pool: RankPool) -> dict[str, str]:
    """Of models that cannot be built or called; the same on every rank."""
    first, second = pool(2)(_refuse_models)
    assert first == second, (first, second)
    return first


def _refuse_models() -> dict[str, str]:
    from megatron.core import parallel_state

    messages = {}
    groups = model_parallel(tp=2)
    config = transformer_config(**config_changes(Layout(tp=2, sequence_parallel=True)))
    messages["SP and an embedding that scatters"] = _refused(
        lambda: build(config, Design(), groups, scatter=True)
    )
    messages["packing and stock attention"] = _refused(
        lambda: build(_config(Layout()), Design(), groups, stock_attention=True)
    )
    messages["mRoPE and head size"] = _refused(
        lambda: build(
            transformer_config(Design(mrope=True), mrope_section=[1, 1, 1]),
            Design(mrope=True),
            groups,
        )
    )
    messages["modules that share some ranks"] = _refused(
        lambda: build(_config(Layout()), Design(), groups, grids=1)
    )
    parallel_state.destroy_model_parallel()
    groups = model_parallel(cp=2)
    model = build(_config(Layout(cp=2)), Design(), groups)
    messages["CP and a dense mask"] = _refused(lambda: _call_with_mask(model))
    return messages


def _config(layout: Layout) -> Any:
    return transformer_config(**config_changes(layout))


def build(config: Any, design: Design, groups: Any, **wrong: Any) -> Any:
    """The reference model with something wrong in it."""
    from megatron.core.models.mimo import MimoModel

    model = build_model(config, design, groups, first=True, last=True)
    if not wrong:
        return model
    described = model.mimo_config
    if "scatter" in wrong:
        described.language_model_spec.params["scatter_embedding_sequence_parallel"] = True
    if "stock_attention" in wrong:
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        described.kv_format = "thd"
        layers = described.language_model_spec.params["transformer_layer_spec"]
        for layer in layers.submodules.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    if "grids" in wrong:
        from megatron.core.hyper_comm_grid import HyperCommGrid

        described.module_to_grid_map = {
            "images": HyperCommGrid([1], ["dp"], 0),
            "sounds": HyperCommGrid([1], ["dp"], 0),
            "language": HyperCommGrid([1, 2], ["tp", "dp"], 0),
        }
    return MimoModel(described, cp_group=groups.cp, tp_group=groups.tp)


def _call_with_mask(model: Any) -> Any:
    import torch

    ids_BS = torch.zeros(1, SEQUENCE, dtype=torch.long)
    mask = torch.zeros(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    return model(ids_BS, torch.arange(SEQUENCE)[None], mask)


def _refused(attempt: Callable[[], object]) -> str:
    """The message of the error that ``attempt`` ends in."""
    from megatron.core.models.mimo.errors import MimoError

    try:
        attempt()
    except MimoError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
