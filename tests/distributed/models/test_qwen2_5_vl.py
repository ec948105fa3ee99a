"""Qwen2.5-VL beyond what every family shows: tied embeddings, packing, context parallelism.

Legend: L tokens of one sample, T of a packed sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.ranks import Layout, train
from tests.distributed.models.test_families import LOSSES, check
from tests.rank_pool import RankPool


def tie(config: Any) -> None:
    config.tie_word_embeddings = True


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Expected:
    (computed,) = ranks(1)(compute_expected, "qwen2_5_vl", tie, train=True)
    assert isinstance(computed, Expected)
    return computed


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=["one", "tp2", "pp2"]
)
def test_with_tied_embeddings(ranks: RankPool, expected: Expected, layout: Layout) -> None:
    check(ranks, "qwen2_5_vl", layout, expected)


def test_trains_as_a_plain_loop_does(ranks: RankPool, expected: Expected) -> None:
    layout = Layout(tp=2)
    assert expected.trained[-1] < 0.8 * expected.trained[0]
    for losses in ranks(layout.world_size)(train, "qwen2_5_vl", layout, expected):
        assert losses == pytest.approx(expected.trained, rel=LOSSES)


def packed_logits(name: str, expected: Expected, cp: int) -> list[float]:
    """Distance from transformers of this rank's logits of each sample, all packed together."""
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
    samples = [family.sample(config, example) for example in expected.examples]
    media = family.media(config)
    length = (sum(len(sample.token_ids) + 4 for sample in samples) // 32 + 1) * 32
    collator = PackingCollator(
        seq_length=length,
        vocab_size=config.text_config.vocab_size,
        pad_id=0,
        special_token_ids=media.special_token_ids,
        media_formats=media.formats,
        mrope=True,
        cp_size=cp,
    )
    batch = collator(samples)
    del batch["labels"]
    with torch.no_grad():
        logits_1TV, _ = model(**batch)
    borders = batch["packing_kwargs"]
    places = torch.tensor(borders.get("cu_seqlens_q_padded", borders["cu_seqlens_q"]))
    held_T = torch.arange(length)
    if cp > 1:
        held_T = packed_context_parallel_positions(
            places,
            total_tokens=length,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp,
        )
    return [
        _distance(logits_1TV[0], held_T, int(start), wanted_LV)
        for start, wanted_LV in zip(places, expected.logits, strict=False)
    ]


def _distance(logits_TV: Tensor, held_T: Tensor, start: int, wanted_LV: Tensor) -> float:
    mine_T = (held_T >= start) & (held_T < start + len(wanted_LV))
    assert mine_T.any()
    wanted_TV = wanted_LV[held_T[mine_T] - start]
    return (logits_TV[mine_T][:, : wanted_LV.size(1)] - wanted_TV).abs().max().item()


@pytest.mark.parametrize("cp", [1, 2])
def test_a_packed_row_has_the_logits_of_its_samples(
    ranks: RankPool, expected: Expected, cp: int
) -> None:
    for distances in ranks(cp)(packed_logits, "qwen2_5_vl", expected, cp):
        assert len(distances) == len(expected.examples)
        assert max(distances) < 1e-4
