"""All samples in one packed row: the logits of each, against transformers'.

Legend: L tokens of one sample, T of a packed sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.distributed.models.expected import Expected
from tests.distributed.models.ranks import collating


def packed_logits(name: str, expected: Expected, cp: int) -> list[float]:
    """Distance from transformers of this rank's logits of each sample, all packed together.

    Of a sample so short that this rank holds none of it there is none.
    """
    from megatron.core import parallel_state
    from megatron.core.models.mimo.alignment.cut import packed_context_parallel_positions
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.data import PackingCollator
    from megatron.mimo.models import load_family
    from tests.rank_pool import model_parallel

    model_parallel(cp=cp)
    family = load_family(name)
    config = expected.config
    settings = model_settings(family, config, changes={"context_parallel_size": cp})
    model = build_model(family, config, settings, device=torch.device("cpu"))
    load_hugging_face(model, expected.weights, family.keys(config))
    row = 8 * cp * (sum(len(one) // (8 * cp) + 1 for one in expected.logits) + 1)
    samples = [family.sample(config, example) for example in expected.examples]
    collator = PackingCollator(seq_length=row, cp_size=cp, **collating(family, config))
    batch = collator(samples)
    del batch["labels"]
    with torch.no_grad():
        logits_1TV, _ = model(**batch)
    borders = batch["packing_kwargs"]
    places = torch.tensor(borders.get("cu_seqlens_q_padded", borders["cu_seqlens_q"]))
    held_T = torch.arange(row)
    if cp > 1:
        held_T = packed_context_parallel_positions(
            places,
            total_tokens=row,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp,
        )
    found = [
        _distance(logits_1TV[0], held_T, int(start), wanted_LV)
        for start, wanted_LV in zip(places, expected.logits, strict=False)
    ]
    return [distance for distance in found if distance is not None]


def _distance(logits_TV: Tensor, held_T: Tensor, start: int, wanted_LV: Tensor) -> float | None:
    mine_T = (held_T >= start) & (held_T < start + len(wanted_LV))
    if not mine_T.any():
        return None
    wanted_TV = wanted_LV[held_T[mine_T] - start]
    return (logits_TV[mine_T][:, : wanted_LV.size(1)] - wanted_TV).abs().max().item()
