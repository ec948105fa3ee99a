"""Rows taken between grids within each forward: loss and gradients of one process, at any ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.core.example_script import assert_gives_what_stock_gives
from tests.distributed.core.grids import GridLayout, wrap
from tests.distributed.core.layouts import copy_weights, model_inputs
from tests.distributed.core.reference import (
    SEQUENCE,
    Design,
    Sample,
    build_model,
    make_batches,
    reference_step,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, parts, whole
from tests.distributed.schedule import loss_of_labels, run_schedule
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

TOLERANCE = 1e-5
SCRIPT = Path(__file__).parents[3] / "examples/mimo/grids_by_hand.py"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of one process, for so many of the samples."""

    weights: Tensors
    gradients: Tensors
    loss: float


# tensor-parallel size of the encoders and of the language model on as many ranks
RATIOS = {
    "4:1": (4, 1, 4),
    "1:4": (4, 4, 1),
    "2:1": (2, 1, 2),
    "1:2": (2, 2, 1),
    "4:2": (4, 1, 2),
    "equal": (2, 1, 1),
    "equal, tp2": (2, 2, 2),
    "3:1, sounds": (3, 1, 1),
}
CASES = {name: (sizes, Design()) for name, sizes in RATIOS.items()} | {
    "4:1, frozen encoders": (RATIOS["4:1"], Design(frozen=("images.encoders", "sounds"))),
    "1:4, frozen language": (RATIOS["1:4"], Design(frozen=("language",))),
    "4:1, no media": (RATIOS["4:1"], Design(media=False)),
    "1:4, no media": (RATIOS["1:4"], Design(media=False)),
}


def samples_of(design: Design, count: int) -> list[Sample]:
    """Their images and sounds differ in number; some samples have none."""
    batches = make_batches(design)
    return [sample for batch in batches for sample in batch][:count]


def run_reference(design: Design, count: int) -> Expected:
    groups = model_parallel()
    model = build_model(transformer_config(design), design, groups, first=True, last=True)
    loss = reference_step(model, samples_of(design, count))
    return Expected(
        weights=whole(model, lambda parameter: parameter.data),
        gradients=whole(model, lambda parameter: parameter.grad),
        loss=loss.item(),
    )


@pytest.mark.parametrize(
    "name",
    some(CASES, "4:2", "1:2", "3:1, sounds", "1:4, no media"),
)
def test_loss_and_gradients(ranks: RankPool, name: str) -> None:
    (world, encoder_tp, language_tp), design = CASES[name]
    layout = GridLayout(
        tp=language_tp, dp=world // language_tp, images_tp=encoder_tp, sounds_tp=encoder_tp
    )
    if "sounds" in name:  # whose encoder knows nothing of Megatron, so that any number divides it
        layout = GridLayout(dp=3, images_tp=1, sounds_tp=3)
    (expected,) = ranks(1)(run_reference, design, 12)
    for loss, errors in ranks(world)(run_gradients, layout, design, expected):
        assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert not {key: one for key, one in errors.items() if not one < TOLERANCE}


def run_gradients(
    layout: GridLayout, design: Design, expected: Expected
) -> tuple[float, dict[str, float]]:
    """The loss, and each parameter's error; the inputs of each module are its own replica's."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.mimo.topology import build_grids

    groups = model_parallel(tp=layout.tp)
    grids = build_grids(layout.components)

    def finalize(_: Any, num_tokens: torch.Tensor, **keywords: Any) -> None:
        wrapped = [model.language_model, *model.modality_submodules.values()]
        wrapped = [one for one in wrapped if hasattr(one, "finish_grad_sync")]
        finalize_model_grads(wrapped, num_tokens, **keywords)

    config = transformer_config(
        design, tensor_model_parallel_size=layout.tp, finalize_model_grads_func=finalize
    )
    model = build_model(config, design, groups, first=True, last=True, grids=grids)
    copy_weights([model], expected.weights)
    held = [part for part in parts(model) if part.parameter.requires_grad]
    wrap(model, layout, grids)
    model.zero_grad_buffer()
    loss = run_schedule(
        [model],
        micro_batches(layout, design),
        loss_of_labels,
        seq_length=SEQUENCE,
        micro_batch_size=1,
    )
    errors = {}
    for part in held:
        gradient = part.parameter.main_grad
        if part.key not in expected.gradients:  # by no sample
            errors[part.name] = float(gradient.norm())
        else:
            errors[part.name] = part.error(gradient, expected.gradients)
    model.destroy()
    return loss, errors


def micro_batches(layout: GridLayout, design: Design) -> list[dict[str, Any]]:
    """Of this rank: tokens of its replica of the language model, media of its encoders'."""
    from megatron.core import parallel_state

    rank, world = torch.distributed.get_rank(), layout.world_size
    of = {"language": (parallel_state.get_data_parallel_rank(), layout.dp)}
    for name, tp in (("images", layout.images_tp), ("sounds", layout.sounds_tp)):
        of[name] = rank // tp, world // tp
    together = math.lcm(*(dp for _, dp in of.values()))
    samples = samples_of(design, 12)
    batches = []
    for start in range(0, len(samples), together):
        chunk = samples[start : start + together]
        own = {}
        for name, (index, dp) in of.items():
            share = together // dp
            inputs = chunk[index * share : (index + 1) * share]
            own[name] = model_inputs(
                inputs, layout, design, dtype=torch.float32, plan=start % 2 == 0
            )
        batch = own["language"]
        batch["modality_inputs"] = {
            name: own[name]["modality_inputs"][name]
            for name in ("images", "sounds")
            if name in own[name]["modality_inputs"]
        }
        batches.append(batch)
    return batches


