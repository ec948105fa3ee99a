"""The memory that a chunk of the model keeps of one micro-batch, and what it needs meanwhile.

Legend: T vectors of this rank, n those after sequence parallelism has cut them, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers.vocabulary_loss import PIECE
from megatron.mimo.planner.saved import (
    Kernels,
    Load,
    Saved,
    layer_saved,
    linear_saved,
    norm_saved,
)

__all__ = ["Activations", "MicroBatch", "Recomputation", "kept_by_chunk"]

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch as all ranks of a replica see it, before anything cuts it.

    Attributes:
        tokens: positions, padding included: rows times their length.
        positions: for which angles are made: the length of a row, or all of them.
        labels: positions that have one; None for all.
        works: modality -> encoder -> what it does.
        rows: modality -> rows that its projection is given.
    """

    tokens: int
    positions: int
    labels: int | None = None
    works: Mapping[str, Mapping[str, EncoderWork]] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """Recomputation of activations, as Megatron's flags say.

    Attributes:
        granularity: None, "full" or "selective".
        method: of "full": "uniform" or "block".
        layers: of "uniform", in one piece; of "block", how many.
        modules: of "selective".
    """

    granularity: str | None = None
    method: str | None = None
    layers: int = 1
    modules: frozenset[str] = frozenset()

    @classmethod
    def of(cls, args: Namespace) -> Recomputation:
        """The recomputation of a run."""
        return cls(
            granularity=args.recompute_granularity,
            method=args.recompute_method,
            layers=args.recompute_num_layers or 1,
            modules=frozenset(args.recompute_modules or ()),
        )

    def kept(self, layers: Sequence[Saved]) -> tuple[float, float]:
        """Bytes that a stack of layers keeps, and those that come back while it is recomputed."""
        if self.granularity == "selective":
            kept = [layer.after(set(self.modules)) for layer in layers]
            back = [layer.whole - own for layer, own in zip(layers, kept, strict=True)]
            return sum(kept), max(back, default=0.0)
        whole = [layer.whole for layer in layers]
        if self.granularity is None:
            return sum(whole), 0.0
        if self.method == "block":
            kept = [layer.input for layer in layers[: self.layers]] + whole[self.layers :]
            return sum(kept), max(whole[: self.layers], default=0.0)
        starts = range(0, len(layers), self.layers)
        pieces = [sum(whole[start : start + self.layers]) for start in starts]
        return sum(layers[start].input for start in starts), max(pieces, default=0.0)


@dataclass(kw_only=True)
class Activations:
    """Bytes of one micro-batch in one chunk of the model.

    Attributes:
        encoders: modality -> kept by its encoders and its projection.
        layers: kept by the language model's layers.
        ends: kept by its last norm, its output layer and the loss.
        working: beside what is kept, at the highest point of the backward pass.
    """

    encoders: dict[str, float] = field(default_factory=dict)
    layers: float = 0.0
    ends: float = 0.0
    working: float = 0.0

    @property
    def kept(self) -> float:
        """All that waits for the backward pass."""
        return sum(self.encoders.values()) + self.layers + self.ends


def kept_by_chunk(
    chunk: Any,
    batch: MicroBatch,
    recomputation: Recomputation,
    kernels: Kernels,
    *,
    receives_gradient: bool = False,
) -> Activations:
    """What a rank keeps of a micro-batch in its backward pass.

    Args:
        chunk: of a ``MimoModel``, its parameters frozen and adapted as they are trained.
        batch: of the micro-batch.
        recomputation: of layers.
        kernels: that compute.
        receives_gradient: an earlier stage or chunk has a parameter that is trained.
    """
    found = Activations()
    is_first = chunk.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY)
    flows = receives_gradient
    cp = chunk.config.context_parallel_size
    for modality, submodules in chunk.modality_submodules.items() if is_first else ():
        works = batch.works.get(modality, {})
        kept, trains = 0.0, False
        for name, encoder in submodules.encoders.items():
            if name in works:  # ranks of context parallelism encode a share each
                own = _Encoder(encoder, works[name], 1 / cp, recomputation, kernels)
                kept += own.keep(found)
                trains |= own.flows
        rows = batch.rows.get(modality, 0) / cp
        for projection in (*submodules.input_projections, *submodules.level_projections):
            kept += _projection(projection, rows, trains, _size(chunk), kernels)
            trains |= _is_trained(projection)
        found.encoders[modality] = kept
        flows |= trains
    if chunk.language_model is not None:
        _language(chunk, batch, recomputation, kernels, found, flows=flows)
    return found


