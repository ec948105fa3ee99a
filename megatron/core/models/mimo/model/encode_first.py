"""A schedule that runs encoders on grids of their own around the language model's schedule.

Where modules are on the same ranks, a step has three phases:

1. Every rank encodes its share of the media of a step's micro-batches, balanced by what each item
   costs, and the rows go to the ranks of the first pipeline stage that place them.
2. Megatron's schedule runs the language model (without pipelining, 1F1B or interleaved).
3. The rows' gradients go back to who encoded them, and the encoders' backward runs; frozen
   encoders have no such phase.

What is held meanwhile: on the first stage the rows of all micro-batches and, as they come, their
gradients; on every rank the activations of what it has encoded ("keep"), or nothing but its inputs
("recompute": encoders run forward twice, and activations of one call at a time are held, which
has at most as many rows as one micro-batch).

Encoders on ranks of their own run beside the language model's schedule, micro-batch by micro-batch
(``row_stream``): they encode as far ahead of it as its pipeline is deep and ``AHEAD`` more, and
their pipeline stages follow each other likewise.

The one gradient contract: losses are sums over tokens, and every module's gradients are divided
once by the tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.in_flight import most_in_flight
from megatron.core.models.mimo.model.modality_pass import ModalityPass
from megatron.core.models.mimo.model.modality_pools import ModalityPools
from megatron.core.models.mimo.model.row_stream import ArrivingRows, EncoderStream
from megatron.core.models.mimo.model.step_batches import MicroBatch, StepBatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

ACTIVATIONS = ("keep", "recompute")
AHEAD = 1  # micro-batches that encoders are ahead of what the language model's pipeline holds


class EncodeFirst:
    """Called as Megatron's schedules are, with the same arguments; all ranks call it together.

    The data iterator of the first chunk gives micro-batches as mappings of ``MimoModel.forward``'s
    arguments, on every rank of the language model; those of one replica get the same, plans uncut.
    The forward step hands ``encoded_rows`` on to the model. Ranks of encoders alone need no data:
    they get their inputs from the language model's.

    Args:
        chunks: this rank's chunks of the model, each a ``MimoModel`` whose trained modules are
            wrapped in Megatron's ``DistributedDataParallel`` of their own grids' groups.
        schedule: Megatron's for the language model; None for the one that its sizes ask for.
        activations: "keep" or "recompute", of the encoders.

    Attributes:
        costs: modality -> what this rank has encoded and what its pool has, in the last step.

    Raises:
        ConfigError: (a ``ValueError``) a model without grids, or with the loss averaged.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        *,
        schedule: Callable[..., Any] | None = None,
        activations: str = "keep",
    ) -> None:
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations is {activations!r}; expected one of {ACTIVATIONS}")
        self._chunks: list[MimoModel] = [unwrap_model(chunk) for chunk in chunks]
        model = self._chunks[0]
        _check_model(model)
        self._schedule = schedule
        self._config = model.config
        self._num_tokens: torch.Tensor | None = None
        self._finalizes = True
        self._pools = ModalityPools(model, recompute=activations == "recompute")
        self._replica = self._pools.replica
        self.costs: dict[str, tuple[float, float]] = {}

    def __call__(
        self,
        *,
        data_iterator: Any,
        num_microbatches: int,
        forward_only: bool = False,
        force_all_reduce: bool | None = False,
        **keywords: Any,
    ) -> Any:
        """Run a step; what the language model's schedule returns."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        batches: list[MicroBatch] = []
        if self._replica is not None:
            batches = [dict(next(iterators[0])) for _ in range(num_microbatches)]
        step = StepBatches(self._chunks[0], batches)
        self._finalizes = self._config.finalize_model_grads_func is not None and not forward_only

        def run_language(first: Iterator[MicroBatch]) -> Any:
            """Phase two, on ranks of the language model."""
            if self._replica is None:
                return []
            given = [first, *iterators[1:]] if isinstance(data_iterator, list) else first
            with self._language_alone():
                return (self._schedule or get_forward_backward_func())(
                    data_iterator=given,
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    force_all_reduce=force_all_reduce,
                    **keywords,
                )

        run = self._run_beside if self._pools.apart else self._run_around
        with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
            reports = run(step, num_microbatches, run_language)
        if self._finalizes:
            self._finalize_encoders(bool(force_all_reduce))
        return reports

    def _run_around(self, step: StepBatches, _: int, run_language: Callable[..., Any]) -> Any:
        """A step of modules on the same ranks: phase by phase."""
        assert self._replica is not None, "all ranks run the language model"
        passes = []
        for modality in self._pools.modalities:
            seed = self._pools.draw_seed(modality, trains=self._chunks[0].training)
            jobs = step.jobs(modality.name, self._replica, None)
            group = self._pools.groups[modality.name]
            passes.append(ModalityPass(modality, jobs, self._replica, group, seed))
            self.costs[modality.name] = passes[-1].cost
        reads = self._pools.reads
        step.cut_plans(reads=reads)
        for number, batch in enumerate(step.batches if reads else []):
            pairs = zip(self._pools.modalities, passes, strict=True)
            batch["encoded_rows"] = {modality.name: one.rows[number] for modality, one in pairs}
        reports = run_language(iter(step.batches))
        for one in passes:
            one.backward()
        return reports

    def _run_beside(self, step: StepBatches, count: int, run_language: Callable[..., Any]) -> Any:
        """A step of modules on ranks of their own."""
        ahead = most_in_flight(self._config, count) + AHEAD
        if self._replica is None:
            self._encode(count, ahead)
            return []
        arriving = {}
        for modality in self._pools.modalities:
            jobs = step.jobs(
                modality.name,
                self._replica,
                self._pools.draw_seed(modality, trains=self._chunks[0].training),
            )
            if self._pools.reads:
                lines = self._pools.lines[modality.name]
                arriving[modality.name] = ArrivingRows(modality, lines, jobs, self._replica, ahead)
        step.cut_plans(reads=self._pools.reads)

        def arrive() -> Iterator[MicroBatch]:
            for number, batch in enumerate(step.batches):
                if arriving:
                    rows = {name: one.take(number) for name, one in arriving.items()}
                    batch["encoded_rows"] = rows
                yield batch

        reports = run_language(arrive())
        for one in arriving.values():
            one.finish()
        return reports

    def _encode(self, count: int, ahead: int) -> None:
        """A step on ranks of encoders alone: backward follows forward by each stream's window."""
        streams = []
        for modality in self._pools.modalities:
            lines = self._pools.lines[modality.name]
            stages = len(modality.trainable)
            streams.append(EncoderStream(modality, lines, count, ahead + stages - 1))
            self.costs[modality.name] = streams[-1].cost
        behind = max((stream.window for stream in streams), default=1) - 1
        for number in range(count + behind):
            for stream in streams:
                stream.forward(number)
            for stream in streams:
                stream.backward(number - stream.window + 1)
        for stream in streams:
            stream.finish()

    def destroy(self) -> None:
        """Release the groups that rows travel in; a second call does nothing."""
        self._pools.destroy()

    @contextmanager
    def _language_alone(self) -> Iterator[None]:
        """The schedule holds back, reduces and finalises the language model's gradients only."""
        config = self._config
        finalizes = config.finalize_model_grads_func
        no_sync, grad_sync = config.no_sync_func, config.grad_sync_func
        modules = [chunk.language_model for chunk in self._chunks]
        if self._finalizes:
            config.finalize_model_grads_func = self._finalize_language
        if all(_overlaps(module) for module in modules):
            config.no_sync_func = _one_or_all([module.no_sync for module in modules])
            if len(modules) > 1:
                config.grad_sync_func = [module.start_grad_sync for module in modules]
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalizes
            config.no_sync_func, config.grad_sync_func = no_sync, grad_sync

    def _finalize_language(
        self,
        _: Any,
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        """What the schedule calls at its end; makes ``num_tokens`` that of the global batch."""
        wrapped = [
            chunk.language_model
            for chunk in self._chunks
            if isinstance(chunk.language_model, DistributedDataParallel)
        ]
        assert num_tokens is not None, "a loss that is not averaged has its tokens counted"
        if wrapped:
            finalize_model_grads(wrapped, num_tokens, pg_collection, force_all_reduce)
        else:
            last = dist.get_process_group_ranks(pg_collection.pp)[-1]
            dist.broadcast(num_tokens, src=last, group=pg_collection.pp)
            dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
        self._num_tokens = num_tokens

    def _finalize_encoders(self, force_all_reduce: bool) -> None:
        """Reduce the encoders' gradients over their own replicas, and divide them once."""
        wrapped = [
            modality.submodule
            for modality in self._pools.modalities
            if isinstance(modality.submodule, DistributedDataParallel)
        ]
        for submodule in wrapped:
            submodule.finish_grad_sync(force_all_reduce=force_all_reduce)
        if self._pools.apart:
            self._tell_num_tokens()
        assert self._num_tokens is not None, "the language model was finalised"
        for submodule in wrapped:
            submodule.scale_gradients(1.0 / self._num_tokens.clamp(min=1))

    def _tell_num_tokens(self) -> None:
        """Let ranks of encoders alone know the tokens of the global batch; all ranks call it."""
        if self._replica is None:
            device = next(self._chunks[0].parameters()).device
            self._num_tokens = torch.zeros([], dtype=torch.int, device=device)
        assert self._num_tokens is not None, "the language model was finalised"
        dist.broadcast(self._num_tokens, src=self._pools.language.ranks[0])


def _check_model(model: MimoModel) -> None:
    if not isinstance(model, MimoModel) or not model.mimo_config.module_to_grid_map:
        raise ConfigError(
            f"EncodeFirst got a {type(model).__name__} without module_to_grid_map; give it a "
            "MimoModel whose modules have grids, or use Megatron's schedules"
        )
    if model.mimo_config.modality_inputs_of != "language":
        raise ConfigError(
            "EncodeFirst takes the inputs of the language model's replicas; set "
            "modality_inputs_of='language' in MimoModelConfig"
        )
    if not model.config.calculate_per_token_loss:
        raise ConfigError(
            "EncodeFirst divides the gradients of all modules by the tokens of the global batch; "
            "set calculate_per_token_loss=True in the language model's configuration"
        )


def _overlaps(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) and module.ddp_config.overlap_grad_reduce


def _one_or_all(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]
