"""Changes Megatron's training loop for a run whose modules have grids of their own.

The language model keeps Megatron's global groups, so that ``pretrain`` runs it as ever. Its
encoders are wrapped, reduced and optimized with their own groups, and ``EncodeFirst`` runs them
around Megatron's schedule.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from megatron.mimo.arguments.component_flags import components_of, require_components
from megatron.mimo.backend import hooks
from megatron.mimo.backend.patching import replaced
from megatron.mimo.process import presence
from megatron.mimo.topology import Grids, build_grids
from megatron.mimo.training.module_ranks import (
    are_apart,
    global_groups,
    in_every_chunk,
    random_state,
)
from megatron.mimo.training.plans import next_micro_batches

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["ModuleGrids", "build_optimizer"]


class ModuleGrids:
    """The grids of a run, made when its first chunk is built; nothing in the uniform layout.

    Args:
        args: of the run.

    Attributes:
        seen: is told what encoders on ranks of their own encode, as ``EncodeFirst`` tells it.
    """

    def __init__(self, args: Namespace) -> None:
        self._components = components_of(args.component, world_size=args.world_size)
        self._args = args
        self._activations, self._ahead = args.encoder_activations, args.encode_ahead
        self.seen: Callable[[str, Any, int], None] | None = None
        self._grids: Grids | None = None
        self._schedule: Any = None

    def __bool__(self) -> bool:
        return bool(self._components)

    @property
    def apart(self) -> bool:
        """Whether modules are on ranks of their own."""
        return are_apart(self._components)

    @property
    def grids(self) -> Grids:
        """The grids; the first call makes them, and is collective."""
        if self._grids is None:
            self._grids = build_grids(self._components)
        return self._grids

    @property
    def modalities_across_replicas(self) -> list[str]:
        """Modalities that encode only within the schedule, which generation does without."""
        from megatron.core.models.mimo.model.grids.refusals import modalities_across_replicas

        return modalities_across_replicas(dict(self.grids.by_module)) if self else []

    def described(self, config: Any) -> Any:
        """A model's description with the grids of its modules.

        Raises:
            ConfigError: components that are not the model's modules.
        """
        require_components(self._components, config.modality_submodules_spec)
        grids = dict(self.grids.by_module)
        return replace(config, module_to_grid_map=grids, modality_inputs_of="language")

    def agree(self, model: MimoModel) -> None:
        """Give every replica of an encoder the weights of its first one. Collective.

        Pipeline stages draw their first weights apart.
        """
        for name, submodule in model.modality_submodules.items():
            group = self.grids.groups[name].dp
            for tensor in (*submodule.parameters(), *submodule.buffers()):
                dist.broadcast(tensor.detach(), group_src=0, group=group)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Apply the changes to every ``pretrain`` in this context; none in the uniform layout."""
        if not self:
            yield
            return
        arounds = {hooks.WRAP: self._around_wrap, hooks.SCHEDULE: self._around_schedule}
        if self.apart:
            arounds[hooks.MODEL_PARALLEL] = global_groups(self._components)
            arounds[hooks.LOADERS] = in_every_chunk(self._components)
            arounds[hooks.RANDOM_STATE] = random_state(self._components)
        with replaced(arounds):
            yield

    def unwrap(self, models: Sequence[MimoModel]) -> None:
        """Take the wrappers off the modules: what follows training expects none."""
        from megatron.core.utils import unwrap_model

        for model in models if self else ():
            if model.language_model is not None:
                model.language_model = unwrap_model(model.language_model)
            for name, submodule in model.modality_submodules.items():
                model.modality_submodules[name] = unwrap_model(submodule)

    def destroy(self) -> None:
        """Give the groups back. Collective."""
        if self._schedule is not None:
            self._schedule.destroy()
        if self._grids is not None:
            self._grids.destroy()
        self._grids = self._schedule = None

    def _around_wrap(self, wrap: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(
            chunks: Sequence[nn.Module], config: Any, ddp_config: Any, **keywords: Any
        ) -> Any:
            from megatron.core.utils import unwrap_model

            models = [unwrap_model(chunk) for chunk in chunks]
            language = [one.language_model for one in models if one.language_model is not None]
            if _trains(language):
                for model, one in zip(
                    models, wrap(language, config, ddp_config, **keywords), strict=True
                ):
                    model.language_model = one
            for name, submodule in models[0].modality_submodules.items():
                if not _trains([submodule]):
                    continue
                own = {**keywords, "pg_collection": self.grids.groups[name]}
                own |= {"bucket_sizes": None, "disable_bucketing_per_chunk": None}
                (one,) = wrap([submodule], config, replace(ddp_config), **own)
                models[0].modality_submodules[name] = one
            return models

        return wrapped

    def _around_schedule(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any, **keywords: Any) -> Callable[..., Any]:
            inner = choose(*args, **keywords)

            def schedule(*, model: Any, **of_step: Any) -> Any:
                presence.here().slot.enter("encoding")
                from megatron.core.models.mimo.model.encode_first import EncodeFirst

                if self._schedule is None:
                    self._schedule = EncodeFirst(
                        model,
                        schedule=inner,
                        activations=self._activations,
                        ahead=partial(next_micro_batches, self._args) if self._ahead else None,
                        seen=self.seen,
                    )
                return self._schedule(model=model, **of_step)

            return schedule

        return chosen


def build_optimizer(chunks: Sequence[Any], config: Any, config_overrides: Any) -> Any:
    """One optimizer for each module, in checkpoints as one of the whole model. Collective."""
    from megatron.core.models.mimo import get_mimo_optimizer
    from megatron.core.models.mimo.optimizer.whole import WholeModelOptimizer

    return get_mimo_optimizer(list(chunks), config, config_overrides, kind=WholeModelOptimizer)


def _trains(modules: Sequence[nn.Module]) -> bool:
    return any(parameter.requires_grad for one in modules for parameter in one.parameters())
