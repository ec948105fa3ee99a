"""MimoModel on several ranks: what is refused everywhere alike, and batches at the edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.core.reference import (
    IMAGE,
    PATCHES,
    PIXELS,
    SEQUENCE,
    VOCABULARY,
    Design,
    build_model,
    transformer_config,
)
from tests.rank_pool import RankPool, model_parallel


def model_on_ranks(**sizes: int) -> Any:
    groups = model_parallel(**sizes)
    config = transformer_config(
        tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        sequence_parallel=groups.tp.size() > 1,
    )
    return build_model(config, Design(), groups, first=True, last=True)


def batch_of(ids_BS: torch.Tensor) -> dict[str, Any]:
    images = int((ids_BS == IMAGE).sum()) // PATCHES
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": ids_BS,
        "position_ids": torch.arange(ids_BS.size(1)).expand_as(ids_BS),
        "labels": torch.zeros_like(ids_BS),
        "modality_inputs": {
            "images": {"vit": {"pixel_values": torch.randn(images, *PIXELS, generator=generator)}}
        },
    }


def refuse_wrong_batches() -> None:
    model = model_on_ranks(tp=2)
    ids_BS = torch.ones(2, SEQUENCE, dtype=torch.long)
    for wrong, message in (
        (ids_BS.index_fill(1, torch.tensor([3]), VOCABULARY), rf"\[0, 3\] is {VOCABULARY}"),
        (ids_BS.index_fill(1, torch.tensor([3]), -4), r"\[0, 3\] is -4"),
        (ids_BS.index_fill(1, torch.arange(3), IMAGE), r"images tokens \(6\).*embeddings \(4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch_of(wrong))
    odd = batch_of(ids_BS[:, :-1])
    with pytest.raises(AssertionError, match=r"length 15 should be divisible by 2.*pad it to 16"):
        model(**odd)
    losses_BS, _ = model(**batch_of(ids_BS))  # nothing is left over of the calls that failed
    assert losses_BS.isfinite().all()


def test_wrong_batches_are_refused_on_every_rank(ranks: RankPool) -> None:
    ranks(2)(refuse_wrong_batches)


def sum_losses(ids_BS: torch.Tensor, **sizes: int) -> tuple[float, float]:
    """Sum of losses, and norm of the gradient of a replicated encoder parameter."""
    torch.manual_seed(0)
    model = model_on_ranks(**sizes)  # initialised on the CPU: cut from the same whole weights
    total = model(**batch_of(ids_BS))[0].sum()
    total.backward()
    position = model.modality_submodules["images"].encoders["vit"].position_embedding
    return total.item(), position.grad.norm().item()


EDGES = {
    "no text at all": torch.full((2, SEQUENCE), IMAGE),
    "text of one rank only": torch.full((2, SEQUENCE), IMAGE).index_fill(1, torch.arange(8), 3),
    "text only": torch.full((2, SEQUENCE), 3),
    "one sample of images only": torch.tensor([[IMAGE] * SEQUENCE, [3] * SEQUENCE]),
}


@pytest.mark.parametrize("ids_BS", EDGES.values(), ids=EDGES)
def test_edges_of_sequence_parallelism(ranks: RankPool, ids_BS: torch.Tensor) -> None:
    (alone,) = ranks(1)(sum_losses, ids_BS)
    for result in ranks(2)(sum_losses, ids_BS, tp=2):
        assert result == pytest.approx(alone, rel=1e-5, abs=1e-6)


def refuse_scattering() -> None:
    from megatron.core.models.mimo import MimoModel

    model = model_on_ranks(tp=2)
    config = model.mimo_config
    config.language_model_spec.params["scatter_embedding_sequence_parallel"] = True
    with pytest.raises(RuntimeError, match="embedding scatter to be disabled"):
        MimoModel(config)
    model.language_model.embedding.scatter_to_sequence_parallel = True  # by a script, afterwards
    ids_BS = torch.ones(2, SEQUENCE, dtype=torch.long)
    with pytest.raises(RuntimeError, match="embedding scatter to be disabled"):
        model(**batch_of(ids_BS))
    with pytest.raises(RuntimeError, match="embedding scatter to be disabled"):
        model.get_text_embeddings(ids_BS, None, model.special_token_ids)


def test_scattering_embedding_is_refused(ranks: RankPool) -> None:
    ranks(2)(refuse_scattering)


def refuse_dense_mask() -> None:
    model = model_on_ranks(cp=2)
    batch = batch_of(torch.ones(2, SEQUENCE, dtype=torch.long))
    mask = torch.zeros(2, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="context parallelism requires attention_mask=None"):
        model(**batch, attention_mask=mask)


def test_dense_mask_is_refused_under_context_parallelism(ranks: RankPool) -> None:
    ranks(2)(refuse_dense_mask)
