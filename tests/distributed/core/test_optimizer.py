"""One optimizer per module of the model equals one optimizer of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.core.layouts import (
    CLIP,
    LEARNING_RATE,
    Layout,
    Outcome,
    run_reference,
)
from tests.distributed.core.modules import build, build_optimizer, gradients, train, wrap
from tests.distributed.core.reference import Design, make_batches
from tests.distributed.core.whole import Part, Tensors
from tests.rank_pool import RankPool
from tests.tiers import some

LAYOUTS = {
    "one rank": Layout(),
    "DP2": Layout(dp=2),
    "DP2, distributed optimizer": Layout(dp=2, distributed_optimizer=True),
    "TP2, distributed optimizer": Layout(tp=2, distributed_optimizer=True),
    "PP2, distributed optimizer": Layout(pp=2, distributed_optimizer=True),
}
CHECKPOINTS = {
    "DP2": (Layout(dp=2), None, 1),
    "PP2": (Layout(pp=2), None, 1),
    "DP2, dp_reshardable": (Layout(dp=2, distributed_optimizer=True), "dp_reshardable", 1),
    "PP2, fully_reshardable": (Layout(pp=2, distributed_optimizer=True), "fully_reshardable", 1),
    "before the first step": (Layout(), None, 0),
    "before the first step, distributed optimizer": (
        Layout(pp=2, distributed_optimizer=True),
        "fully_reshardable",
        0,
    ),
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Outcome:
    return ranks(1)(run_reference, Design())[0]


@pytest.mark.parametrize(
    "name", some(LAYOUTS, "one rank", "TP2, distributed optimizer", "PP2, distributed optimizer")
)
def test_steps_as_one_optimizer_of_the_whole_model(
    ranks: RankPool, reference: Outcome, name: str
) -> None:
    layout = LAYOUTS[name]
    zero_gradients = sum(int((g == 0).sum()) for g in reference.gradients[0].values())
    for norms, zeros, error in ranks(layout.world_size)(run_training, layout, reference):
        assert norms == pytest.approx(reference.norms, rel=1e-5)
        assert min(norms) > CLIP  # every step was clipped
        # Key biases have no gradient but for rounding, which may give exact zeros too.
        assert zeros == pytest.approx(zero_gradients, abs=4)
        assert error < 1e-6


def run_training(layout: Layout, reference: Outcome) -> tuple[list[float], int, float]:
    """Norms of all steps, zeros in the first, largest absolute error of a weight at the end."""
    model, held = build(layout, reference.weights)
    optimizer = build_optimizer(model, layout, log_num_zeros_in_grad=True)
    steps = [train(model, optimizer, layout, batch) for batch in make_batches()]
    errors = [(part.parameter - part.of(reference.trained)).abs().max().item() for part in held]
    return [norm for norm, _ in steps], steps[0][1], max(errors)


@pytest.mark.parametrize(
    "name",
    some(
        CHECKPOINTS,
        "PP2",
        "DP2, dp_reshardable",
        "before the first step, distributed optimizer",
    ),
)
def test_continues_bit_for_bit(
    ranks: RankPool, reference: Outcome, tmp_path: Path, name: str
) -> None:
    layout, kind, steps = CHECKPOINTS[name]
    arguments = layout, reference.weights, str(tmp_path), kind, steps
    through = ranks(layout.world_size)(train_and_save, *arguments)
    for rank, resumed in enumerate(ranks(layout.world_size)(load_and_train, *arguments)):
        assert resumed.keys() == through[rank].keys()
        for name, weight in resumed.items():
            assert torch.equal(weight, through[rank][name]), (rank, name)


def train_and_save(
    layout: Layout, weights: Tensors, folder: str, kind: str | None, steps: int
) -> Tensors:
    """Saves after some steps and trains on; the weights at the end."""
    from megatron.core import dist_checkpointing

    model, held, optimizer = build_both(layout, weights)
    batches = make_batches()
    for batch in batches[:steps]:
        train(model, optimizer, layout, batch)
    dist_checkpointing.save(sharded(model, optimizer, kind, is_loading=False), folder)
    for batch in batches[steps:]:
        train(model, optimizer, layout, batch)
    return {part.name: part.parameter.detach() for part in held}


def load_and_train(
    layout: Layout, weights: Tensors, folder: str, kind: str | None, steps: int
) -> Tensors:
    """Loads into a model of zeros and trains on; the weights at the end."""
    from megatron.core import dist_checkpointing

    zeros = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    model, held, optimizer = build_both(layout, zeros)
    state = dist_checkpointing.load(sharded(model, optimizer, kind, is_loading=True), folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for batch in make_batches()[steps:]:
        train(model, optimizer, layout, batch)
    return {part.name: part.parameter.detach() for part in held}


def build_both(layout: Layout, weights: Tensors) -> tuple[Any, list[Part], Any]:
    from megatron.mimo.layers import install_adam

    if layout.distributed_optimizer:
        install_adam()  # checkpoints of torch's Adam are for plain optimizers
    model, held = build(layout, weights)
    overrides = override("modality_submodules.images.*", max_lr=3e-3)
    return model, held, build_optimizer(model, layout, config_overrides=overrides)


def sharded(model: Any, optimizer: Any, kind: str | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": kind} if kind else {}
    of_model = model.sharded_state_dict()
    of_optimizer = optimizer.sharded_state_dict(of_model, is_loading, metadata=metadata)
    return {"model": of_model, "optimizer": of_optimizer}


def test_names_of_checkpoint_entries(ranks: RankPool, reference: Outcome) -> None:
    keys, refusal = ranks(1)(list_keys, reference)[0]
    assert all(key.startswith(f"mimo.{module}.optimizer.") for module, key in keys)
    for module in ("images", "sounds", "language"):
        own = {key.removeprefix(f"mimo.{module}.") for name, key in keys if name == module}
        assert f"optimizer.mimo.{module}.param_groups" in own
        assert f"optimizer.mimo.{module}.common_step" in own
    assert "install_adam" in refusal


def list_keys(reference: Outcome) -> tuple[list[tuple[str, str]], str]:
    """(module, key) of all entries; what is said to a distributed optimizer with torch's Adam."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase
    from megatron.core.models.mimo.errors import UnsupportedError

    model, _ = build(Layout(), reference.weights)
    state = sharded(model, build_optimizer(model, Layout()), None, is_loading=False)["optimizer"]
    keys = [
        (module, entry.key)
        for module, entries in state.items()
        for entry in nested_values(entries)
        if isinstance(entry, ShardedBase)
    ]
    layout = Layout(distributed_optimizer=True)
    wrap(model, layout)
    with pytest.raises(UnsupportedError) as refusal:
        build_optimizer(model, layout).sharded_state_dict(model.sharded_state_dict())
    return keys, str(refusal.value)


