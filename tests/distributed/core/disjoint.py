"""The reference's model with every module on ranks of its own, and a step of it on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.core.grids import GridLayout, wrap_modules
from tests.distributed.core.layouts import copy_weights, model_inputs
from tests.distributed.core.reference import (
    SEQUENCE,
    Design,
    Sample,
    build_model,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, parts
from tests.distributed.schedule import SUM_AND_COUNT, Sizes, loss_of_labels
from tests.rank_pool import model_parallel

MODULES = ("images", "sounds", "language")


@dataclass(frozen=True, kw_only=True)
class DisjointLayout:
    """Sizes of the modules; each begins at the rank behind the one before, unless it is given.

    Attributes:
        together: sounds are on the ranks of images.
        by: "encode first", or "stages": Megatron's schedule for several modules.
        sequence_parallel, distributed_optimizer, overlap: as their flags have it.
    """

    images: Sizes = field(default_factory=Sizes)
    sounds: Sizes = field(default_factory=Sizes)
    language: Sizes = field(default_factory=Sizes)
    together: bool = False
    by: str = "stages"
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False

    @property
    def offsets(self) -> dict[str, int]:
        second = 0 if self.together else self.images.world_size
        return {"images": 0, "sounds": second, "language": second + self.sounds.world_size}

    @property
    def world_size(self) -> int:
        return self.offsets["language"] + self.language.world_size

    def own(self, **changes: Any) -> GridLayout:
        """What ``model_inputs`` and ``wrap_modules`` read."""
        return GridLayout(
            overlap_grad_reduce=self.overlap,
            distributed_optimizer=self.distributed_optimizer,
            **changes,
        )


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module's grid, its groups where this rank has it, and groups of this rank alone."""

    grid: Any
    groups: Any
    elsewhere: Any


def make_modules(layout: DisjointLayout) -> dict[str, Module]:
    """Collective over the job."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.config.grids import groups_of, is_on
    from megatron.core.process_groups_config import ProcessGroupCollection

    found = {}
    alone: Any = dist.new_subgroups_by_enumeration([[rank] for rank in range(layout.world_size)])[0]
    single = ProcessGroupCollection(tp=alone, cp=alone, dp=alone, pp=alone)
    for name in MODULES:
        size = getattr(layout, name)
        axes = {"tp": size.tp, "cp": size.cp, "dp": size.dp, "pp": size.pp}
        grid = HyperCommGrid([*axes.values()], [*axes], layout.offsets[name])
        for of in (*axes, ["dp", "cp"], ["tp", "pp"], ["tp", "cp"], [*axes]):
            grid.create_pg(of)
        groups = None
        if is_on(grid):
            groups = groups_of(name, grid)
            groups.tp_cp = grid.get_pg(["tp", "cp"])
            groups.ep = groups.embd = groups.pos_embd = alone
            groups.expt_tp = groups.tp_ep = groups.tp
            groups.tp_dp_cp = groups.intra_dist_opt
        found[name] = Module(grid=grid, groups=groups, elsewhere=single)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A rank's part of the job: its wrapped model, what it held before, and the modules."""

    model: Any
    held: list[Any]
    modules: dict[str, Module]
    schedule: Any


def build(layout: DisjointLayout, design: Design, weights: Tensors) -> Built:
    """Collective; starts from whole weights."""
    model_parallel()  # for its buffers and generators
    modules = make_modules(layout)
    size = layout.language
    config = transformer_config(
        design,
        tensor_model_parallel_size=size.tp,
        context_parallel_size=size.cp,
        pipeline_model_parallel_size=size.pp,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.by == "stages",
        moe_token_dispatcher_type="alltoall",
        finalize_model_grads_func=None,
    )
    own = {name: one.groups or one.elsewhere for name, one in modules.items()}
    language = own["language"]
    model = build_model(
        config,
        design,
        language,
        first=language.pp.rank() == 0,
        last=language.pp.rank() == size.pp - 1,
        grids=SimpleNamespace(
            by_module={name: one.grid for name, one in modules.items()},
            groups=own,
        ),
        inputs_of="language" if layout.by == "encode first" else "encoders",
    )
    copy_weights([model], weights)
    held = list(parts(model))
    wrap_modules(model, layout.own(), own)
    return Built(
        model=model, held=held, modules=modules, schedule=_schedule(layout, model, modules)
    )


