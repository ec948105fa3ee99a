"""How many micro-batches Megatron's schedules hold on their first stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.models.mimo.model.encode_first.in_flight import most_in_flight


@pytest.mark.parametrize(
    ("stages", "chunks", "count", "held"),
    [
        (1, None, 8, 1),
        (4, None, 8, 4),
        (4, None, 3, 3),
        # forward 0 0 1 1 | 0, then each forward after a backward of 1 1 0 0: four of chunk 0
        (2, 2, 4, 4),
        (2, 2, 8, 4),
        (2, 2, 2, 2),
    ],
)
def test_most_in_flight(stages: int, chunks: int | None, count: int, held: int) -> None:
    config: Any = SimpleNamespace(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        microbatch_group_size_per_vp_stage=stages,
        overlap_moe_expert_parallel_comm=False,
    )
    assert most_in_flight(config, count) == held
