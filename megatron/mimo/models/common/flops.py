"""Floating-point operations of training, counted from a model as it is built.

What is counted is what the mathematics needs: matrix products, attention and the recurrence of
linear attention (three products of each head's state with a vector for each token, however it is
computed), of real tokens and real media, the forward pass and those halves of the backward pass
that a weight or an input with a gradient asks for. Padding, recomputation and what is computed
twice on several ranks are not. Norms and activations are left out, as everywhere.

A model's operations are linear in a few numbers of a batch, its *amounts*: tokens, pairs of a
query and a key, patches. Their costs are found once (:func:`training_costs`), so that a step is
counted by a few multiplications on the host (:func:`operations`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.utils import unwrap_model
from megatron.mimo.data.micro_batches.batch import Batch
from megatron.mimo.data.row_cache.lookup import BESIDE, COUNTS
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers.gated_delta_net.kernels import DeltaRule
from megatron.mimo.models.common.vocabulary import real_tokens

__all__ = [
    "Costs",
    "attended_pairs",
    "language_amounts",
    "media_amounts",
    "media_works",
    "modality_costs",
    "operations",
    "shards_of",
    "span_lengths",
    "span_pairs",
    "training_costs",
]

Amounts = Mapping[str, int]
Costs = dict[str, float]
"""Amount -> operations for one of it."""

_VECTORS, _PAIRS, _WITHIN = "language vectors", "language pairs", " within "
_LABELS = "language labels"  # positions whose logits are computed
# Arguments that encoders do not see: of any-resolution images, and of media whose rows are cached.
_NOT_ENCODED = ("row_sources", *BESIDE)
_CORE = "core_attention"
# Within an attention they are registered before the projections that come first.
_COME_LAST = (_CORE, "linear_proj")


def attended_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs of a query and a key in causal attention.

    Args:
        lengths: tokens of each document.
        window: keys that a query sees at most, its own included; None for all before it.
    """
    pairs = 0
    for length in lengths:
        seen = length if window is None else min(window, length)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    return pairs


def operations(costs: Mapping[str, float], amounts: Amounts) -> float:
    """FLOPs of a batch with these amounts."""
    return sum(cost * amounts.get(amount, 0) for amount, cost in costs.items())


def span_pairs(length: int, window: int | None = None) -> int:
    """Pairs that a span adds to causal attention: its tokens see each other, whatever the window.

    Args:
        length: tokens of the span.
        window: as of :func:`attended_pairs`.
    """
    beyond = 0 if window is None else max(length - window, 0)
    return length * (length - 1) // 2 + beyond * (beyond + 1) // 2


def span_lengths(batch: Batch) -> Counter[int]:
    """Length -> how many spans of a micro-batch on the host have it."""
    ids_BS = batch.get("span_ids")
    if ids_BS is None:
        return Counter()
    return Counter(
        length
        for ids_S in ids_BS
        for length in torch.bincount(ids_S[ids_S != 0]).tolist()
        if length
    )


def language_amounts(
    costs: Mapping[str, float],
    documents: Mapping[int, int],
    labels: int | None = None,
    *,
    spans: Mapping[int, int],
) -> dict[str, int]:
    """Those amounts of a batch that the language model goes by.

    Args:
        costs: of the whole model, whose attentions may have windows.
        documents: length without padding -> how many documents of the batch have it.
        labels: positions that have one, where the loss is computed of these alone.
        spans: length -> how many spans of the batch have it.
    """
    vectors = sum(length * count for length, count in documents.items())
    amounts = {_VECTORS: vectors, _LABELS: vectors if labels is None else labels}
    for amount in costs:
        if amount.startswith(_PAIRS):
            named = amount.removeprefix(_PAIRS).removeprefix(_WITHIN)
            window = int(named) if named else None
            amounts[amount] = sum(
                attended_pairs([length], window) * count for length, count in documents.items()
            ) + sum(span_pairs(length, window) * count for length, count in spans.items())
    return amounts


def media_amounts(
    model: Any, inputs: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, int]:
    """Those amounts of a micro-batch that encoders and projections go by.

    Args:
        model: the chunk of a ``MimoModel`` that has the encoders.
        inputs: the ``modality_inputs`` of the batch, as they are on the host.

    Raises:
        UnsupportedError: an encoder does not say what it does.
    """
    amounts = {}
    works, rows = media_works(model, inputs)
    for modality, by_encoder in works.items():
        for name, work in by_encoder.items():
            for kind in ("vectors", "pairs"):
                for part, number in getattr(work, kind).items():
                    amounts[f"{modality}.{name}.{part} {kind}"] = number
        amounts[f"{modality} rows"] = rows[modality]
    return amounts


