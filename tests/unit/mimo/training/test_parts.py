"""Flags that name parts of the model: what is refused, and what the optimizer makes of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from megatron.core.models.mimo.errors import ConfigError
from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import build


def parse(*argv: str) -> Namespace:
    from megatron.mimo.arguments.part_flags import add_part_arguments, check_parts

    parser = ArgumentParser()
    add_part_arguments(parser.add_argument_group())
    args = parser.parse_args(argv)
    args.lr, args.min_lr, args.decoupled_lr = 1e-2, 1e-3, None
    check_parts(args)
    return args


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--module-lr", "images=0"), "--module-lr images=0.0: must be larger than 0; --freeze"),
        (("--module-lr", "images=nan"), "must be larger than 0"),
        (("--module-wd", "images=-1"), "--module-wd images=-1.0: must be 0 or larger"),
        (("--module-lr", "images=1", "images=2"), "--module-lr: 'images' is given twice"),
        (("--lora", "language", "--lora-rank", "0"), "--lora-rank 0: must be at least 1"),
    ],
)
def test_values_out_of_range(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


@pytest.mark.parametrize("word", ["images", "images=", "=1e-3", "images=fast"])
def test_a_rate_without_name_or_number(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--module-lr", word)
    assert f"'{word}' is no NAME=VALUE" in capsys.readouterr().err


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
