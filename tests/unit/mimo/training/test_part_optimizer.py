"""Learning rates and weight decay of parts, step by step of the schedule."""

from __future__ import annotations

import pytest

from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import build
from tests.unit.mimo.arguments.test_part_flags import parse


def check_rates_follow_the_schedule() -> None:
    """Every parameter's rate and decay at every step, on a cosine with a warm-up."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.mimo.model.freezing import paths_by_parameter
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer import get_standard_config_overrides as standard
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.mimo.training.part_optimizer import rate_overrides

    args = parse(
        *("--module-lr", "language=2e-3", "language.decoder.layers.1=4e-3", "images.encoders=2e-2"),
        *("--module-wd", "language.decoder=0.5"),
    )
    model = build({"num_layers": 2})
    model.freeze("audio")
    config = OptimizerConfig(optimizer="adam", lr=args.lr, min_lr=args.min_lr, weight_decay=0.1)
    overrides = {**standard(config), **rate_overrides(args, [model])}
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(config, [wrapped], config_overrides=overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    paths = paths_by_parameter(model)

    def rates() -> dict[str, tuple[float, float]]:
        return {
            paths[parameter][0]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    factors = {
        "language.embedding.word_embeddings.weight": (0.2, 0.1),
        "language.decoder.layers.0.mlp.linear_fc1.weight": (0.2, 0.5),
        "language.decoder.layers.1.mlp.linear_fc1.weight": (0.4, 0.5),
        "language.decoder.layers.1.mlp.linear_fc1.bias": (0.4, 0.0),
        "images.encoders.plain.linear.weight": (2.0, 0.1),
    }
    scheduler.step(2)
    for path, (factor, decay) in factors.items():
        assert rates()[path] == pytest.approx((factor * args.lr, decay)), path
    scheduler.step(20)
    for path, (factor, decay) in factors.items():
        assert rates()[path] == pytest.approx((factor * args.min_lr, decay)), path


def test_rates_follow_the_schedule(ranks: RankPool) -> None:
    ranks(1)(check_rates_follow_the_schedule)
