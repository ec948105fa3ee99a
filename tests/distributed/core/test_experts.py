"""Auxiliary losses of experts, and the padding that they do not count, under parallel layouts.

Megatron takes these losses per micro-batch, so that one process with the same micro-batches is what
a layout has to equal; the matrix has the experts themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.core.layouts import (
    Layout,
    Tensors,
    config_changes,
    copy_weights,
    model_inputs,
    wrap_chunks,
)
from tests.distributed.core.reference import (
    SEQUENCE,
    Design,
    build_model,
    make_batches,
    transformer_config,
)
from tests.distributed.core.whole import parts, whole
from tests.distributed.schedule import loss_of_labels, run_schedule
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

TOLERANCE = 1e-5
LAYOUTS = {
    "dp2-ep2": Layout(dp=2, ep=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True, etp=1),
    "cp2-ep2": Layout(cp=2, ep=2),
    "tp2-sp-cp2-ep2": Layout(tp=2, cp=2, ep=2, etp=1, sequence_parallel=True),
}


@dataclass(frozen=True, kw_only=True)
class Gradients:
    weights: Tensors
    gradients: Tensors


def run(
    layout: Layout, padded: bool, expected: Gradients | None = None
) -> Gradients | dict[str, float]:
    """Gradients of one batch on one process; on more, their relative errors."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    groups = model_parallel(tp=layout.tp, cp=layout.cp, ep=layout.ep, etp=layout.etp)
    design = Design(experts=4)
    config = transformer_config(
        design,
        finalize_model_grads_func=finalize_model_grads,
        **config_changes(layout),
        moe_aux_loss_coeff=0.5,
        moe_z_loss_coeff=0.1,
    )
    config.moe_router_load_balancing_type = "aux_loss"
    model = build_model(config, design, groups, first=True, last=True)
    if expected is not None:
        copy_weights([model], expected.weights)
    weights = {} if expected else whole(model, lambda parameter: parameter.data)
    (wrapped,) = wrap_chunks(layout, design, [model])
    wrapped.train()
    batch = make_batches()[0]
    mine = [batch[at : at + 2] for at in range(0, len(batch), 2)]
    mine = mine[parallel_state.get_data_parallel_rank() :: layout.dp]

    def forward_step(samples: Any, chunk: Any) -> Any:
        inputs = model_inputs(next(samples), layout, design, dtype=config.params_dtype, plan=True)
        if padded:
            lengths = torch.tensor([SEQUENCE - 3, SEQUENCE - 6])
            inputs["padding_mask"] = torch.arange(SEQUENCE) >= lengths[:, None]
            inputs["loss_mask"] = inputs["loss_mask"] * ~inputs["padding_mask"]
        return loss_of_labels(iter([inputs]), chunk)

    run_schedule([wrapped], mine, forward_step, seq_length=SEQUENCE, micro_batch_size=2)
    if expected is None:
        return Gradients(
            weights=weights, gradients=whole(model, lambda parameter: parameter.main_grad)
        )
    return {
        part.name: part.error(part.parameter.main_grad, expected.gradients) for part in parts(model)
    }


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[bool], Gradients]:
    return cache(lambda padded: ranks(1)(run, Layout(), padded)[0])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", some(LAYOUTS, "tp2-sp", "tp2-sp-cp2-ep2"))
def test_auxiliary_losses(
    ranks: RankPool, expected: Callable[[bool], Gradients], name: str, padded: bool
) -> None:
    wanted, other = expected(padded), expected(not padded)
    router = next(key for key in wanted.gradients if "router" in key)
    assert not torch.allclose(wanted.gradients[router], other.gradients[router], rtol=1e-2)
    layout = LAYOUTS[name]
    for errors in ranks(layout.world_size)(run, layout, padded, wanted):
        assert not {name: error for name, error in errors.items() if not error < TOLERANCE}
