"""The reference's model with every module on a grid of its own, and a step of it on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tests.distributed.core.layouts import (
    CLIP,
    EPSILON,
    LEARNING_RATE,
    SMALL_BUCKET,
    Deviation,
    Layout,
    Outcome,
    config_changes,
    copy_weights,
    model_inputs,
)
from tests.distributed.core.reference import (
    SEQUENCE,
    Design,
    Sample,
    build_model,
    make_batches,
    transformer_config,
)
from tests.distributed.core.whole import Part, parts
from tests.distributed.schedule import loss_of_labels, run_schedule
from tests.rank_pool import model_parallel

if TYPE_CHECKING:
    from megatron.mimo.topology import Component


@dataclass(frozen=True, kw_only=True)
class GridLayout(Layout):
    """The language model's layout, and what its encoders have.

    Attributes:
        images_tp, sounds_tp: tensor-parallel sizes.
        images_dp, sounds_dp: data-parallel sizes of encoders on ranks of their own; on those of
            the language model, what is left is data parallel.
        encoders: where they are: on the ranks of the "language" model, each on ranks of its own
            before these ("apart"), or both on the same ones before these ("together").
        activations: as ``EncodeFirst`` takes it.
    """

    images_tp: int = 1
    sounds_tp: int = 1
    images_dp: int = 1
    sounds_dp: int = 1
    encoders: str = "language"
    activations: str = "keep"

    @property
    def modules(self) -> dict[str, dict[str, int]]:
        """Sizes and first rank of each, the language model's last."""
        sizes = {
            "images": {"tp": self.images_tp, "dp": self.images_dp},
            "sounds": {"tp": self.sounds_tp, "dp": self.sounds_dp},
            "language": {name: getattr(self, name) for name in ("tp", "cp", "dp", "pp")},
        }
        of = {name: math.prod(own.values()) for name, own in sizes.items()}
        offsets = dict.fromkeys(sizes, 0)
        if self.encoders == "language":
            sizes["images"]["dp"] = of["language"] // self.images_tp
            sizes["sounds"]["dp"] = of["language"] // self.sounds_tp
        elif self.encoders == "together":
            offsets["language"] = of["images"]
        else:
            offsets |= {"sounds": of["images"], "language": of["images"] + of["sounds"]}
        return {name: {**own, "rank_offset": offsets[name]} for name, own in sizes.items()}

    @property
    def components(self) -> dict[str, Component]:
        """The modules as a run describes them."""
        from megatron.mimo.topology import Component

        return {name: Component(name=name, **own) for name, own in self.modules.items()}

    @property
    def group_sizes(self) -> dict[str, Any]:
        """What the global groups depend on; with the modules where they are apart."""
        apart = {} if self.encoders == "language" else {"modules": self.modules}
        return super().group_sizes | apart

    @property
    def world_size(self) -> int:
        language = self.modules["language"]  # behind all encoders, or on their ranks
        return language["rank_offset"] + super().world_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A rank's part of the job.

    Attributes:
        chunks: of the model, their modules wrapped.
        held: the parameters, found before they were wrapped.
        schedule: ``EncodeFirst``.
        grids: to be given back.
    """

    chunks: list[Any]
    held: list[Part]
    schedule: Any
    grids: Any

    @property
    def wrapped(self) -> list[Any]:
        """The modules that are trained."""
        every = [
            module
            for chunk in self.chunks
            for module in (chunk.language_model, *chunk.modality_submodules.values())
        ]
        return [module for module in every if hasattr(module, "bucket_groups")]


def language_groups(layout: Layout) -> Any:
    """Megatron's global groups of a layout, made anew; beside encoders apart, as runs have them.

    Collective.
    """
    from megatron.mimo.training.module_ranks import global_groups

    sizes = layout.group_sizes
    if isinstance(layout, GridLayout) and sizes.pop("modules", None):
        return model_parallel(**sizes, around=global_groups(layout.components))
    return model_parallel(**sizes)


def build(layout: GridLayout, design: Design, weights: Any, groups: Any = None) -> Built:
    """Collective; starts from whole weights, and makes the language model's groups unless given."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.mimo.model.encode_first import EncodeFirst
    from megatron.mimo.topology import build_grids, check_components

    if groups is None:
        groups = language_groups(layout)
    components = check_components(
        [*layout.components.values()],
        world_size=dist.get_world_size(),
        modalities=["images", "sounds"],
    )
    grids = build_grids(components)
    config = transformer_config(
        design, finalize_model_grads_func=finalize_model_grads, **config_changes(layout)
    )
    encodes_alone = dist.get_rank() not in components["language"].ranks
    count = 1 if encodes_alone else layout.vpp or 1
    chunks = [
        build_model(
            config,
            design,
            groups,
            first=parallel_state.is_pipeline_first_stage() and number == 0,
            last=parallel_state.is_pipeline_last_stage() and number == count - 1,
            vp_stage=None if layout.vpp is None else number,
            recompute_projections=layout.recompute == "projections",
            packed=layout.packed,
            grids=grids,
            inputs_of="language",
        )
        for number in range(count)
    ]
    copy_weights(chunks, weights)
    held = [part for chunk in chunks for part in parts(chunk)]
    for number, chunk in enumerate(chunks):
        wrap(chunk, layout, grids, number)
    return Built(
        chunks=chunks,
        held=held,
        schedule=EncodeFirst(chunks, activations=layout.activations),
        grids=grids,
    )


