"""Documents with images and sounds, alone and packed: one process by definition, and layouts.

The definition runs each document alone in float64: its embedding put together by a loop over its
tokens, attention by megatron-core's DotProductAttention under a mask written out pair by pair.

Legend: S sequence, T packed tokens, L tokens of a document, B micro-batch, H hidden, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed.core.whole import Tensors, parts, whole
from tests.distributed.schedule import Sizes, loss_of_labels, run_schedule, wrap_plainly
from tests.rank_pool import model_parallel

SEQUENCE, HIDDEN, VOCABULARY = 64, 16, 40
IMAGE, SOUND, PAD = 38, 39, 0
TOKENS = {"images": IMAGE, "sounds": SOUND}
SECTIONS = [2, 1, 1]  # of a head of 8
# encoder -> modality, features, rows as a grid (frames, lines, columns)
ENCODERS = {
    "near": ("images", 3, (1, 2, 2)),
    "far": ("images", 5, (2, 1, 3)),
    "ear": ("sounds", 4, (1, 1, 1)),
}
# Text lengths and media of each document: images that follow each other without a gap, encoders
# in both orders, documents without any media, lengths that are no multiple of anything.
DOCUMENTS: tuple[tuple[int | str, ...], ...] = (
    (9,),
    (3, "far", "near", 4, "ear", 6),
    (2, "ear", "ear", 11),
    (5, "near", 2, "far", 1, "near", "near", 3),
    (7, "far", 8),
    (1, "near", 14),
    (4, "ear", 2),
    (5,),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is varied in the model and its batches."""

    positions: str = "rope"
    spans: bool = False
    packed: bool = True


