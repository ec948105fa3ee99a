"""An encoder that is cut into pipeline stages: every stage runs its layers.

Legend: N rows, F features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.core.disjoint import DisjointLayout, make_modules
from tests.distributed.core.reference import HIDDEN, IMAGE, PLACEHOLDERS, VOCABULARY
from tests.distributed.core.reference import transformer_config as reference_config
from tests.distributed.schedule import Sizes
from tests.rank_pool import RankPool, model_parallel

WIDTH, LENGTH = 6, 8
LAYOUT = DisjointLayout(images=Sizes(pp=2, dp=2), together=True, sounds=Sizes(dp=4))


class Stage(torch.nn.Module):
    """Some of two layers, [N, F] to [N, F]; the second one is the last stage's."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({str(n): torch.nn.Linear(WIDTH, WIDTH) for n in layers})

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            hidden_states = torch.tanh(layer(hidden_states))
        return hidden_states


def build(layers: tuple[int, ...], groups: Any, grids: dict[str, Any] | None) -> Any:
    """The model, every parameter filled by its name."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.layers import language_layer_spec

    config = reference_config(
        variable_seq_lengths=grids is not None, moe_token_dispatcher_type="alltoall"
    )
    language = ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "rope",
            "pg_collection": groups,
        },
    )
    projection = ModuleSpec(torch.nn.Linear, {"in_features": WIDTH, "out_features": HIDDEN})
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {"stage": ModuleSpec(Stage, {"layers": layers})},
            "input_projections": [projection],
        },
    )
    model = MimoModel(
        MimoModelConfig(
            language_model_spec=language,
            modality_submodules_spec={"images": images},
            special_token_ids={"images": PLACEHOLDERS["images"]},
            module_to_grid_map=grids,
        ),
        cp_group=groups.cp,
        tp_group=groups.tp,
    )
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def samples() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Micro-batches of two samples, ids and patches, with rows of different numbers, and none."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for counts in ((3, 1), (0, 0), (0, 2), (1, 4)):
        batch = []
        for count in counts:
            ids_S = torch.randint(0, IMAGE, (LENGTH,), generator=generator)
            ids_S[1 : 1 + count] = IMAGE
            batch.append((ids_S, torch.randn(count, WIDTH, generator=generator)))
        batches.append(batch)
    return batches


def forward_step(own: slice, first: bool, batches: Any, model: Any) -> tuple[Any, Any]:
    batch = next(batches)[own]
    ids_BS = torch.stack([ids_S for ids_S, _ in batch])
    patches_NF = torch.cat([patches for _, patches in batch])
    given = (
        {"images": {"stage": {"hidden_states": patches_NF}}} if first and len(patches_NF) else {}
    )
    losses, _ = model(
        ids_BS,
        torch.arange(LENGTH).expand(len(batch), -1),
        labels=ids_BS.roll(-1, 1).clamp(max=IMAGE - 1),
        modality_inputs=given,
    )
    return losses, lambda losses_BS: (losses_BS.sum(), torch.tensor(1), {})


def run_whole() -> dict[str, torch.Tensor]:
    model = build((0, 1), model_parallel(), None)
    for batch in samples():
        losses, _ = forward_step(slice(None), True, iter([batch]), model)
        losses.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_staged() -> dict[str, torch.Tensor]:
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_without_interleaving,
    )
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

    model_parallel()
    modules = make_modules(LAYOUT)
    images, language = modules["images"], modules["language"]
    grids = {"images": images.grid, "language": language.grid}
    stage = 0 if images.groups is None else images.groups.pp.rank()
    model = build((stage,), language.groups or language.elsewhere, grids)
    held = {name: modules[name].groups for name in grids if modules[name].groups is not None}
    own = slice(None)
    if images.groups is not None:
        own = slice(images.groups.dp.rank(), images.groups.dp.rank() + 1)
    forward_backward_pipelining_without_interleaving(
        forward_step_func=partial(forward_step, own, images.groups is not None and stage == 0),
        data_iterator=iter(samples()),
        model=[model],
        num_microbatches=4,
        seq_length=LENGTH,
        micro_batch_size=2,
        p2p_communicator=MultiModulePipelineCommunicator(
            grids,
            {"images": ["language"], "language": []},
            model.config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim={"images": 2},
        ),
        pg_collection=MultiModuleProcessGroupCollection(
            held, "language" if "language" in held else None
        ),
    )
    if images.groups is not None:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=images.groups.dp)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_every_stage(ranks: RankPool) -> None:
    (expected,) = ranks(1)(run_whole)
    found: dict[str, torch.Tensor] = {}
    for gradients in ranks(LAYOUT.world_size)(run_staged):
        for name, gradient in gradients.items():
            found[name] = gradient
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)
    assert set(found) == set(expected)
    assert "modality_submodules.images.encoders.stage.layers.0.weight" in found


def test_an_encoder_of_one_stage_is_refused(ranks: RankPool) -> None:
    said = ranks(LAYOUT.world_size)(refused)
    assert all(
        "has neither set_input_tensor nor an argument hidden_states" in one for one in said[:4]
    )


def refused() -> str:
    from megatron.core.models.mimo.errors import ConfigError

    model_parallel()
    modules = make_modules(LAYOUT)
    language = modules["language"]
    grids = {"images": modules["images"].grid, "language": language.grid}
    forward = Stage.forward
    Stage.forward = lambda self, pixels: forward(self, pixels)  # type: ignore[method-assign]
    try:
        build((0,), language.groups or language.elsewhere, grids)
    except ConfigError as error:
        return str(error)
    finally:
        Stage.forward = forward  # type: ignore[method-assign]
    return ""
