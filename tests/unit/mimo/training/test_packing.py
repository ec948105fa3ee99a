from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data import PackingCollator, Sample, SampleCollator
from megatron.mimo.recipes.recipe import Datasets, Recipe
from megatron.mimo.training.data import pack_training_set, packing_collator

LENGTH = 10


class Texts(torch.utils.data.Dataset[Sample]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        ids_L = torch.full((LENGTH,), index % 7)
        return Sample(name=str(index), token_ids=ids_L, is_label=ids_L >= 0)


def collator(kind: type[SampleCollator] = SampleCollator) -> SampleCollator:
    return kind(
        seq_length=64, vocab_size=8, pad_id=7, special_token_ids={}, media_formats={}, mrope=True
    )


def arguments(**changes: Any) -> Namespace:
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    return Namespace(**({"seq_length": 64, "sequence_parallel": True} | sizes | changes))


def recipe(most: int) -> Recipe:
    def refuse(*_: Any) -> Any:
        raise AssertionError("not asked for")

    return Recipe(
        name="texts",
        summary="",
        arguments={},
        build_model=refuse,
        build_datasets=lambda _, counts: Datasets(
            train=Texts(min(counts[0], most)), valid=None, test=None
        ),
        build_collator=refuse,
    )


def test_a_recipes_collator_packs_with_its_own_settings() -> None:
    packing = packing_collator("texts", arguments(), collator())
    assert type(packing) is PackingCollator
    assert (packing.cp_size, packing.tp_size, packing.seq_length) == (2, 2, 64)
    assert packing.mrope
    assert packing_collator("texts", arguments(sequence_parallel=False), collator()).tp_size == 1

    class Own(SampleCollator):
        pass

    with pytest.raises(ConfigError, match="--pack with recipe 'texts', whose collator is a Own"):
        packing_collator("texts", arguments(), collator(Own))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_run_of_n_rows_reads_new_samples_in_each(cp_size: int) -> None:
    args = arguments(context_parallel_size=cp_size)
    packing = packing_collator("texts", args, collator())
    rows = pack_training_set(recipe(10**6), args, (20, 0, 0), Texts(20), packing)
    assert len(rows) >= 20
    names = [sample.name for number in range(20) for sample in rows[number]]
    assert names == [str(number) for number in range(80)]  # four of 16 in each 64, for every cp


def test_a_dataset_that_cannot_grow_is_read_again() -> None:
    packing = packing_collator("texts", arguments(), collator())
    rows = pack_training_set(recipe(10), arguments(), (20, 0, 0), Texts(10), packing)
    assert [len(rows[number]) for number in range(len(rows))] == [4, 4, 2]


class Mixed(Texts):
    """Long samples first, as in a file sorted by length: 5 rows of one each, then 60 in a row."""

    def __getitem__(self, index: int) -> Sample:
        ids_L = torch.zeros(60 - index if index < 5 else 8 + index % 5, dtype=torch.long)
        return Sample(name=str(index), token_ids=ids_L, is_label=ids_L >= 0)


def mixed_rows(count: int, most: int = 10**6) -> list[list[str]]:
    run = replace(
        recipe(most),
        build_datasets=lambda _, counts: Datasets(
            train=Mixed(min(counts[0], most)), valid=None, test=None
        ),
    )
    dataset = Mixed(min(count, most))
    rows = pack_training_set(
        run, arguments(), (count, 0, 0), dataset, packing_collator("texts", arguments(), collator())
    )
    return [[sample.name for sample in rows[number]] for number in range(len(rows))]


@pytest.mark.parametrize("count", [1, 7, 20, 33])
def test_a_longer_run_reads_the_same_rows_first(count: int) -> None:
    rows = mixed_rows(count)
    assert len(rows) == count  # none is read twice
    assert mixed_rows(200)[:count] == rows
    names = [name for row in rows for name in row]
    assert len(set(names)) == len(names)


def test_a_pass_over_data_that_end_holds_every_sample_once() -> None:
    rows = mixed_rows(200, most=50)
    assert sorted(int(name) for row in rows for name in row) == list(range(50))
    assert len(rows) < 50
    assert mixed_rows(500, most=50) == rows  # what is read again is the same
    assert mixed_rows(3, most=50) == rows[:3]