def _schedule(layout: DisjointLayout, model: Any, modules: dict[str, Module]) -> Any:
    from functools import partial

    from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
    from megatron.core.models.mimo.comm.bridge_grid import grid_for_pipeline
    from megatron.core.models.mimo.model.encode_first import EncodeFirst
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.multimodule_communicator import (
        MultiModulePipelineCommunicator,
    )
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

    groups = modules["language"].groups
    if layout.by == "encode first":
        model.config.finalize_model_grads_func = finalize_model_grads
        inner: Any = schedules.forward_backward_no_pipelining
        if groups is not None and layout.language.pp > 1:
            inner = partial(
                schedules.forward_backward_pipelining_without_interleaving,
                p2p_communicator=P2PCommunicator(groups.pp, model.config),
            )
        return partial(EncodeFirst([model], schedule=inner), pg_collection=groups)

    def finalize(_: Any, num_tokens: torch.Tensor, **__: Any) -> None:
        counts = (
            groups is not None
            and groups.tp.rank() == 0
            and groups.pp.rank() == groups.pp.size() - 1
        )
        num_tokens *= counts
        dist.all_reduce(num_tokens)
        for module in (model.language_model, *model.modality_submodules.values()):
            if isinstance(module, DistributedDataParallel):
                module.finish_grad_sync()
                module.scale_gradients(1.0 / num_tokens.item())

    model.config.finalize_model_grads_func = finalize
    grids = {name: one.grid for name, one in modules.items()}
    grids["language"] = grid_for_pipeline(grids["language"])
    held = {name: one.groups for name, one in modules.items() if one.groups is not None}
    return partial(
        schedules.forward_backward_pipelining_without_interleaving,
        p2p_communicator=MultiModulePipelineCommunicator(
            grids,
            {"images": ["language"], "sounds": ["language"], "language": []},
            model.config,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            module_output_ndim={"images": 2, "sounds": 2},
        ),
        pg_collection=MultiModuleProcessGroupCollection(
            held, "language" if "language" in held else None
        ),
    )


def step(layout: DisjointLayout, design: Design, built: Built, samples: list[Sample]) -> float:
    """Forward and backward of a global batch; its loss on every rank."""
    built.model.train()
    built.model.zero_grad_buffer()
    batches = micro_batches(layout, design, built, samples)
    reports = built.schedule(
        forward_step_func=loss_of_labels,
        data_iterator=iter(batches),
        model=[built.model],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=batches[0]["input_ids"].size(0),
        forward_only=False,
    )
    total = torch.zeros(2, dtype=torch.float64)
    language = built.modules["language"].groups
    if reports and language.tp.rank() == 0:
        total += torch.stack([report[SUM_AND_COUNT] for report in reports]).double().sum(dim=0)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def micro_batches(
    layout: DisjointLayout, design: Design, built: Built, samples: list[Sample]
) -> list[dict[str, Any]]:
    """Of this rank: of every module that it has, the share of its replica."""
    sizes = {name: getattr(layout, name).dp for name in MODULES}
    together = math.lcm(*sizes.values())
    batches = []
    for start in range(0, len(samples), together):
        chunk = samples[start : start + together]
        own = {}
        for name, module in built.modules.items():
            at = 0 if module.groups is None else module.groups.dp.rank()
            share = together // sizes[name]
            plan = name == "language" and start % 2 == 0
            own[name] = model_inputs(
                chunk[at * share : (at + 1) * share],
                layout.own(),
                design,
                dtype=torch.float32,
                plan=plan,
            )
        here = [name for name in MODULES if built.modules[name].groups is not None]
        batch = own[here[-1]]
        if layout.by == "stages":
            batch["modality_inputs"] = {
                name: own[name]["modality_inputs"][name]
                for name in here
                if name in own[name]["modality_inputs"]
            }
        batches.append(batch)
    return batches
