"""A schedule that runs the encoders of all micro-batches before the language model's schedule.

For grids of modules, on the same ranks or apart. Three phases:

1. Every rank that has encoders encodes its share of the media of a step's micro-batches, balanced
   by what each item costs, and the rows go to the ranks of the first pipeline stage that place
   them.
2. Megatron's schedule runs the language model (without pipelining, 1F1B or interleaved).
3. The rows' gradients go back to who encoded them, and the encoders' backward runs; frozen
   encoders have no such phase.

What is held meanwhile: on the first stage the rows of all micro-batches and, as they come, their
gradients; on every rank the activations of what it has encoded ("keep"), or nothing but its inputs
("recompute": encoders run forward twice, and activations of one call at a time are held, which
has at most as many rows as one micro-batch).

The one gradient contract: losses are sums over tokens, and every module's gradients are divided
once by the tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    build_alignment_plan,
    with_row_index,
)
from megatron.core.models.mimo.alignment.cut import with_own_rows
from megatron.core.models.mimo.comm.pools import pools_of
from megatron.core.models.mimo.comm.row_routes import Placement
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.config.grids import Geometry
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.modality_pass import (
    Job,
    Modality,
    ModalityPass,
    gather_jobs,
)
from megatron.core.models.mimo.partition.packing import packed_params
from megatron.core.models.mimo.partition.utils import sequence_cut
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

ACTIVATIONS = ("keep", "recompute")

MicroBatch = dict[str, Any]


class EncodeFirst:
    """Called as Megatron's schedules are, with the same arguments; all ranks call it together.

    The data iterator of the first chunk gives micro-batches as mappings of ``MimoModel.forward``'s
    arguments, on every rank of the language model; those of one replica get the same, plans uncut.
    The forward step hands ``encoded_rows`` on to the model. Ranks of encoders alone need no data:
    they get their inputs from the language model's, once a step and through the host.

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
        self._apart = model.disjoint_rows is not None
        self._finalizes = True
        grids = dict(model.mimo_config.module_to_grid_map or {})
        language = Geometry.of(MIMO_LANGUAGE_MODULE_KEY, grids[MIMO_LANGUAGE_MODULE_KEY])
        self._language = language
        here = language.positions.get(dist.get_rank())
        self._replica = None if here is None else here.dp
        device = next(model.parameters()).device
        like_H = torch.empty(
            self._config.hidden_size, dtype=self._config.params_dtype, device=device
        )
        self._groups = _Groups()
        self._modalities = []
        for name in model.mimo_config.modality_submodules_spec:
            pools = pools_of(Geometry.of(name, grids[name]), language)
            group = self._groups.of([pool.ranks for pool in pools])
            feed = None
            if pools[0].is_apart:
                feed = self._groups.of([pool.feed for pool in pools])
            own = [pool for pool in pools if dist.get_rank() in pool.ranks]
            self._modalities += [
                Modality(
                    name=name,
                    submodule=dict(model.modality_submodules.items()).get(name),
                    pool=pool,
                    group=group,
                    feed=feed,
                    like_H=like_H,
                    recompute=activations == "recompute",
                )
                for pool in own
            ]
        self.costs: dict[str, tuple[float, float]] = {}

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        forward_only: bool = False,
        force_all_reduce: bool | None = False,
        **keywords: Any,
    ) -> Any:
        """Run a step; what the language model's schedule returns."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        batches = []
        if self._replica is not None:
            batches = [dict(next(iterators[0])) for _ in range(num_microbatches)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not forward_only):
            passes = self._encode(batches)
        self._finalizes = self._config.finalize_model_grads_func is not None and not forward_only
        reports: Any = []
        if self._replica is not None:
            first = iter(batches)
            given = [first, *iterators[1:]] if isinstance(data_iterator, list) else first
            reports = self._run_language(
                forward_step_func=forward_step_func,
                data_iterator=given,
                model=model,
                num_microbatches=num_microbatches,
                forward_only=forward_only,
                force_all_reduce=force_all_reduce,
                **keywords,
            )
        if not forward_only:
            for one in passes:
                one.backward()
            if self._finalizes:
                self._finalize_encoders(bool(force_all_reduce))
        return reports

    def _run_language(self, **step: Any) -> Any:
        """Phase two, on ranks of the language model."""
        schedule = self._schedule or get_forward_backward_func()
        with self._language_alone():
            return schedule(**step)

    def destroy(self) -> None:
        """Release the groups that rows travel in; a second call does nothing."""
        self._groups.destroy()

    def _encode(self, batches: list[MicroBatch]) -> list[ModalityPass]:
        """Phase one; puts the rows into the micro-batches."""
        model = self._chunks[0]
        plans = [_uncut_plan(model, batch) for batch in batches]
        cuts = [self._cut(batch) for batch in batches]
        passes = []
        for modality in self._modalities:
            name, seed = modality.name, _draw_seed(modality, trains=model.training)
            jobs = [
                Job(
                    replica=self._replica or 0,
                    inputs=(batch.get("modality_inputs") or {}).get(name),
                    placement=self._placement(name, plan, cut),
                    seed=seed,
                )
                for batch, plan, cut in zip(batches, plans, cuts, strict=True)
            ]
            jobs = gather_jobs(modality, self._replica, jobs)
            passes.append(ModalityPass(modality, jobs, self._replica, seed))
            self.costs[name] = passes[-1].cost
        here = self._language.positions.get(dist.get_rank())
        reads = here is not None and here.pp == 0
        device = next(model.parameters()).device
        for number, batch in enumerate(batches):
            batch.pop("modality_inputs", None)
            batch.pop("alignment_plan", None)
            if not reads and not model.level_route.arrives:
                continue
            share = cuts[number].share_of_plan(plans[number])
            if reads:
                share = with_own_rows(share)
                if plans[number].index is not None:  # a cut has dropped it
                    share = with_row_index(share)
            batch["alignment_plan"] = share.to(device)
            if reads:
                batch["encoded_rows"] = {
                    modality.name: one.rows[number]
                    for modality, one in zip(self._modalities, passes, strict=True)
                }
        return passes

    def _cut(self, batch: MicroBatch) -> Any:
        adapter = self._chunks[0].partition_adapter
        if adapter is None:
            return sequence_cut(None, None)
        packed = packed_params(
            batch.get("packing_kwargs"),
            tokens=batch["input_ids"].size(1),
            cp_size=adapter.cp_size,
        )
        return sequence_cut(adapter, packed)

    def _placement(self, name: str, plan: AlignmentPlan, cut: Any) -> Placement:
        """Where the rows of a micro-batch go, on every place of the first stage."""
        sources = {}
        for cp_rank in range(cut.cp_size):
            share = cut.of_rank(cp_rank=cp_rank, tp_rank=0).share_of_plan(plan)
            for tp_rank, piece in enumerate(share.pieces or (share,)):
                stream = piece.streams.get(name)
                source_n = torch.empty(0, dtype=torch.long)
                if stream is not None:
                    source_n = stream.sources_N
                    if source_n is None:
                        source_n = torch.arange(stream.rows_N.numel())
                sources[cp_rank, tp_rank] = source_n
        return Placement(rows=plan.counts.get(name, 0), sources=sources)

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
        if self._apart:
            self._tell_num_tokens()
        assert self._num_tokens is not None, "the language model was finalised"
        scale = 1.0 / self._num_tokens.clamp(min=1)
        for modality in self._modalities:
            if isinstance(modality.submodule, DistributedDataParallel):
                modality.submodule.finish_grad_sync(force_all_reduce=force_all_reduce)
                modality.submodule.scale_gradients(scale)

    def _tell_num_tokens(self) -> None:
        """Let ranks of encoders alone know the tokens of the global batch; all ranks call it."""
        if self._replica is None:
            device = next(self._chunks[0].parameters()).device
            self._num_tokens = torch.zeros([], dtype=torch.int, device=device)
        assert self._num_tokens is not None, "the language model was finalised"
        dist.broadcast(self._num_tokens, src=self._language.ranks[0])


class _Groups:
    """Process groups that were made once for the ranks that they have."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}

    def of(self, groups: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """This rank's of disjoint groups; None where all have one rank. All ranks call it."""
        key = tuple(groups)
        if key not in self._known and all(len(ranks) == 1 for ranks in key):
            self._known[key] = None
        elif key not in self._known:
            own: Any = dist.new_subgroups_by_enumeration([[*ranks] for ranks in key])[0]
            self._known[key] = own
        return self._known[key]

    def destroy(self) -> None:
        """Release them; a second call does nothing."""
        for group in self._known.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._known = {}


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


def _uncut_plan(model: MimoModel, batch: Mapping[str, Any]) -> AlignmentPlan:
    plan: AlignmentPlan | None = batch.get("alignment_plan")
    if plan is None:
        ids_BS = batch["input_ids"].cpu()
        return build_alignment_plan(ids_BS, model.special_token_ids)
    if plan.positions_S is not None or plan.pieces:
        raise InputError(
            "alignment_plan is cut for one rank already, and EncodeFirst finds out what all ranks "
            "of the first stage place; give it the plan of the whole sequence"
        )
    return plan.to("cpu")


def _draw_seed(modality: Modality, *, trains: bool) -> int | None:
    """A seed for what an encoder draws in this step, from the generator that is checkpointed.

    That is the language model's, whose ranks tell encoders on ranks of their own.
    """
    submodule = modality.submodule
    if not (trains if submodule is None else submodule.training):
        return None
    seed = torch.randint(1 << 30, (1,))
    pool = modality.pool
    if len(pool.owners[0]) > 1 and modality.group is not None and not pool.is_apart:
        # tensor-parallel ranks of an encoder may be of different pipeline stages
        seed = seed.to(modality.like_H.device)
        dist.broadcast(seed, group_src=0, group=modality.group)
    return int(seed.item())


def _overlaps(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) and module.ddp_config.overlap_grad_reduce


def _one_or_all(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]
