"""The loss of label positions alone equals that of all; who cannot compute it refuses to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel
from tests.unit.core.mimo.tiny import build, inputs, mimo_config


def find(labels: list[list[int]], mask: list[list[float]] | None) -> list[int]:
    from megatron.core.models.mimo.model.language.label_rows import find_label_rows

    mask_BS = None if mask is None else torch.tensor(mask)
    return find_label_rows(torch.tensor(labels), mask_BS).tolist()


def test_rows_of_labels() -> None:
    assert find([[1, -100, 3], [4, 5, -100]], None) == [0, 1, 3, 4]
    assert find([[1, -100, 3], [4, 5, 6]], [[1, 1, 0], [0, 0.5, 1]]) == [0, 3, 5]
    assert find([[1, 2]], [[0, 0]]) == [0]  # one is computed for nothing


def check_equals_the_loss_of_all() -> None:
    """With labels of -100, masked positions, and without any label."""
    from megatron.core.models.mimo.model.language.label_rows import find_label_rows

    for tied in (False, True):
        model = build(share_embeddings_and_output_weights=tied)
        assert model.takes_label_rows
        for some in (True, False):
            batch = inputs()
            batch["labels"][0, 2:5] = -100
            batch["loss_mask"] = torch.zeros(2, 8)
            if some:
                batch["loss_mask"][:, 1::2] = 0.5
            rows_K = find_label_rows(batch["labels"], batch["loss_mask"])
            assert len(rows_K) == (7 if some else 1)
            results = []
            for given in (batch, batch | {"label_rows": rows_K}):
                model.zero_grad()
                losses_BS, mask_BS = model(**given)
                (losses_BS * mask_BS).sum().backward()
                grads = [p.grad for p in model.parameters()]
                assert all(grad is not None for grad in grads)
                results.append([losses_BS.detach() * mask_BS, *grads])
            assert torch.count_nonzero(losses_BS) == len(rows_K)
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


def check_refusal() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import MimoModel
    from megatron.core.models.mimo.errors import UnsupportedError

    class Own(GPTModel):  # type: ignore[misc]
        def forward(
            self,
            input_ids: Any,
            position_ids: Any,
            attention_mask: Any,
            decoder_input: Any = None,
            labels: Any = None,
            packed_seq_params: Any = None,
        ) -> Any:
            given = {"decoder_input": decoder_input, "labels": labels}
            return super().forward(input_ids, position_ids, attention_mask, **given)

    model_parallel()
    config = mimo_config()
    config.language_model_spec.module = Own
    model = MimoModel(config)
    assert not model.takes_label_rows
    assert model(**inputs())[0].shape == (2, 8)
    with pytest.raises(UnsupportedError, match="label_rows with a Own, which computes"):
        model(**inputs(), label_rows=torch.tensor([0]))


@pytest.mark.parametrize("check", [check_equals_the_loss_of_all, check_refusal])
def test_loss_of_label_rows(ranks: RankPool, check: Callable[[], Any]) -> None:
    ranks(1)(check)