def media_works(
    model: Any, inputs: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> tuple[dict[str, dict[str, EncoderWork]], dict[str, int]]:
    """What each encoder does for a micro-batch, and how many rows each projection gives.

    Args and errors are those of :func:`media_amounts`.

    Returns:
        ``{modality: {encoder: work}}`` and ``{modality: rows}``.
    """
    works: dict[str, dict[str, EncoderWork]] = {}
    rows = {}
    for modality, by_encoder in inputs.items():
        submodules = unwrap_model(model.modality_submodules[modality])
        works[modality], given = {}, 0
        for name, arguments in by_encoder.items():
            encoder = unwrap_model(submodules.encoders[name])
            _require_work(encoder, f"{modality}.{name}")
            known = {key: arguments[key] for key in arguments if key not in _NOT_ENCODED}
            work = encoder.work(**known)
            cached = sum(max(count, 0) for count in arguments.get(COUNTS, ()))
            given += work.rows + cached
            works[modality][name] = work
        (projection,) = submodules.input_projections or (None,)
        gives = getattr(unwrap_model(projection), "rows_of", None)
        rows[modality] = given if gives is None else gives(given)
    return works, rows


def training_costs(model: Any, *, trained_before: bool = False) -> Costs:
    """What one of each amount costs on all ranks that hold a part of this chunk of the model.

    Args:
        model: a chunk of a ``MimoModel``, its parameters frozen and adapted as they are trained.
        trained_before: an earlier pipeline stage or chunk has a parameter that is trained.

    Raises:
        UnsupportedError: an encoder or a projection does not say what it does.
    """
    flow = _Flow(has_gradient=trained_before)
    # Encoders on grids of their own are on every stage, and their work is done once.
    is_first = model.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY)
    for modality, submodules in model.modality_submodules.items() if is_first else ():
        of_modality = _Flow(costs=flow.costs)
        _count_modality(modality, unwrap_model(submodules), of_modality)
        flow.has_gradient |= of_modality.has_gradient
    if model.language_model is not None:
        _count_language(unwrap_model(model.language_model), flow)
    for head in model.heads.children():
        _count(head, flow, _LanguageAmounts())
    return flow.costs


def modality_costs(modality: str, submodules: Any, *, trained_before: bool = False) -> Costs:
    """What one of each amount costs on all ranks that hold a part of this stage of a modality.

    Of encoders on ranks of their own. Args and errors are those of :func:`training_costs`.
    """
    flow = _Flow()
    _count_modality(modality, unwrap_model(submodules), flow, trained_before=trained_before)
    return flow.costs


@dataclass(kw_only=True)
class _Flow:
    """Adds up costs along the way of the data.

    Attributes:
        costs: so far.
        has_gradient: what the next module is given depends on a parameter that is trained.
    """

    costs: Costs = field(default_factory=dict)
    has_gradient: bool = False

    def multiply(self, amount: str, weight: nn.Parameter, copies: float) -> None:
        """Each vector of an amount is multiplied with a weight, of which others hold the rest."""
        needs = 1 + self.has_gradient + weight.requires_grad
        self._add(amount, 2 * weight.numel() * copies * needs)

    def adapt(self, amount: str, linear: nn.Module, adapter: Any, copies: float) -> None:
        """The two halves of an adapter; the second one's input always has a gradient."""
        for half, needs in ((adapter.down, 2 + self.has_gradient), (adapter.up, 3)):
            share = shards_of(half, getattr(linear, "config", None)) * copies
            self._add(amount, 2 * half.numel() * share * needs)
        self.has_gradient = True

    def attend(self, amount: str, config: Any) -> None:
        """Scores and weighted sums of an attention, for each pair of an amount."""
        channels = config.num_attention_heads * config.kv_channels
        self._add(amount, 2 * 2 * channels * (3 if self.has_gradient else 1))

    def mix(self, amount: str, operations: int) -> None:
        """Each vector of an amount passes a state, of which no weight asks for a gradient."""
        self._add(amount, operations * (3 if self.has_gradient else 1))

    def _add(self, amount: str, cost: float) -> None:
        self.costs[amount] = self.costs.get(amount, 0.0) + cost


class _LanguageAmounts:
    """Which amounts a module of the language model goes by."""

    def vectors(self, path: str) -> str:  # noqa: ARG002 (all modules see all tokens)
        return _VECTORS

    def pairs(self, path: str, attention: nn.Module) -> str:  # noqa: ARG002 (as above)
        window = _window(attention)
        return _PAIRS + ("" if window is None else f"{_WITHIN}{window}")


