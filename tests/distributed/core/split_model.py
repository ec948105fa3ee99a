"""A small model whose encoder can be split, and one global batch; run whole or under a layout.

Legend: S sequence, B micro-batch, N rows of the modality, L rows of a clip, F and H features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.distributed.core.whole import Tensors, parts, whole
from tests.rank_pool import model_parallel

SEQUENCE, BATCH, VOCABULARY, HIDDEN = 32, 2, 32, 16
IMAGE, FEATURES, LONGEST = 31, 6, 4
LEVEL_WIDTHS = 6, 8
PER_TOKEN = ("input_ids", "position_ids", "labels", "loss_mask")
# Rows of the clips in each micro-batch: uneven, none, one clip, fewer clips than ranks, even,
# one clip that outweighs the rest.
CLIPS = ((3, 1, 2), (), (4,), (1, 1), (2, 2, 2, 2), (1, 4, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layout, an encoder, and how its work is divided.

    Attributes:
        encoder: "clips", "vit", or "levels": clips whose rows have two further levels.
        packed: a micro-batch is one sequence of two documents.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    overlap: bool = False
    encoder: str = "clips"
    split: str = "auto"
    frozen: tuple[str, ...] = ()
    packed: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one rank computed.

    Attributes:
        weights: whole, before the step; {} where they were given.
        gradients: of every trained parameter's part, which is ``[where]`` of the whole.
        seen: the number of items in each call of the encoder.
        generator: state of the default generator after the last call.
    """

    loss: float
    weights: Tensors
    gradients: dict[str, tuple[tuple[slice, ...], torch.Tensor]]
    seen: list[int]
    generator: torch.Tensor


class ClipEncoder(nn.Module):
    """Plain PyTorch: clips of several lengths, [clips, L, F] to [N, H]; rows of a clip mix."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.widen = nn.Linear(FEATURES, width)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(width, width)

    def rows_per_item(self, clips: torch.Tensor, lengths: list[int]) -> list[int]:
        return list(lengths)

    def forward(self, clips: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        hidden = self.dropout(torch.tanh(self.widen(clips)))
        hidden = hidden + hidden.mean(dim=1, keepdim=True)
        rows = [clip[:length] for clip, length in zip(self.narrow(hidden), lengths, strict=True)]
        return torch.cat(rows) if rows else hidden.new_zeros(0, hidden.size(-1))


class LeveledEncoder(ClipEncoder):
    """As ``ClipEncoder``, with two levels of each row, of two widths."""

    num_levels = 2

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.deep = nn.ModuleList([nn.Linear(width, LEVEL_WIDTHS[0]), nn.Linear(width, width)])

    def blank_inputs(self) -> dict[str, Any]:
        return {"clips": torch.zeros(1, LONGEST, FEATURES), "lengths": [1]}

    def forward(self, clips: torch.Tensor, lengths: list[int]) -> Any:
        from megatron.core.models.mimo.alignment import EncodedRows

        rows_NH = super().forward(clips, lengths)
        levels = tuple(torch.tanh(deep(rows_NH)) for deep in self.deep)
        return EncodedRows(rows_NH=rows_NH, levels=levels)


def leveled_language_model() -> type[nn.Module]:
    """A GPT whose layer l adds level l to its output."""
    from megatron.core.models.gpt import GPTModel

    class LeveledGPT(GPTModel):
        def forward(self, *args: Any, level_rows: tuple[Any, ...] = (), **kwargs: Any) -> Any:
            def add(level: Any, _: Any, __: Any, output: tuple[torch.Tensor, Any]) -> Any:
                return level.add_to(output[0]), *output[1:]

            hooks = [
                layer.register_forward_hook(partial(add, level))
                for layer, level in zip(self.decoder.layers, level_rows, strict=False)
            ]
            try:
                return super().forward(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()

    return LeveledGPT


def run(cell: Cell, weights: Tensors | None = None, *, dropout: float = 0.0) -> Result:
    """Loss and gradients of the global batch, reduced by Megatron; on every rank of the cell.

    Starts from ``weights``, or on one process from random ones.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    torch.manual_seed(5)
    model = build(cell, model_parallel(tp=cell.tp, cp=cell.cp), dropout=dropout)
    kept = {} if weights else whole(model, lambda parameter: parameter.data)
    with torch.no_grad():
        for part in parts(model) if weights else ():
            part.parameter.copy_(part.of(weights))
    seen = watch_encoder(model.modality_submodules["images"])
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=cell.overlap, bucket_size=200)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    dp_rank = parallel_state.get_data_parallel_rank()
    mine = micro_batches(cell.encoder, packed=cell.packed)[dp_rank :: cell.dp]
    with wrapped.no_sync():
        sums = [_step(wrapped, batch) for batch in mine[:-1]]
    sums.append(_step(wrapped, mine[-1]))
    total = torch.stack(sums).sum(dim=0)
    finalize_model_grads([wrapped], total[1].int())
    torch.distributed.all_reduce(
        total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return Result(
        loss=(total[0] / total[1]).item(),
        weights=kept,
        gradients={
            part.key: (part.where, part.parameter.main_grad)
            for part in parts(model)
            if part.parameter.requires_grad
        },
        seen=seen,
        generator=torch.get_rng_state(),
    )


def watch_encoder(submodule: Any) -> list[int]:
    """The number of items in each call of the encoder from now on."""
    seen: list[int] = []
    submodule.encoders["encoder"].register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(next(iter(inputs.values())))), with_kwargs=True
    )
    return seen


