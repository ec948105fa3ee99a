"""Finds the first value of an iteration that is not finite, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mimo.training.origins import BROKEN_MEDIA

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Finding", "Search"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank saw first; the least of all ranks' is the cause.

    Attributes:
        order: micro-batch, then forward before backward, then along the pipeline, then the rank.
        cause: for a human.
        remedy: what helps against it.
    """

    order: tuple[int, int, int, int]
    cause: str
    remedy: str


class Search:
    """Counts the micro-batches of an iteration and, when told, looks at every module's output.

    Attributes:
        finding: what was seen first, if it was looked for.
    """

    def __init__(self, chunks: Sequence[MimoModel]) -> None:
        self.finding: Finding | None = None
        self._chunks = chunks
        self._counts: dict[nn.Module, int] = {}  # chunk -> micro-batches begun in this iteration
        self._hooks: list[Any] = []

    @property
    def micro_batch(self) -> int:
        """The number of the last one that the last chunk has begun."""
        return max(self._counts.get(self._chunks[-1], 0) - 1, 0)

    def begin(self, *, looks: bool) -> None:
        """An iteration is computed, for the first time or, with ``looks``, once more."""
        self._counts = dict.fromkeys(self._chunks, 0)
        self.finding = None
        for chunk in self._chunks:
            self._hooks.append(
                chunk.register_forward_pre_hook(partial(self._begin, looks=looks), with_kwargs=True)
            )
            for name, module in chunk.named_modules() if looks else ():
                self._hooks.append(
                    module.register_forward_hook(partial(self._look, chunk, name or "the model"))
                )

    def end(self) -> None:
        """The iteration is computed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, chunk: nn.Module, _: Any, keywords: Mapping[str, Any], *, looks: bool) -> None:
        if torch.is_grad_enabled():
            self._counts[chunk] += 1
        if looks and self.finding is None and _is_broken(keywords.get("modality_inputs")):
            self._find(
                chunk,
                BROKEN_MEDIA,
                "repair these samples or leave them out",
            )

    def _look(self, chunk: nn.Module, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if self.finding is not None:
            return
        micro_batch = self._counts[chunk] - 1
        for tensor in _tensors(output):
            if tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(partial(self._look_back, chunk, name, micro_batch))
        if not _is_broken(output):
            return
        weights = [key for key, weight in module.named_parameters() if _is_broken(weight)]
        if weights:
            self._find(
                chunk,
                f"the weight {name}.{weights[0]} is not finite",
                "begin at an earlier checkpoint (--ckpt-step)",
            )
        else:
            self._find(
                chunk,
                f"the first output that is not finite is that of {name} ({type(module).__name__})",
                "look at these samples, lower --lr, or begin at an earlier checkpoint "
                "(--ckpt-step)",
            )

    def _look_back(self, chunk: nn.Module, name: str, micro_batch: int, gradient: Tensor) -> None:
        if self.finding is None and _is_broken(gradient):
            self._find(
                chunk,
                f"the first gradient that is not finite is that of the output of {name}",
                "look at these samples, lower --lr, or begin at an earlier checkpoint "
                "(--ckpt-step)",
                backward_of=micro_batch,
            )

    def _find(
        self, chunk: nn.Module, cause: str, remedy: str, *, backward_of: int | None = None
    ) -> None:
        from megatron.core import mpu

        stage = mpu.get_pipeline_model_parallel_rank()
        if backward_of is None:
            order = (self._counts[chunk] - 1, 0, stage, dist.get_rank())
        else:
            order = (backward_of, 1, -stage, dist.get_rank())
        self.finding = Finding(order=order, cause=cause, remedy=remedy)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _is_broken(value: Any) -> bool:
    """Whether a tensor in it has NaN or infinity; -infinity is what masks are made of."""
    return any(
        tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any())
        for tensor in _tensors(value)
    )
