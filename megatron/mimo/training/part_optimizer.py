"""The optimizer of a run with learning rates by part, or with frozen layers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from megatron.mimo.backend.hooks import OPTIMIZER
from megatron.mimo.backend.patching import replaced
from megatron.mimo.training.frozen_layers import keep_layers_apart
from megatron.mimo.training.module_grids import build_optimizer
from megatron.mimo.training.optimizer_state import fill_state, load_into_any_chain

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.arguments.part_flags import Rate
    from megatron.mimo.training.model import ModelBuilder

__all__ = ["part_optimizer", "rate_overrides"]


@contextmanager
def part_optimizer(args: Namespace, builder: ModelBuilder) -> Iterator[None]:
    """Let the optimizer that ``pretrain`` builds in this context follow the flags on parts.

    megatron-core's ``get_megatron_optimizer`` takes overrides by parameter; ``pretrain`` passes
    its standard ones. The run's are added to these. A group's learning rate follows the run's
    schedule, scaled: its highest and lowest are both multiplied by the same factor.

    Args:
        args: the run's.
        builder: has built the model by the time the optimizer is built.
    """

    def around(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(
            config: Any, model: Any, *, config_overrides: dict[Any, Any], **keywords: Any
        ) -> Any:
            overrides = config_overrides | rate_overrides(args, builder.chunks)
            if args.component:
                optimizer = build_optimizer(model, config, overrides)
            else:
                optimizer = make(config, model, config_overrides=overrides, **keywords)
            fill_state(optimizer)
            load_into_any_chain(optimizer)
            assert builder.trained is not None, "the model is built first"
            if builder.trained.has_gaps:
                keep_layers_apart(optimizer)
            return optimizer

        return made

    with replaced({OPTIMIZER: around}), builder.grids.installed():
        yield


def rate_overrides(args: Namespace, chunks: Sequence[MimoModel]) -> dict[Any, Any]:
    """``--module-lr`` and ``--module-wd`` as overrides for ``get_megatron_optimizer``.

    Where several names hold a parameter, the longest one counts.
    """
    from megatron.core.models.mimo.model.freezing import paths_by_parameter
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    chosen: dict[str, set[nn.Parameter]] = {}
    values: dict[str, dict[str, float]] = {}
    for flag, rates in (("lr", args.module_lr), ("wd", args.module_wd)):
        for name, value in rates:
            scaled = {"max_lr": value, "min_lr": args.min_lr * value / args.lr}
            fixed = {"start_wd": value, "end_wd": value}
            values[f"{flag} {name}"] = scaled if flag == "lr" else fixed
            chosen[f"{flag} {name}"] = set()
        for parameter, own in (
            pair for chunk in chunks for pair in paths_by_parameter(chunk).items()
        ):
            name = _longest(own, rates)
            if name is not None:
                chosen[f"{flag} {name}"].add(parameter)

    def key(name: str) -> Any:
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=name, fn=lambda parameter, _: parameter in chosen[name]
            )
        )

    return {key(name): value for name, value in values.items()}


def _longest(paths: tuple[str, ...], rates: Sequence[Rate]) -> str | None:
    from megatron.core.models.mimo.model.freezing import selects

    fitting = [name for name, _ in rates if any(selects(name, path) for path in paths)]
    return max(fitting, key=lambda name: (name.count("."), len(name)), default=None)