@pytest.mark.parametrize(("layout", "rank"), [(Layout(pp=2), 0), (Layout(dp=2), 1)])
def test_inf_in_one_module_on_one_rank_skips_the_step_everywhere(
    ranks: RankPool, reference: Outcome, layout: Layout, rank: int
) -> None:
    for skipped, scales, moved in ranks(2)(run_into_inf, reference, layout, rank):
        assert skipped == (False, None, None)
        assert scales == [{1024.0}, {512.0}, {512.0}]
        assert moved == [False, True]


def run_into_inf(
    reference: Outcome, layout: Layout, rank: int
) -> tuple[Any, list[set[float]], list[bool]]:
    """A step with inf in an encoder's reduced gradients on one rank, then a good one."""
    model, held = build(layout, reference.weights)
    optimizer = build_optimizer(
        model, layout, fp16=True, initial_loss_scale=1024.0, min_loss_scale=1.0, hysteresis=1
    )
    scales = [{part.get_loss_scale().item() for part in optimizer.chained_optimizers}]
    batch = make_batches()[0]
    gradients(model, layout, batch)
    if dist.get_rank() == rank:
        next(model.modality_submodules["images"].parameters()).main_grad.view(-1)[0] = torch.inf
    moved, skipped = [], optimizer.step()
    for _ in range(2):
        scales.append({part.get_loss_scale().item() for part in optimizer.chained_optimizers})
        weights = [part.of(reference.weights) for part in held]
        moved.append(
            any(not part.parameter.equal(w) for part, w in zip(held, weights, strict=True))
        )
        if len(moved) == 1:
            train(model, optimizer, layout, batch)
    return skipped, scales, moved


def test_overrides_reach_the_named_modules(ranks: RankPool, reference: Outcome) -> None:
    moved = ranks(1)(run_overrides, reference)[0]
    assert not any(moves for name, moves in moved.items() if ".images.input_projections" in name)
    assert any(moves for name, moves in moved.items() if ".images.encoders" in name)
    assert any(moves for name, moves in moved.items() if name.startswith("language_model"))


