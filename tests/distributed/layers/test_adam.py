"""Optimizer checkpoints without Transformer Engine or apex: saved, loaded, continued exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.tiny_gpt import build_gpt, next_token_loss
from tests.rank_pool import RankPool, model_parallel

BATCH, SAVE_AT, END = 4, 3, 6


class Job:
    """A GPT and its optimizer on this data-parallel rank; every job sees the same batches."""

    def __init__(self, *, distributed: bool, bf16: bool, sharding: str) -> None:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.mimo.layers import install_adam

        assert install_adam()
        assert install_adam()  # a second call does nothing
        model_parallel()
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = build_gpt(
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=distributed),
            bf16=bf16,
            params_dtype=dtype,
        )
        config = OptimizerConfig(
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            bf16=bf16,
            params_dtype=dtype,
        )
        self.optimizer = get_megatron_optimizer(config, [self.model])
        self.metadata = {"distrib_optim_sharding_type": sharding}

    def train(self, first: int, last: int) -> None:
        from megatron.core.distributed import finalize_model_grads

        per_rank = BATCH // dist.get_world_size()
        rows = slice(per_rank * dist.get_rank(), per_rank * (dist.get_rank() + 1))
        for step in range(first, last):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            next_token_loss(self.model, batch=BATCH, seed=step, rows=rows).backward()
            finalize_model_grads([self.model])
            assert self.optimizer.step()[0]

    def save(self, path: Path) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._sharded(is_loading=False), str(path))

    def load(self, path: Path) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._sharded(is_loading=True), str(path))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=self.metadata
        )
        return {"model": model, "optimizer": optimizer}

    def outcome(self) -> tuple[dict[str, Tensor], list[int]]:
        steps = [group["step"] for group in self.optimizer.param_groups if group["params"]]
        named = self.model.module.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named}, steps


def run_through(path: Path, kind: dict[str, Any]) -> Any:
    job = Job(**kind)
    job.train(0, SAVE_AT)
    job.save(path)
    job.train(SAVE_AT, END)
    return job.outcome()


def resume(path: Path, kind: dict[str, Any]) -> Any:
    job = Job(**kind)
    job.load(path)
    job.train(SAVE_AT, END)
    return job.outcome()


@pytest.mark.parametrize(
    ("distributed", "bf16", "sharding"),
    [
        (True, False, "dp_reshardable"),
        (True, False, "fully_reshardable"),
        (True, True, "fully_reshardable"),
        (False, False, "fully_reshardable"),
        (False, True, "fully_reshardable"),
    ],
    ids=["dp_reshardable", "fully_reshardable", "bf16", "FP32Optimizer", "Float16Optimizer"],
)
def test_resume_is_exact(
    ranks: RankPool, tmp_path: Path, distributed: bool, bf16: bool, sharding: str
) -> None:
    kind = {"distributed": distributed, "bf16": bf16, "sharding": sharding}
    finished = ranks(2)(run_through, tmp_path, kind)
    resumed = ranks(2)(resume, tmp_path, kind)
    for (weights, steps), (expected, expected_steps) in zip(resumed, finished, strict=True):
        assert set(steps) == set(expected_steps) == {END}
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_data_parallel_size(
    ranks: RankPool, tmp_path: Path, before: int, after: int
) -> None:
    kind = {"distributed": True, "bf16": False, "sharding": "fully_reshardable"}
    finished = ranks(before)(run_through, tmp_path, kind)
    resumed = ranks(after)(resume, tmp_path, kind)
    (expected, _), (weights, steps) = finished[0], resumed[0]
    assert set(steps) == {END}
    for name, weight in weights.items():
        error = (weight - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
