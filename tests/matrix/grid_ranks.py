"""A cell on module grids, on one rank."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from tests.distributed.core.grids import GridLayout, build, make_optimizer, step
from tests.distributed.core.reference import Design, make_batches
from tests.matrix.ranks import Expected, Seen, gather_gradients


def run_grid_cell(
    layout: GridLayout, design: Design, expected: Expected, groups: Any, start: float
) -> Seen:
    """As ``_run_cell``, with ``EncodeFirst`` and one optimizer for each module."""
    built = build(layout, design, expected.weights, groups)
    optimizer = make_optimizer(built, layout)
    gradients: dict[str, float] = {}
    losses, norms = [], []
    for number, batch in enumerate(make_batches(design)):
        optimizer.zero_grad()
        losses.append(step(layout, design, built, batch))
        if number == 0:
            if layout.distributed_optimizer:
                gather_gradients(built.wrapped)
            for index, part in enumerate(built.held):
                if part.parameter.requires_grad:
                    error = part.error(part.parameter.main_grad, expected.gradients)
                    gradients[f"{index}:{part.name}"] = error
        success, norm, _ = optimizer.step()
        assert success
        norms.append(float(norm))
    if layout.overlap_param_gather:
        for chunk in built.chunks:
            chunk.disable_forward_pre_hook()
    trained: dict[str, float] = {}
    covered: dict[str, set[tuple[Any, ...]]] = {}
    for index, part in enumerate(built.held):
        trained[f"{index}:{part.name}"] = part.error(part.parameter.data, expected.trained)
        covered.setdefault(part.key, set()).add(part.span())
    dist.barrier()  # nobody destroys a group that another still uses
    built.schedule.destroy()
    built.grids.destroy()
    return Seen(
        gradients=gradients,
        trained=trained,
        losses=losses,
        norms=norms,
        covered=covered,
        seconds=time.perf_counter() - start,
    )