@pytest.mark.wide
def test_script_gives_what_stock_gives(ranks: RankPool) -> None:
    assert_gives_what_stock_gives(ranks, SCRIPT)


REFUSED = {
    "averaged": "those of 'images' would be 1/4 of what they are",
    "pp": "needs modality_inputs_of='language'",
    "size": "tensor_model_parallel_size = 1",
    "encoder pp": "encoders on the language model's ranks are parallel by tp and dp",
    "in part": "puts 'images' on ranks of the language model",
    "2:3": "evenly divisible",
    "no schedule": "is trained by the schedule EncodeFirst",
}


def test_refusals(ranks: RankPool) -> None:
    for said in ranks(6)(collect_refusals):
        assert {case: text for case, text in REFUSED.items() if text not in said[case]} == {}


@dataclass
class Shapes:
    """Grids as ``build_model`` takes them; nothing is built with their groups."""

    by_module: dict[str, Any]
    groups: dict[str, Any]


def shapes(images: Any, language: Any, groups: Any) -> Shapes:
    own = {"images": images, "sounds": images, "language": language}
    return Shapes(by_module=own, groups=dict.fromkeys(("images", "sounds"), groups))


def grid(offset: int = 0, **sizes: int) -> Any:
    from megatron.core.hyper_comm_grid import HyperCommGrid

    return HyperCommGrid([*sizes.values()], [*sizes], offset)


def refused_grids() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Grids of the encoders and of the language model, and what its configuration says."""
    tp2, pp2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    averaged = {"tensor_model_parallel_size": 4, "calculate_per_token_loss": False}
    return {
        "averaged": (grid(tp=1, dp=4), grid(tp=4, dp=1), averaged),
        "pp": (grid(tp=1, dp=6), grid(tp=1, dp=3, pp=2), pp2),
        "size": (grid(tp=1, dp=6), grid(tp=2, dp=3), {}),
        "encoder pp": (grid(tp=1, dp=3, pp=2), grid(tp=1, dp=6), {}),
        "in part": (grid(tp=1, dp=4), grid(3, tp=1, dp=3), {}),
        "2:3": (grid(tp=3, dp=2), grid(tp=2, dp=3), tp2),
    }


def collect_refusals() -> dict[str, str]:
    from megatron.core.models.mimo.errors import MimoError

    groups, design, said = model_parallel(), Design(), {}
    for case, (images, language, changes) in refused_grids().items():
        config = transformer_config(design, **changes)
        grids = shapes(images, language, groups)
        with pytest.raises(MimoError) as error:
            build_model(config, design, groups, first=True, last=True, grids=grids)
        said[case] = str(error.value)
    model = build_model(
        transformer_config(design),
        design,
        groups,
        first=True,
        last=True,
        grids=shapes(grid(tp=1, dp=6), grid(tp=1, dp=6), groups),
        inputs_of="language",
    )
    samples = samples_of(design, 1)
    batch = model_inputs(samples, GridLayout(), design, dtype=torch.float32, plan=True)
    with pytest.raises(MimoError) as error:
        model(**batch)
    said["no schedule"] = str(error.value)
    return said