class _Encoder:
    """An encoder of rows, module by module."""

    def __init__(
        self,
        encoder: nn.Module,
        work: EncoderWork,
        share: float,
        recomputation: Recomputation,
        kernels: Kernels,
    ) -> None:
        self._encoder, self._work, self._share = encoder, work, share
        self._recomputation, self._kernels = recomputation, kernels
        self._size = _size(encoder)
        self.flows = False

    def keep(self, found: Activations) -> float:
        """Bytes that it keeps."""
        kept = 0.0
        for name, child in _in_order(self._encoder):
            vectors = self._vectors(name)
            if isinstance(child, TransformerBlock):
                load = Load(vectors=vectors, size=self._size, kernels=self._kernels)
                own, self.flows, working = _stack(child, load, self._recomputation, self.flows)
                kept += own
                found.working = max(found.working, working)
                continue
            kept += self._other(child, vectors)
            self.flows |= _is_trained(child)
        return kept

    def _other(self, module: nn.Module, vectors: float) -> float:
        """Bytes of what is before or behind the layers: patch embeddings, norms, convolutions."""
        if isinstance(module, nn.Conv1d):
            if not _is_trained(module) and not self.flows:
                return 0.0
            inputs = vectors * module.stride[0] * module.in_channels
            return (inputs + vectors * module.out_channels) * self._size
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return vectors * module.weight[0].numel() * self._size * _is_trained(module)
        if getattr(module, "weight", None) is None:
            return sum(self._other(child, vectors) for child in module.children())
        if module.weight.dim() > 1:  # type: ignore[operator]
            return linear_saved(module, vectors, self._size)
        load = Load(vectors=vectors, size=self._size, kernels=self._kernels)
        return norm_saved(module, vectors, load) if self.flows or _is_trained(module) else 0.0

    def _vectors(self, path: str) -> float:
        parts = [part for part in self._work.vectors if path == part or part.startswith(path)]
        named = max((self._work.vectors[part] for part in parts), default=None)
        most = max(self._work.vectors.values(), default=0)
        return (most if named is None else named) * self._share


def _language(
    chunk: Any,
    batch: MicroBatch,
    recomputation: Recomputation,
    kernels: Kernels,
    found: Activations,
    *,
    flows: bool,
) -> None:
    """The language model: its layers, and on the last stage what stands behind them."""
    language, config, size = chunk.language_model, chunk.config, _size(chunk)
    cp = config.context_parallel_size
    embedding = getattr(language, "embedding", None)
    flows |= embedding is not None and _is_trained(embedding)
    load = Load(
        vectors=batch.tokens / cp,
        cut=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        size=size,
        rotates=getattr(language, "position_embedding_type", "none") in ("rope", "mrope"),
        kernels=kernels,
    )
    found.layers, flows, working = _stack(language.decoder, load, recomputation, flows)
    if flows and load.rotates:  # cosines or sines, for all layers
        found.layers += batch.positions / cp * config.kv_channels * size
    found.working = max(found.working, working)
    if not flows and not _is_trained(language):
        return
    output = getattr(language, "output_layer", None)
    if output is None:
        return
    weight = output.weight
    if weight is None:
        weight = language.shared_embedding_or_output_weight()
    hidden = weight.size(-1) * size
    # The loss is computed of positions that have a label alone.
    rows = load.vectors if batch.labels is None else batch.labels / cp
    logits = rows * weight.size(0) * _FP32
    in_pieces = logits > getattr(language, "_whole_logits", float("inf"))
    if in_pieces:
        found.ends += rows * (hidden + 24)  # labels, places, and two numbers each
        piece = min(PIECE, rows * weight.size(0) * size)
        loss = piece + rows * hidden + weight.numel() * size * weight.requires_grad
    else:
        keeps = weight.requires_grad or hasattr(output, "adapter")
        found.ends += rows * hidden * keeps
        found.ends += logits + rows * (9 + 8)
        loss = logits * (2 if size < _FP32 else 1)
    found.working = max(found.working, loss)


def _stack(
    block: Any, load: Load, recomputation: Recomputation, flows: bool
) -> tuple[float, bool, float]:
    """What a stack of layers keeps, whether its output has a gradient, and what it works with."""
    layers, working = [], 0.0
    for layer in block.layers:
        trains = _is_trained(layer)
        if flows or trains:
            saved = layer_saved(layer, load)
            layers.append(saved)
            # gradients of what is between the linear layers, and of the residual stream
            widest = max(saved.inner, saved.experts / 2, saved.attention / 2)
            working = max(working, widest + 3 * saved.input)
        flows |= trains
    kept, back = recomputation.kept(layers)
    norm = getattr(block, "final_layernorm", None)
    if flows and norm is not None:
        kept += norm_saved(norm, load.cut_vectors, load)
    return kept, flows, working + back


def _projection(
    projection: nn.Module, rows: float, flows: bool, size: int, kernels: Kernels
) -> float:
    """Norm, linear layers, and activations between them."""
    linears = [
        one
        for one in projection.modules()
        if getattr(one, "weight", None) is not None and one.weight.dim() > 1  # type: ignore[operator]
    ]
    if not linears or not (flows or _is_trained(projection)):
        return 0.0
    kept = 0.0
    load = Load(vectors=rows, size=size, kernels=kernels)
    widest: Any = linears[0].weight
    for one in projection.modules():
        weight: Any = getattr(one, "weight", None)
        if weight is not None and weight.dim() == 1:
            kept += norm_saved(one, rows * widest.size(-1) / weight.numel(), load)
    for number, linear in enumerate(linears):
        own: Any = linear.weight
        kept += linear_saved(linear, rows, size)
        kept += rows * own.size(0) * size * (number < len(linears) - 1)
    return kept


def _in_order(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The children, those before the layers first."""
    children = [
        (name, child)
        for name, child in module.named_children()
        if not isinstance(child, nn.Embedding | VocabParallelEmbedding)
    ]
    late = ("final_layernorm", "post_layernorm", "merger")
    return sorted(children, key=lambda pair: (pair[0] in late, _has_layers(pair[1])))


def _has_layers(module: nn.Module) -> bool:
    return isinstance(module, TransformerBlock)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _size(module: nn.Module) -> int:
    """Bytes of an element of what this module computes with."""
    config: Any = getattr(module, "config", None)
    dtype = getattr(config, "params_dtype", None) or next(module.parameters()).dtype
    return torch.empty(0, dtype=dtype).element_size()
