from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.alignment import build_alignment_plan, with_row_index
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.micro_batches.batch import keep_for_stage
from megatron.mimo.data.micro_batches.broadcast import pack, unpack
from megatron.mimo.recipes.recipe import Datasets
from megatron.mimo.training.data import MicroBatches, SampleRange, split_datasets


class _Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise ValueError("broken")
        return index


def _read(start: int, micro: int, dp_size: int, steps: int) -> list[set[int]]:
    """Global batches of 8, as sets, over all data-parallel ranks."""
    per_step = 8 // (micro * dp_size)
    batches: list[set[int]] = [set() for _ in range(steps)]
    for rank in range(dp_size):
        numbers = SampleRange(
            start=start, period=None, micro_batch=micro, dp_rank=rank, dp_size=dp_size
        )
        for count, first in enumerate(islice(numbers, steps * per_step)):
            batches[count // per_step] |= set(range(first, first + micro))
    return batches


@pytest.mark.parametrize(("micro", "dp_size"), [(8, 1), (1, 1), (4, 2), (2, 2), (1, 8)])
def test_a_global_batch_holds_the_same_samples_in_every_layout(micro: int, dp_size: int) -> None:
    assert _read(16, micro, dp_size, 3) == [set(range(i, i + 8)) for i in (16, 24, 32)]


def test_evaluation_starts_over_after_its_period() -> None:
    numbers = SampleRange(start=0, period=8, micro_batch=2, dp_rank=1, dp_size=2)
    assert list(islice(numbers, 5)) == [2, 6, 2, 6, 2]


def _collate(samples: Sequence[Any]) -> dict[str, Any]:
    return {"numbers": list(samples)}


def test_a_short_dataset_is_read_again() -> None:
    batches = MicroBatches("training", _Numbers(4), _collate, 3)
    assert batches[2]["numbers"] == [2, 3, 0]


def test_a_sample_that_fails_is_named() -> None:
    batches = MicroBatches("training", _Numbers(8), _collate, 2)
    with pytest.raises(InputError, match=r"sample 5 of the training dataset .* ValueError: broken"):
        batches[4]


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="training dataset is empty"):
        MicroBatches("training", _Numbers(0), _collate, 2)


def test_a_batch_survives_the_journey() -> None:
    ids = torch.tensor([[1, 9, 9, 2], [3, 4, 5, 9]])
    plan = with_row_index(build_alignment_plan(ids, {"images": 9}))
    assert plan.index is not None
    batch = {
        "input_ids": ids,
        "loss_mask": torch.rand(2, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.rand(3).bfloat16(),
        "empty": torch.empty(0, 5),
        "strided": torch.arange(6).view(2, 3).t(),
        "modality_inputs": {"images": {"vit": {"pixel_values": torch.rand(3, 1, 2, 2)}}},
        "alignment_plan": plan,
        "name": "text",
    }
    found = unpack(*pack(batch))
    assert found.keys() == batch.keys()
    for name in ("input_ids", "loss_mask", "flags", "half", "empty", "strided"):
        torch.testing.assert_close(found[name], batch[name], rtol=0, atol=0)
    images = found["modality_inputs"]["images"]["vit"]["pixel_values"]
    assert torch.equal(images, batch["modality_inputs"]["images"]["vit"]["pixel_values"])
    assert found["alignment_plan"].counts == plan.counts
    assert torch.equal(found["alignment_plan"].text_ids_N, plan.text_ids_N)
    for name, value in vars(plan.index).items():
        there = getattr(found["alignment_plan"].index, name)
        assert torch.equal(there, value) if torch.is_tensor(value) else there == value
    assert found["name"] == "text"


def test_stages_get_what_they_need() -> None:
    batch = {
        "input_ids": torch.zeros(1, 2, dtype=torch.int64),
        "labels": torch.zeros(1, 2, dtype=torch.int64),
        "loss_mask": torch.ones(1, 2),
        "modality_inputs": {"images": {"vit": {"pixels": torch.ones(1), "n": torch.tensor([1])}}},
        "alignment_plan": object(),
    }
    first = keep_for_stage(batch, pre_process=True, post_process=False, dtype=torch.bfloat16)
    assert first.keys() == {"input_ids", "modality_inputs", "alignment_plan"}
    arguments = first["modality_inputs"]["images"]["vit"]
    assert arguments["pixels"].dtype == torch.bfloat16
    assert arguments["n"].dtype == torch.int64
    plan = build_alignment_plan(torch.tensor([[1, 9]]), {"images": 9})
    for index_plan in (False, True):
        kept = keep_for_stage(
            batch | {"alignment_plan": plan},
            pre_process=True,
            post_process=False,
            dtype=torch.float32,
            index_plan=index_plan,
        )
        assert (kept["alignment_plan"].index is not None) == index_plan
    last = keep_for_stage(batch, pre_process=False, post_process=True, dtype=torch.float32)
    assert last.keys() == {"input_ids", "labels", "loss_mask", "label_rows"}
    assert last["label_rows"].tolist() == [0, 1]
    kept = keep_for_stage(
        batch, pre_process=False, post_process=False, dtype=torch.float32, keep_plan=True
    )
    assert kept.keys() == {"input_ids", "alignment_plan"}


def test_an_evaluation_without_data_is_refused() -> None:
    args = Namespace(eval_iters=2, skip_train=False)
    train = _Numbers(4)

    def recipe(valid: Any) -> Any:
        datasets = Datasets(train=train, valid=valid, test=None)
        return Namespace(name="mine", build_datasets=lambda *_: datasets)

    with pytest.raises(ConfigError, match="--eval-iters 2: recipe 'mine' gave no validation"):
        split_datasets(recipe(None), args, (4, 4, 0))
    assert split_datasets(recipe(None), args, (4, 0, 0)).train is train
    assert split_datasets(recipe(train), args, (4, 4, 0)).valid is train