def run_overrides(reference: Outcome) -> dict[str, bool]:
    """Whether each parameter moves when the projections of images have no learning rate."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model, held = build(Layout(), reference.weights)
    overrides = override("modality_submodules.images.input_projections.*", max_lr=0.0, min_lr=0.0)
    optimizer = build_optimizer(model, Layout(), config_overrides=overrides)
    OptimizerParamScheduler(
        optimizer, LEARNING_RATE, LEARNING_RATE, LEARNING_RATE, 0, 10, "constant", 0.0, 0.0, 10,
        "constant",
    ).step(0)  # fmt: skip
    train(model, optimizer, Layout(), make_batches()[0])
    return {part.name: not part.parameter.equal(part.of(reference.weights)) for part in held}


def test_frozen_modules_take_no_part(ranks: RankPool, reference: Outcome) -> None:
    moved, state, stub = ranks(1)(run_frozen, reference)[0]
    assert moved == {"modality_submodules": False, "language_model": True}
    assert [name for name, entries in state.items() if entries] == ["language"]
    assert stub == (True, [], 1.0, (True, 0.0, None), {name: {} for name in state})


def run_frozen(reference: Outcome) -> Any:
    """Trains with frozen encoders, then makes an optimizer of a model that is frozen as a whole."""
    model, held = build(Layout(), reference.weights, frozen=("images", "sounds"))
    optimizer = build_optimizer(model, Layout())
    train(model, optimizer, Layout(), make_batches()[0])
    moved = dict.fromkeys(["modality_submodules", "language_model"], False)
    for part in held:
        moved[part.name.partition(".")[0]] |= not part.parameter.equal(part.of(reference.weights))
    state = sharded(model, optimizer, None, is_loading=False)["optimizer"]
    model.requires_grad_(False)
    stub = build_optimizer(model, Layout())
    stub.zero_grad()
    stub.reload_model_params()
    empty = sharded(model, stub, None, is_loading=True)["optimizer"]
    stub.load_state_dict(empty)
    scale = stub.get_loss_scale().item()
    return moved, {name: bool(value) for name, value in state.items()}, (
        stub.is_stub_optimizer, stub.param_groups, scale, stub.step(), empty
    )  # fmt: skip


REFUSED = {
    "one module unwrapped": "'images' is a VisionModalitySubmodules",
    "wrapped as a whole": "get_megatron_optimizer builds it",
    "another kind of optimizer": "use_distributed_optimizer=False",
    "frozen after wrapping": "freeze, then wrap",
    "misspelt override": "no parameter is called 'modality_submodules.image.*'",
    "muon": "expected 'adam' or 'sgd'",
    "a parameter of no module": "'extra' belongs to no module",
}


def test_refusals_are_the_same_on_every_rank(ranks: RankPool, reference: Outcome) -> None:
    first, second = ranks(2)(collect_refusals, reference)
    assert first == second
    for case, text in REFUSED.items():
        assert text in first[case], case


def collect_refusals(reference: Outcome) -> dict[str, str]:
    """What is said on this rank to mistakes that, where it can be so, only rank 0 makes."""
    from megatron.core.models.mimo import get_mimo_optimizer
    from megatron.core.models.mimo.errors import MimoError
    from megatron.core.optimizer import OptimizerConfig

    layout = Layout(pp=2)
    model, _ = build(layout, reference.weights)
    plain = OptimizerConfig(optimizer="adam", lr=1.0)
    distributed = OptimizerConfig(optimizer="adam", lr=1.0, use_distributed_optimizer=True)
    heard = {}

    def hear(case: str, *arguments: Any) -> None:
        with pytest.raises(MimoError) as error:
            get_mimo_optimizer(*arguments)
        heard[case] = str(error.value)

    is_first = "images" in model.modality_submodules
    hear("wrapped as a whole", model.language_model, plain)
    hear("another kind of optimizer", model, distributed)
    hear("misspelt override", model, plain, override("modality_submodules.image.*", max_lr=1.0))
    hear("muon", model, OptimizerConfig(optimizer="muon", lr=1.0))
    if is_first:
        model.extra = torch.nn.Parameter(torch.zeros(1))
    hear("a parameter of no module", model, plain)
    model.extra = None
    late = next(model.language_model.parameters())
    late.requires_grad_(not is_first)
    hear("frozen after wrapping", model, plain)
    late.requires_grad_(True)
    if is_first:
        model.modality_submodules["images"] = model.modality_submodules["images"].module
    hear("one module unwrapped", model, plain)
    return heard


def override(name: str, **values: float) -> Any:
    from megatron.core.optimizer import ParamKey

    return {ParamKey(name=name): values}
