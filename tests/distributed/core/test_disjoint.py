"""Modules on ranks of their own: loss and gradients of one process; a script of megatron-core's."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.distributed.core.disjoint import DisjointLayout, build, step
from tests.distributed.core.example_script import assert_gives_what_stock_gives
from tests.distributed.core.layouts import CLIP, EPSILON, LEARNING_RATE
from tests.distributed.core.reference import Design
from tests.distributed.core.test_colocated import Expected, run_reference, samples_of
from tests.distributed.schedule import Sizes
from tests.rank_pool import RankPool
from tests.tiers import some

TOLERANCE = 1e-5
SCRIPT = Path(__file__).parents[3] / "examples/mimo/disjoint_by_hand.py"
SAMPLES = 12

CELLS = {
    "stages: fan-in, pp2": (
        DisjointLayout(images=Sizes(dp=2), sounds=Sizes(), language=Sizes(pp=2)),
        Design(),
    ),
    "stages: fan-out, tp3, overlap": (
        DisjointLayout(sounds=Sizes(tp=3), language=Sizes(dp=2), overlap=True),
        Design(),
    ),
    "stages: cp2-pp2, together": (
        DisjointLayout(
            images=Sizes(dp=2), sounds=Sizes(tp=2), together=True, language=Sizes(cp=2, pp=2)
        ),
        Design(),
    ),
    "stages: no media": (
        DisjointLayout(images=Sizes(dp=2), language=Sizes()),
        Design(media=False),
    ),
    "first: 2:3, tp2": (
        DisjointLayout(
            images=Sizes(tp=2, dp=2), sounds=Sizes(dp=1), language=Sizes(dp=3), by="encode first"
        ),
        Design(),
    ),
    "first: cp2-pp2, together": (
        DisjointLayout(
            images=Sizes(dp=2),
            sounds=Sizes(tp=2),
            together=True,
            language=Sizes(cp=2, pp=2),
            by="encode first",
        ),
        Design(),
    ),
    "first: images pp2, tp2-pp2": (
        DisjointLayout(
            images=Sizes(pp=2), sounds=Sizes(), language=Sizes(tp=2, pp=2), by="encode first"
        ),
        Design(),
    ),
    "first: images pp2-dp2, frozen language, overlap": (
        DisjointLayout(
            images=Sizes(pp=2, dp=2), language=Sizes(dp=2), by="encode first", overlap=True
        ),
        Design(frozen=("language",)),
    ),
    "first: images pp2, trained in part": (
        DisjointLayout(images=Sizes(pp=2), sounds=Sizes(tp=2), together=True, by="encode first"),
        Design(frozen=("images.encoders",)),
    ),
    "first: levels, pp2": (
        DisjointLayout(images=Sizes(dp=2), language=Sizes(pp=2), by="encode first"),
        Design(layers=4, levels=2),
    ),
    "first: tp2-sp, frozen images": (
        DisjointLayout(language=Sizes(tp=2), sequence_parallel=True, by="encode first"),
        Design(frozen=("images",)),
    ),
    "first: no media": (DisjointLayout(language=Sizes(), by="encode first"), Design(media=False)),
}


WIDE = (
    "stages: no media",
    "first: images pp2-dp2, frozen language, overlap",
    "first: images pp2, trained in part",
    "first: levels, pp2",
    "first: tp2-sp, frozen images",
    "first: no media",
)


@pytest.mark.parametrize("name", some(CELLS, *(name for name in CELLS if name not in WIDE)))
def test_loss_and_gradients(ranks: RankPool, name: str) -> None:
    check(ranks, *CELLS[name])


def drawn(seed: int) -> tuple[DisjointLayout, Design]:
    """Sizes of at most eight ranks, and what is trained on what media."""
    random = Random(seed)
    while True:
        images = Sizes(tp=random.choice([1, 2]), dp=random.choice([1, 2, 3]))
        sounds = Sizes(tp=random.choice([1, 2, 3]), dp=random.choice([1, 2, 3]))
        tp, cp, pp = (random.choice([1, 1, 2]) for _ in range(3))
        language = Sizes(tp=tp, cp=cp, pp=pp, dp=random.choice([1, 2, 3]))
        fits = all(max(a, language.dp) % min(a, language.dp) == 0 for a in (images.dp, sounds.dp))
        by = random.choice(["stages", "encode first"]) if fits else "encode first"
        if by == "encode first":
            images = replace(images, pp=random.choice([1, 2]))
        layout = DisjointLayout(
            images=images,
            sounds=sounds,
            language=language,
            together=_may_be_together(images, sounds, by) and random.random() < 0.5,
            by=by,
            # by hand nothing reduces the gradients of what sequence parallelism copies
            sequence_parallel=by == "encode first" and tp > 1 and random.random() < 0.5,
            overlap=random.random() < 0.5,
        )
        if layout.world_size <= 8:
            break
    frozen: tuple[str, ...] = random.choice([(), (), ("images",), ("language",)])
    media = random.random() < 0.9
    if not media and frozen == ("language",):
        frozen = ()  # there would be nothing to train
    return layout, Design(media=media, frozen=frozen, mrope=random.random() < 0.3)


def _may_be_together(images: Sizes, sounds: Sizes, by: str) -> bool:
    """By stages, a rank has the samples of one replica of encoders."""
    return images.world_size == sounds.world_size and (
        by == "encode first" or images.dp == sounds.dp
    )


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(30))
def test_random_grids(ranks: RankPool, seed: int) -> None:
    """A failure is told with its seed, by which ``drawn`` gives it again."""
    check(ranks, *drawn(seed))


def check(ranks: RankPool, layout: DisjointLayout, design: Design) -> None:
    (expected,) = ranks(1)(run_reference, design, SAMPLES)
    found = ranks(layout.world_size)(run_gradients, layout, design, expected)
    covered = set()
    for loss, errors, keys in found:
        assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert not {key: one for key, one in errors.items() if not one < TOLERANCE}
        covered |= keys
    assert covered >= set(expected.gradients)


def run_gradients(
    layout: DisjointLayout, design: Design, expected: Expected
) -> tuple[float, dict[str, float], set[str]]:
    built = build(layout, design, expected.weights)
    loss = step(layout, design, built, samples_of(design, SAMPLES))
    errors, keys = {}, set()
    for part in built.held:
        if not part.parameter.requires_grad:
            continue
        gradient = part.parameter.main_grad
        keys.add(part.key)
        if part.key not in expected.gradients:  # by no sample
            errors[part.name] = float(gradient.norm())
        else:
            errors[part.name] = part.error(gradient, expected.gradients)
    return loss, errors, keys


def test_encoders_run_beside_the_language_model(ranks: RankPool) -> None:
    """Ahead of it, but never further than its pipeline is deep, and one; each stage follows."""
    layout = DisjointLayout(
        images=Sizes(pp=2), sounds=Sizes(tp=2), together=True, by="encode first"
    )
    (expected,) = ranks(1)(run_reference, Design(), SAMPLES)
    first, second, language = ranks(layout.world_size)(run_watched, layout, expected)
    assert language == {"images": [], "sounds": []}
    for name in ("images", "sounds"):
        assert second[name] == follows(SAMPLES, window=2)
    assert first["images"] == follows(SAMPLES, window=3)


def follows(count: int, window: int) -> list[str]:
    """Forward of each micro-batch, and backward of each once ``window`` have been forward."""
    events = []
    for number in range(count + window - 1):
        events += [f"forward {number}"] if number < count else []
        events += [f"backward {number - window + 1}"] if number >= window - 1 else []
    return events


def run_watched(layout: DisjointLayout, expected: Expected) -> dict[str, list[str]]:
    """What encoders do, in order. The language model waits in its first micro-batch for them."""
    import torch.distributed as dist

    from megatron.core.models.mimo.model.encode_first.row_stream import EncoderStream
    from tests.distributed.core import disjoint

    store = dist.distributed_c10d._get_default_store()
    key = f"second encoded {layout}"
    done: dict[str, list[str]] = {"images": [], "sounds": []}
    original = EncoderStream.forward, EncoderStream.backward, disjoint.loss_of_labels

    def forward(self: Any, number: int) -> None:
        original[0](self, number)
        if number < SAMPLES:
            done[self.name].append(f"forward {number}")
        if (self.name, number) == ("sounds", 1):
            store.set(key, "yes")

    def backward(self: Any, number: int) -> None:
        original[1](self, number)
        if 0 <= number < SAMPLES:
            done[self.name].append(f"backward {number}")

    def loss_of_labels(micro_batches: Any, model: Any) -> Any:
        result = original[2](micro_batches, model)
        store.wait([key], timedelta(seconds=120))
        return result

    EncoderStream.forward, EncoderStream.backward = forward, backward  # type: ignore[method-assign]
    disjoint.loss_of_labels = loss_of_labels
    try:
        built = build(layout, Design(), expected.weights)
        loss = step(layout, Design(), built, samples_of(Design(), SAMPLES))
    finally:
        EncoderStream.forward, EncoderStream.backward = original[:2]  # type: ignore[method-assign]
        disjoint.loss_of_labels = original[2]
    assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
    return done


@pytest.mark.parametrize("distributed", [False, True])
def test_one_norm_clips_all_modules(ranks: RankPool, distributed: bool) -> None:
    design = Design()
    layout = DisjointLayout(
        images=Sizes(dp=2), language=Sizes(tp=2), distributed_optimizer=distributed
    )
    (expected,) = ranks(1)(run_reference, design, SAMPLES)
    norm = sum(float(one.double().norm()) ** 2 for one in expected.gradients.values()) ** 0.5
    assert norm > CLIP
    for found, zeros, errors in ranks(layout.world_size)(run_optimizer, layout, design, expected):
        assert found == pytest.approx(norm, rel=TOLERANCE)
        assert zeros > 0
        assert not {key: one for key, one in errors.items() if not one < TOLERANCE}


def run_optimizer(
    layout: DisjointLayout, design: Design, expected: Expected
) -> tuple[float, int, dict[str, float]]:
    """The norm, zeros in gradients, and errors of weights after a step of SGD on clipped ones."""
    from megatron.core.models.mimo import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig
    from megatron.mimo.layers import install_adam

    install_adam()
    built = build(layout, design, expected.weights)
    optimizer = get_mimo_optimizer(
        built.model,
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_eps=EPSILON,
            weight_decay=0.0,
            clip_grad=CLIP,
            log_num_zeros_in_grad=True,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
    )
    optimizer.zero_grad()
    step(layout, design, built, samples_of(design, SAMPLES))
    success, norm, zeros = optimizer.step()
    assert success
    total = sum(float(one.double().norm()) ** 2 for one in expected.gradients.values()) ** 0.5
    trained = dict(expected.weights)
    for key, gradient in expected.gradients.items():  # Adam's first step
        clipped = gradient * min(1.0, CLIP / (total + 1e-6))
        trained[key] = trained[key] - LEARNING_RATE * clipped / (clipped.abs() + EPSILON)
    errors = {part.name: part.error(part.parameter.data, trained) for part in built.held}
    return float(norm), int(zeros or 0), errors


def test_script_gives_what_stock_gives(ranks: RankPool) -> None:
    assert_gives_what_stock_gives(ranks, SCRIPT)


def test_refusals(ranks: RankPool) -> None:
    for said in ranks(4)(collect_refusals):
        assert {case: text for case, text in REFUSED.items() if text not in said[case]} == {}


REFUSED = {
    "on the language model's": "puts 'images' on ranks of the language model",
    "in part": "lets 'images' and 'sounds' share some of their ranks",
    "encoder cp": "encoders are parallel by tp, pp and dp",
    "averaged": "those of 'images' would be 1/2 of what they are",
}


def collect_refusals() -> dict[str, str]:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo import MimoModelConfig
    from megatron.core.models.mimo.errors import MimoError
    from megatron.core.models.mimo.model.grids.refusals import refuse_grids
    from megatron.core.transformer.spec_utils import ModuleSpec
    from tests.distributed.core.reference import transformer_config

    def grid(offset: int = 0, **sizes: int) -> Any:
        return HyperCommGrid([*sizes.values()], [*sizes], offset)

    two = {"images": grid(tp=1, dp=2), "sounds": grid(tp=1, dp=2), "language": grid(2, tp=1, dp=2)}
    one = {"language": grid(3, tp=1, dp=1)}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "on the language model's": (two | {"images": grid(2, tp=1, dp=2)}, {}),
        "in part": (two | {"sounds": grid(1, tp=1, dp=1)}, {}),
        "encoder cp": (two | {"images": grid(tp=1, cp=2), "sounds": grid(tp=1, cp=2)}, {}),
        "averaged": (two | one, {}),
    }
    said = {}
    for case, (grids, settings) in cases.items():
        config = transformer_config(calculate_per_token_loss=case != "averaged")
        with pytest.raises(MimoError) as error:
            refuse_grids(
                MimoModelConfig(
                    language_model_spec=ModuleSpec(module=object, params={"config": config}),
                    modality_submodules_spec={
                        name: ModuleSpec(object) for name in two if name != "language"
                    },
                    special_token_ids={"images": 30, "sounds": 31},
                    module_to_grid_map=grids,
                    **settings,
                )
            )
        said[case] = str(error.value)
    return said
