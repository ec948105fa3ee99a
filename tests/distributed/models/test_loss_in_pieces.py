"""A family's loss in pieces, and of label positions, is the plain one, as are all gradients."""

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


def all_ways(layout: Layout, tied: bool, words: int) -> None:
    """Compares losses and gradients with those of the plain way; runs on every rank."""
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
    rows = batch | {"label_rows": own_label_rows(batch)}
    found: list[dict[str, Tensor]] = []
    weights: Any = None
    ways = [(2**30, batch), (0, batch)]
    if tied == (words == 64):
        ways += [(2**30, rows), (0, rows)]
    for whole_logits, given in ways:
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
            if parallel_state.is_pipeline_last_stage():
                values["losses"] = losses_BS.detach() * mask_BS

            def total(losses_BS: Tensor) -> Any:
                summed, count = (losses_BS * mask_BS).sum(), mask_BS.sum()
                report = {"sum and count": torch.stack([summed.detach(), count])}
                return summed, count.int(), report

            return losses_BS, total

        run_schedule([wrap_plainly(model)], [given], step, seq_length=16, micro_batch_size=2)
        for name, parameter in model.named_parameters():
            values[name] = parameter.main_grad.clone()
        found.append(values)
    plain, *others = found
    for name, value in [pair for other in others for pair in other.items()]:
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(plain.keys() == other.keys() for other in others)


def own_label_rows(batch: dict[str, Tensor]) -> Tensor:
    """Of this context-parallel rank."""
    from megatron.core import parallel_state
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from megatron.core.models.mimo.model.language.label_rows import find_label_rows

    cut = SequenceCut(
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )
    shares = (cut.context_share(batch[name]) for name in ("labels", "loss_mask"))
    return find_label_rows(*shares)


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
    ranks(wanted.world_size)(all_ways, wanted, *WEIGHTS[weights])


def logits_of_rows(with_rows: bool) -> tuple[list[int], float]:
    """Shape of the logits, and the loss of a micro-batch in which two positions have a label."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.data.micro_batches.batch import keep_for_stage
    from megatron.mimo.models import load_family

    model_parallel()
    family = load_family("llava")
    config = family.tiny()
    config.text_config.vocab_size = 64
    torch.manual_seed(3)
    model = build_model(family, config, model_settings(family, config), device=torch.device("cpu"))
    ids_BS = torch.arange(6, 38).view(2, 16)
    mask_BS = torch.zeros(2, 16).index_fill(1, torch.tensor([9]), 1.0)
    batch = {"input_ids": ids_BS, "labels": ids_BS.roll(-1, 1), "loss_mask": mask_BS}
    kept = keep_for_stage(batch, pre_process=True, post_process=True, dtype=torch.float32)
    assert kept["label_rows"].tolist() == [18, 19]
    if not with_rows:
        del kept["label_rows"]
    shapes: list[list[int]] = []
    model.language_model.output_layer.register_forward_hook(
        lambda _, __, output: shapes.append(list(output[0].shape))
    )
    losses_BS, mask_BS = model(**kept, position_ids=torch.arange(16).expand(2, -1))
    return shapes[0], float((losses_BS * mask_BS).sum())


def test_positions_without_a_label_have_no_logits(ranks: RankPool) -> None:
    ((whole, loss),) = ranks(1)(logits_of_rows, False)
    ((few, loss_of_rows),) = ranks(1)(logits_of_rows, True)
    assert (whole[:2], few[:2]) == ([16, 2], [2, 1])
    assert loss_of_rows == pytest.approx(loss, rel=1e-6)
    assert loss > 0