@dataclass(frozen=True)
class _EncoderAmounts:
    """Which amounts a module of an encoder goes by."""

    prefix: str
    work: EncoderWork

    def vectors(self, path: str) -> str:
        return f"{self.prefix}.{self._part(self.work.vectors, path)} vectors"

    def pairs(self, path: str, attention: nn.Module) -> str:  # noqa: ARG002 (windows are pairs)
        return f"{self.prefix}.{self._part(self.work.pairs, path)} pairs"

    def _part(self, parts: Mapping[str, int], path: str) -> str:
        leading = [part for part in parts if path == part or path.startswith(f"{part}.")]
        if not leading:
            raise UnsupportedError(
                f"encoder {self.prefix}: its work() says nothing of {path}; name it, or a part "
                "that holds it"
            )
        return max(leading, key=len)


@dataclass(frozen=True)
class _ProjectionAmounts:
    """All modules of a projection are applied to the rows that it gives."""

    modality: str

    def vectors(self, path: str) -> str:  # noqa: ARG002 (all see all rows)
        return f"{self.modality} rows"

    def pairs(self, path: str, attention: nn.Module) -> str:  # noqa: ARG002 (there are none)
        raise UnsupportedError(f"the projection of modality {self.modality!r} attends at {path}")


_AmountsOf = _LanguageAmounts | _EncoderAmounts | _ProjectionAmounts


def _count_modality(
    modality: str, submodules: Any, flow: _Flow, *, trained_before: bool = False
) -> None:
    has_gradient = False
    for name, wrapped in submodules.encoders.items():
        encoder = unwrap_model(wrapped)
        _require_work(encoder, f"{modality}.{name}")
        work = encoder.work(**encoder.blank_inputs())
        flow.has_gradient = trained_before
        _count(encoder, flow, _EncoderAmounts(f"{modality}.{name}", work))
        has_gradient |= flow.has_gradient
    flow.has_gradient = has_gradient
    for projection in (*submodules.input_projections, *submodules.level_projections):
        _count(unwrap_model(projection), flow, _ProjectionAmounts(modality))
        has_gradient |= flow.has_gradient
    flow.has_gradient = has_gradient


def _count_language(language: Any, flow: _Flow) -> None:
    amounts = _LanguageAmounts()
    output = getattr(language, "output_layer", None)
    for path, child in language.named_children():
        if child is not output:
            _count(child, flow, amounts, path=path)
    if output is None:
        return
    weight = output.weight
    if weight is None:
        weight = language.shared_embedding_or_output_weight()
    rows = weight.size(0) * shards_of(weight, getattr(output, "config", None))
    flow.multiply(_LABELS, weight, real_tokens(output, rows) / weight.size(0))


def _count(
    module: nn.Module, flow: _Flow, amounts: _AmountsOf, *, path: str = "", copies: float = 1.0
) -> None:
    """Count a module and those within it, in the order of the data."""
    if path.rsplit(".", 1)[-1] == _CORE:
        flow.attend(amounts.pairs(path, module), module.config)
        return
    if isinstance(module, DeltaRule):
        flow.mix(amounts.vectors(path), module.operations_per_token)
        return
    config: Any = getattr(module, "config", None)
    if path.rsplit(".", 1)[-1] == "experts":
        copies *= config.moe_router_topk / config.num_moe_experts
    children = list(module.named_children())
    for name, child in sorted(children, key=lambda pair: pair[0] in _COME_LAST):
        if name != "adapter":
            inner = f"{path}.{name}" if path else name
            _count(child, flow, amounts, path=inner, copies=copies)
    if isinstance(module, nn.Embedding | VocabParallelEmbedding):
        flow.has_gradient |= any(p.requires_grad for p in module.parameters(recurse=False))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("weight") and parameter.dim() > 1:
            share = copies * shards_of(parameter, getattr(module, "config", None))
            flow.multiply(amounts.vectors(path), parameter, share)
    adapter = getattr(module, "adapter", None)
    if adapter is not None:
        flow.adapt(amounts.vectors(path), module, adapter, copies)
    flow.has_gradient |= any(p.requires_grad for p in module.parameters(recurse=False))


def shards_of(parameter: Any, sizes: Any) -> int:
    """How many ranks hold a part of a parameter, each another one.

    Args:
        parameter: with Megatron's marks.
        sizes: a configuration, or a run's arguments: of tensor and expert parallelism.
    """
    if not getattr(parameter, "allreduce", True):  # an expert's
        etp_size = sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size
        return int(sizes.expert_model_parallel_size * etp_size)
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    return int(sizes.tensor_model_parallel_size) if is_cut else 1


def _window(attention: Any) -> int | None:
    """Keys that a query of this attention sees at most, its own included; None for all."""
    given = getattr(attention, "window", None) or getattr(attention, "window_size", None)
    return None if given is None or given[0] < 0 else int(given[0]) + 1


def _require_work(encoder: Any, name: str) -> None:
    if not hasattr(encoder, "work"):
        raise UnsupportedError(
            f"encoder {name} ({type(encoder).__name__}) does not say what it does; give it a "
            "method work() (megatron.mimo.encoders.work)"
        )