def build(cell: Cell, groups: Any, *, dropout: float = 0.0) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import (
        MimoModel,
        MimoModelConfig,
        VisionModalitySubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.layers import language_layer_spec

    config = _transformer_config(cell)
    language = ModuleSpec(
        module=leveled_language_model() if cell.encoder == "levels" else GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config),
            "vocab_size": VOCABULARY,
            "max_sequence_length": SEQUENCE,
            "position_embedding_type": "rope",
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": groups,
        },
    )

    def projection(width: int) -> Any:
        return ModuleSpec(nn.Linear, {"in_features": width, "out_features": HIDDEN})

    parts: dict[str, Any] = {
        "encoders": {"encoder": _encoder(cell, config, groups, dropout)},
        "input_projections": [projection(8)],
    }
    if cell.encoder == "levels":
        parts["level_projections"] = [projection(width) for width in LEVEL_WIDTHS]
    model = MimoModel(
        MimoModelConfig(
            language,
            {"images": ModuleSpec(module=VisionModalitySubmodules, submodules=parts)},
            {"images": IMAGE},
            kv_format="thd" if cell.packed else "sbhd",
            encoder_split=cell.split,
        ),
        cp_group=groups.cp,
        tp_group=groups.tp,
    )
    model.freeze(*cell.frozen)
    return model


def _transformer_config(cell: Cell) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=3 if cell.encoder == "levels" else 1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=cell.tp,
        context_parallel_size=cell.cp,
        sequence_parallel=cell.sequence_parallel,
    )


def _encoder(cell: Cell, config: Any, groups: Any, dropout: float) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.encoders import VisionTransformer, encoder_config
    from megatron.mimo.layers import encoder_layer_spec

    if cell.encoder == "clips":
        return ModuleSpec(ClipEncoder, {"width": 8, "dropout": dropout})
    if cell.encoder == "levels":
        return ModuleSpec(LeveledEncoder, {"width": 8})
    vision = encoder_config(config, num_layers=1, hidden_size=8, num_attention_heads=4)
    params = {
        "config": vision,
        "transformer_layer_spec": encoder_layer_spec(vision),
        "image_size": (4, 4),
        "patch_size": 2,
        "channels": 2,
        "pg_collection": groups,
    }
    return ModuleSpec(VisionTransformer, params)


def micro_batches(encoder: str, *, packed: bool = False) -> list[dict[str, Any]]:
    """Arguments of the model for every micro-batch, always the same."""
    generator = torch.Generator().manual_seed(11)
    batches = [_micro_batch(encoder, clips, generator) for clips in CLIPS]
    if packed:
        for batch in batches:
            batch |= {name: batch[name].reshape(1, -1) for name in PER_TOKEN}
            batch["packing_kwargs"] = {"cu_seqlens_q": [0, 24, BATCH * SEQUENCE]}
    return batches


def _micro_batch(
    encoder: str, clips: tuple[int, ...], generator: torch.Generator
) -> dict[str, Any]:
    rows = 4 * len(clips) if encoder == "vit" else sum(clips)
    ids = torch.randint(0, IMAGE, (BATCH * SEQUENCE,), generator=generator)
    ids[torch.randperm(BATCH * SEQUENCE, generator=generator)[:rows]] = IMAGE
    ids_BS = ids.view(BATCH, SEQUENCE)
    labels_BS = ids_BS.roll(-1, dims=1)
    inputs: dict[str, Any] = {
        "clips": torch.randn(len(clips), LONGEST, FEATURES, generator=generator),
        "lengths": list(clips),
    }
    if encoder == "vit":
        inputs = {"pixel_values": torch.randn(len(clips), 2, 4, 4, generator=generator)}
    return {
        "input_ids": ids_BS,
        "position_ids": torch.arange(SEQUENCE).expand_as(ids_BS),
        "labels": labels_BS.where(labels_BS < IMAGE, 0),
        "loss_mask": (labels_BS < IMAGE).float(),
        "modality_inputs": {"images": {"encoder": inputs}} if clips else {},
    }


def _step(wrapped: Any, batch: dict[str, Any]) -> torch.Tensor:
    losses_BS, mask_BS = wrapped(**batch)
    total = (losses_BS * mask_BS).sum()
    total.backward()
    return torch.stack([total.detach(), mask_BS.sum()])