def wrap(model: Any, layout: GridLayout, grids: Any, number: int = 0) -> None:
    """Every module that is trained in a wrapper of its own groups; in bf16, as Megatron has it."""
    wrap_modules(model, layout, {**grids.groups, "language": None}, number)


def wrap_modules(
    model: Any, layout: GridLayout, groups: Mapping[str, Any], number: int = 0
) -> None:
    """As ``wrap``; a module without groups has Megatron's global ones."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    def wrapped(module: Any, own: Any) -> Any:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        ddp_config = DistributedDataParallelConfig(
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            use_distributed_optimizer=layout.distributed_optimizer,
            grad_reduce_in_fp32=True,
            bucket_size=SMALL_BUCKET,
        )
        return DistributedDataParallel(
            model.config, ddp_config, module, disable_bucketing=number > 0, pg_collection=own
        )

    if model.config.bf16:
        model.bfloat16()
    if model.language_model is not None:
        model.language_model = wrapped(model.language_model, groups["language"])
    for name, module in model.modality_submodules.items():
        model.modality_submodules[name] = wrapped(module, groups[name])


def step(layout: GridLayout, design: Design, built: Built, batch: list[Sample]) -> float:
    """Forward and backward of a global batch by ``EncodeFirst``; the loss on every rank."""
    from megatron.core import parallel_state

    # Ranks of encoders alone have a data-parallel group of their own, and as many micro-batches.
    dp_rank, size = parallel_state.get_data_parallel_rank() % layout.dp, layout.micro_batch
    mine = [batch[i : i + size] for i in range(0, len(batch), size)][dp_rank :: layout.dp]
    dtype = built.chunks[0].config.params_dtype
    batches = [
        # A plan in every other micro-batch: both ways have to give the same.
        model_inputs(samples, layout, design, dtype=dtype, plan=number % 2 == 0)
        for number, samples in enumerate(mine)
    ]
    for one in batches:
        for encoder in one["modality_inputs"].get("images", {}).values():
            encoder["pixel_values"] = encoder["pixel_values"].to(dtype)
    for chunk in built.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return run_schedule(
        built.chunks,
        batches,
        loss_of_labels,
        seq_length=SEQUENCE * size if layout.packed else SEQUENCE,
        micro_batch_size=1 if layout.packed else size,
        schedule=built.schedule,
    )


def run_gradients(layout: GridLayout, design: Design, reference: Outcome) -> Deviation:
    """Loss and gradients of every batch, with weights as they are; runs on every rank."""
    built = build(layout, design, reference.weights)
    losses: list[float] = []
    errors: dict[str, float] = {}
    covered: dict[str, set[tuple[Any, ...]]] = {}
    batches = make_batches(design)
    for batch, gradients in zip(batches, reference.gradients, strict=True):
        losses.append(step(layout, design, built, batch))
        for part in built.held:
            if part.parameter.requires_grad:
                gradient = part.parameter.main_grad
                unused = part.key not in gradients  # by no sample
                error = float(gradient.norm()) if unused else part.error(gradient, gradients)
                errors[part.name] = max(errors.get(part.name, 0.0), error)
                covered.setdefault(part.key, set()).add(part.span())
    return Deviation(losses=losses, errors=errors, norms=[], covered=covered)


def run_training(layout: GridLayout, design: Design, reference: Outcome) -> Deviation:
    """A step of the optimizer per batch; compares weights after the last."""
    built = build(layout, design, reference.weights)
    optimizer = make_optimizer(built, layout)
    losses, norms = [], []
    for batch in make_batches(design):
        optimizer.zero_grad()
        losses.append(step(layout, design, built, batch))
        success, norm, _ = optimizer.step()
        assert success
        norms.append(float(norm))
    if layout.overlap_param_gather:
        for chunk in built.chunks:
            chunk.disable_forward_pre_hook()
    errors, covered = {}, {}
    for part in built.held:
        errors[part.name] = part.error(part.parameter.data, reference.trained)
        covered.setdefault(part.key, set()).add(part.span())
    return Deviation(losses=losses, errors=errors, norms=norms, covered=covered)


def make_optimizer(built: Built, layout: GridLayout) -> Any:
    from megatron.core.models.mimo import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig
    from megatron.mimo.layers import install_adam

    if layout.distributed_optimizer:
        install_adam()
    config = built.chunks[0].config
    return get_mimo_optimizer(
        built.chunks if len(built.chunks) > 1 else built.chunks[0],
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_beta1=0.9,
            adam_beta2=0.99,
            adam_eps=EPSILON,
            weight_decay=0.0,
            clip_grad=CLIP,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
    )
