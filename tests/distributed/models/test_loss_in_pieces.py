"""A family's loss that is computed piece by piece is the plain one, as are all gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.models.ranks import Layout
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import crossed

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, changes={"sequence_parallel": True}),
    "cp2": Layout(cp=2),
    "pp2": Layout(pp=2),
}


def both(layout: Layout, tied: bool, words: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What is computed -> by the plain way, and in pieces; runs on every rank."""
    from megatron.core import parallel_state
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.models import load_family
    from tests.distributed.schedule import run_schedule, wrap_plainly

    model_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp)
    family = load_family("llava")
    config = family.tiny()
    config.text_config.vocab_size = words
    config.tie_word_embeddings = tied
    changes = {"context_parallel_size": layout.cp, **layout.changes}
    settings = model_settings(family, config, tp_size=layout.tp, pp_size=layout.pp, changes=changes)
    generator = torch.Generator().manual_seed(2)
    ids_BS = torch.randint(6, words, (2, 16), generator=generator)
    batch = {
        "input_ids": ids_BS,
        "position_ids": torch.arange(16).expand(2, -1),
        "labels": ids_BS.roll(-1, dims=1),
        "loss_mask": (torch.rand(2, 16, generator=generator) < 0.7).float(),
    }
    found: list[dict[str, Tensor]] = []
    weights: Any = None
    for whole_logits in (2**30, 0):
        cut = dataclasses.replace(settings, whole_logits=whole_logits)
        model = build_model(family, config, cut, device=torch.device("cpu"))
        if weights is not None:
            model.load_state_dict(weights)
        weights = {name: value for name, value in model.state_dict().items() if value is not None}
        values: dict[str, Tensor] = {}
        if parallel_state.is_pipeline_last_stage():
            assert model.language_model._cuts_loss(32) == (whole_logits == 0)

        def step(batches: Any, wrapped: Any, values: dict[str, Tensor] = values) -> Any:
            losses_BS, mask_BS = wrapped(**next(batches))
            values["losses"] = losses_BS.detach()

            def total(losses_BS: Tensor) -> Any:
                summed, count = (losses_BS * mask_BS).sum(), mask_BS.sum()
                report = {"sum and count": torch.stack([summed.detach(), count])}
                return summed, count.int(), report

            return losses_BS, total

        run_schedule([wrap_plainly(model)], [batch], step, seq_length=16, micro_batch_size=2)
        for name, parameter in model.named_parameters():
            values[name] = parameter.main_grad.clone()
        if not parallel_state.is_pipeline_last_stage():
            del values["losses"]  # hidden states
        found.append(values)
    plain, pieces = found
    assert plain.keys() == pieces.keys()
    return {name: (plain[name], pieces[name]) for name in plain}


WEIGHTS = {  # whether they are tied, and the size of the vocabulary
    "untied-padded": (False, 77),
    "tied-whole": (True, 64),
    "untied-whole": (False, 64),
    "tied-padded": (True, 77),
}


@pytest.mark.parametrize(
    ("layout", "weights"),
    crossed(LAYOUTS, ("untied-padded", "tied-whole"), wide=("untied-whole", "tied-padded")),
)
def test_equals_the_plain_loss(ranks: RankPool, layout: str, weights: str) -> None:
    wanted = LAYOUTS[layout]
    for values in ranks(wanted.world_size)(both, wanted, *WEIGHTS[weights]):
        for name, (plain, pieces) in values.items():
            torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6, msg=name)