class Encoder(nn.Module):
    """[items, rows, F] to [items, rows, H]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(features))


class Projection(nn.Module):
    """[N, H] to [N, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(rows)


def make_samples(kind: Kind) -> list[Any]:
    """The documents as the data layer's samples, always the same."""
    from megatron.mimo.data import MediaItem, Sample, grid_positions

    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, segments in enumerate(DOCUMENTS):
        ids: list[int] = []
        media, grids = [], []
        for segment in segments:
            if isinstance(segment, int):
                ids += torch.randint(1, IMAGE, (segment,), generator=generator).tolist()
                continue
            modality, features, grid = ENCODERS[segment]
            rows = grid[0] * grid[1] * grid[2]
            inputs = {"features": torch.randn(rows, features, generator=generator)}
            media.append(MediaItem(modality=modality, encoder=segment, inputs=inputs, rows=rows))
            grids.append(grid)
            ids += [TOKENS[modality]] * rows
        ids_L = torch.tensor(ids)
        is_media_L = ids_L >= IMAGE
        positions = grid_positions(is_media_L, grids) if kind.positions == "mrope" else None
        samples.append(
            Sample(
                name=f"document {number}",
                token_ids=ids_L,
                is_label=~is_media_L & (torch.rand(len(ids), generator=generator) < 0.8),
                media=tuple(media),
                position_ids=positions,
            )
        )
    return samples


def batches(kind: Kind, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The micro-batches of all documents, as the data layer makes them."""
    from megatron.mimo.data import MediaFormat, PackedDataset, PackingCollator, SampleCollator

    formats: dict[str, list[Any]] = {"images": [], "sounds": []}
    for encoder, (modality, features, grid) in ENCODERS.items():
        shape = (grid[0] * grid[1] * grid[2], features)
        inputs = {"features": (torch.float32, shape)}
        formats[modality].append(MediaFormat(encoder=encoder, inputs=inputs))
    settings: dict[str, Any] = {
        "seq_length": SEQUENCE,
        "vocab_size": VOCABULARY,
        "pad_id": PAD,
        "special_token_ids": TOKENS,
        "media_formats": formats,
        "span_modalities": ("images",) if kind.spans else (),
        "mrope": kind.positions == "mrope",
    }
    samples = make_samples(kind)
    if not kind.packed:
        collate = SampleCollator(**settings)
        for start in range(0, len(samples), 2):
            yield collate(samples[start : start + 2])
        return
    collate = PackingCollator(**settings, cp_size=sizes.cp, tp_size=sizes.tp)
    rows = PackedDataset(samples, seq_length=SEQUENCE, multiple=collate.multiple)  # type: ignore[arg-type]
    for number in range(len(rows)):
        yield collate([rows[number]])


def transformer_config(kind: Kind, sizes: Sizes) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=24,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        pipeline_dtype=torch.float32,
        mrope_section=SECTIONS if kind.positions == "mrope" else None,
        tensor_model_parallel_size=sizes.tp,
        sequence_parallel=sizes.tp > 1,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
    )


def language_spec(kind: Kind, sizes: Sizes, groups: Any, *, stock_attention: bool) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.layers import language_layer_spec

    config = transformer_config(kind, sizes)
    layers = language_layer_spec(config)
    if stock_attention:
        for layer in layers.submodules.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": layers,
            "vocab_size": VOCABULARY,
            "max_sequence_length": SEQUENCE,
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
            "pg_collection": groups,
            "position_embedding_type": kind.positions,
            "scatter_embedding_sequence_parallel": False,
        },
    )


def build_model(kind: Kind, sizes: Sizes, groups: Any, *, stock_attention: bool = False) -> Any:
    """This rank's part of the model."""
    from megatron.core.models.mimo import (
        AudioModalitySubmodules,
        MimoModel,
        MimoModelConfig,
        VisionModalitySubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    modalities = {}
    for modality, module in (
        ("images", VisionModalitySubmodules),
        ("sounds", AudioModalitySubmodules),
    ):
        encoders = {
            name: ModuleSpec(module=Encoder, params={"features": features})
            for name, (owner, features, _) in ENCODERS.items()
            if owner == modality
        }
        submodules = {"encoders": encoders, "input_projections": [ModuleSpec(module=Projection)]}
        modalities[modality] = ModuleSpec(module=module, submodules=submodules)
    model = MimoModel(
        MimoModelConfig(
            language_model_spec=language_spec(kind, sizes, groups, stock_attention=stock_attention),
            modality_submodules_spec=modalities,
            special_token_ids=TOKENS,
            kv_format="thd" if kind.packed and not stock_attention else "sbhd",
        ),
        cp_group=groups.cp,
        tp_group=groups.tp,
    )
    model.pg_collection = groups
    return model


@dataclass(frozen=True, kw_only=True)
class Definition:
    """Of one process: weights, the loss and every gradient."""

    weights: Tensors
    loss: float
    gradients: Tensors


def run_definition(kind: Kind) -> Definition:
    """Each document alone, in float64; runs on a pool of one rank."""
    torch.manual_seed(5)
    model = build_model(kind, Sizes(), model_parallel(), stock_attention=True)
    weights = whole(model, lambda parameter: parameter.data.clone())
    model.double()
    samples = make_samples(kind)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        wanted_L = sample.is_label[1:]
        losses_L = document_losses(model, sample, kind)[:-1]
        total = total + losses_L[wanted_L].sum()
        count += int(wanted_L.sum())
    loss = total / count
    loss.backward()
    gradients = whole(model, lambda parameter: parameter.grad)
    return Definition(weights=weights, loss=loss.item(), gradients=gradients)


def document_losses(model: Any, sample: Any, kind: Kind) -> torch.Tensor:
    """Losses [L] of the next token of one document; the last one means nothing."""
    rows: dict[int, list[torch.Tensor]] = {IMAGE: [], SOUND: []}
    owner = [0] * len(sample.token_ids)
    at = 0
    for number, item in enumerate(sample.media, start=1):
        submodule = model.modality_submodules[item.modality]
        encoded = submodule.encoders[item.encoder](item.inputs["features"].double())
        rows[TOKENS[item.modality]] += [*submodule.input_projections[0](encoded)]
        for _ in range(item.rows):
            at = next(i for i in range(at, len(owner)) if sample.token_ids[i] >= IMAGE)
            owner[at] = number if item.modality == "images" else 0
            at += 1
    embedded = []
    table = model.language_model.embedding
    for position, token in enumerate(sample.token_ids.tolist()):
        row_H = rows[token].pop(0) if token in rows else table.word_embeddings.weight[token]
        if table.add_position_embedding:
            row_H = row_H + table.position_embeddings.weight[position]
        embedded.append(row_H)
    assert not any(rows.values())
    length = len(owner)
    hidden = [
        [
            j > i and not (kind.spans and owner[i] != 0 and owner[i] == owner[j])
            for j in range(length)
        ]
        for i in range(length)
    ]
    positions = sample.position_ids
    logits_LV = model.language_model(
        input_ids=None,
        position_ids=None if positions is None else positions[:, None],
        attention_mask=torch.tensor(hidden)[None, None],
        decoder_input=torch.stack(embedded)[:, None],
    )[0]
    return F.cross_entropy(logits_LV, sample.token_ids.roll(-1), reduction="none")


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Of one rank: its loss, relative errors of its gradients, and what it compared."""

    loss: float
    errors: dict[str, float]
    covered: dict[str, tuple[int, ...]]


def run_layout(kind: Kind, sizes: Sizes, truth: Definition) -> Deviation:
    """Forward and backward by Megatron's schedule and DDP; runs on every rank."""
    model = build_model(kind, sizes, model_parallel(tp=sizes.tp, pp=sizes.pp, cp=sizes.cp))
    with torch.no_grad():
        for part in parts(model):
            part.parameter.copy_(part.of(truth.weights))
    loss = run_step(wrap_plainly(model), list(batches(kind, sizes)))
    errors, covered = {}, {}
    for part in parts(model):
        errors[part.name] = part.error(part.parameter.main_grad.double(), truth.gradients)
        covered[part.key] = part.span()
    return Deviation(loss=loss, errors=errors, covered=covered)


def run_step(wrapped: Any, micro_batches: Sequence[dict[str, Any]]) -> float:
    """One step of Megatron's schedule; the loss on every rank."""
    size = micro_batches[0]["input_ids"].size(0)
    return run_schedule(
        [wrapped], micro_batches, loss_of_labels, seq_length=SEQUENCE, micro_batch_size=size
    )
