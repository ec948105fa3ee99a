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

Encoders on ranks of their own run at the same time as the language model's schedule, micro-batch by
micro-batch (``concurrent_steps``): they encode one micro-batch further ahead than its pipeline is
deep, and their pipeline stages follow each other likewise.

Frozen encoders may encode for the next step in this one (``encode_ahead``).

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
from megatron.core.models.mimo.model.encode_first.concurrent_steps import ConcurrentSteps
from megatron.core.models.mimo.model.encode_first.encode_ahead import NextStep, peeked
from megatron.core.models.mimo.model.encode_first.encoder_calls import Modality
from megatron.core.models.mimo.model.encode_first.modality_pass import ModalityPass
from megatron.core.models.mimo.model.encode_first.modality_pools import ModalityPools
from megatron.core.models.mimo.model.encode_first.step_batches import MicroBatch, StepBatches
from megatron.core.models.mimo.ranges import named_range
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

ACTIVATIONS = ("keep", "recompute")


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
        ahead: gives the number of micro-batches of the next step, which frozen encoders encode at
            the end of this one; None: each step encodes its own. The data iterator needs
            ``peek(count)``, which shows what ``next`` will give. Encoders on the language model's
            ranks encode before gradients are reduced, later pipeline stages while earlier ones run
            backward; encoders on ranks of their own encode the first few micro-batches, while the
            language model ends its step.
        seen: is called on one rank of each pool with what encoders on ranks of their own encode in
            training: modality, inputs of a micro-batch, number of rows.

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
        ahead: Callable[[], int] | None = None,
        seen: Callable[[str, Any, int], None] | None = None,
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
        self._concurrent: ConcurrentSteps | None = None
        if self._pools.disjoint:
            self._concurrent = ConcurrentSteps(model, self._pools, ahead)
            self._concurrent.seen = seen
        self._count_ahead = ahead
        self._next: NextStep | None = None
        self._source: Any = None  # of this step's micro-batches
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
        given: list[MicroBatch] = []
        if self._replica is not None:
            given = [next(iterators[0]) for _ in range(num_microbatches)]
        step = self._begun(given, forward_only=forward_only)
        self._source = iterators[0]
        self._finalizes = self._config.finalize_model_grads_func is not None and not forward_only

        def run_language(first: Iterator[MicroBatch]) -> Any:
            """Phase two, on ranks of the language model."""
            given = [first, *iterators[1:]] if isinstance(data_iterator, list) else first
            with self._language_alone():
                return (self._schedule or get_forward_backward_func())(
                    data_iterator=given,
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    force_all_reduce=force_all_reduce,
                    **keywords,
                )

        with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
            if self._concurrent is None:
                reports = self._run_around(step, run_language)
            elif self._replica is None:
                self._concurrent.encoders(num_microbatches, self.costs, trains=not forward_only)
                reports = []
            else:
                begin = None if forward_only else self._keep_next
                reports = self._concurrent.language(step, run_language, begin, iterators[0])
        if self._finalizes:
            with named_range("gradients"):
                self._finalize_encoders(bool(force_all_reduce))
        return reports

    def _begun(self, given: list[MicroBatch], *, forward_only: bool) -> NextStep:
        """This step, with what the last one has encoded for it."""
        begun = self._next
        if begun is not None and not forward_only:
            self._next = None
            if begun.is_of(given):
                return begun
            begun.forget()
        batches = StepBatches(self._chunks[0], [dict(batch) for batch in given])
        return NextStep(given=given, batches=batches, by_modality={})

    def _keep_next(self, step: NextStep) -> None:
        self._next = step

    def _run_around(self, step: NextStep, run_language: Callable[..., Any]) -> Any:
        """A step of modules on the same ranks, phase by phase."""
        batches = step.batches
        passes: dict[str, ModalityPass] = {}
        rows = {}
        for modality in self._pools.modalities:
            name = modality.name
            seed = self._pools.draw_seed(modality, trains=self._chunks[0].training)
            passes[name] = step.by_modality.get(name) or self._pass(modality, batches)
            rows[name] = passes[name].place(seed)
            self.costs[name] = passes[name].cost
        batches.cut_plans(reads=self._pools.reads)
        for number, batch in enumerate(batches.batches if self._pools.reads else []):
            batch["encoded_rows"] = {name: of_step[number] for name, of_step in rows.items()}
        reports = run_language(iter(batches.batches))
        for one in passes.values():
            one.backward()
        return reports

    def _pass(self, modality: Modality, step: StepBatches) -> ModalityPass:
        assert self._replica is not None, "all ranks run the language model"
        jobs = step.jobs(modality.name, self._replica, None)
        return ModalityPass(modality, jobs, self._replica, self._pools.groups[modality.name])

    def _encode_ahead(self) -> None:
        """Let encoders that are frozen encode the next step."""
        frozen = [modality for modality in self._pools.modalities if modality.goes_ahead]
        if self._count_ahead is None or not frozen or self._concurrent is not None:
            return
        given = peeked(self._source, self._count_ahead())
        if given:
            step = StepBatches(self._chunks[0], [dict(batch) for batch in given])
            done = {modality.name: self._pass(modality, step) for modality in frozen}
            for one in done.values():
                one.encode_ahead()
            self._next = NextStep(given=given, batches=step, by_modality=done)

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
        self._encode_ahead()
        assert num_tokens is not None, "a loss that is not averaged has its tokens counted"
        with named_range("gradients"):
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
        if self._concurrent is not None:
            self._tell_num_tokens()
        assert self._num_tokens is not None, "the language model was finalised"
        for submodule in wrapped:
            submodule.scale_gradients(1.0 / self._num_tokens.clamp(min=1))

    def _tell_num_tokens(self) -> None:
        """Tell ranks of encoders alone the tokens of the global batch; all ranks call it."""
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
