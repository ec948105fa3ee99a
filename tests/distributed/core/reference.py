"""A small vision-language-sound model, its batches, and its loss by plain loops on one process.

Legend: S sequence, B micro-batch, H hidden, N rows of one modality, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from tests.distributed.core.encoders import PIXELS, SOUND_WIDTH, image_parts, sound_spec

SEQUENCE = 16
VOCABULARY = 32
HIDDEN = 16
IMAGE, SOUND = 30, 31  # placeholder tokens
PLACEHOLDERS = {"images": IMAGE, "sounds": SOUND}
PATCHES = 4  # rows per image

# Images and sounds of the samples of each global batch, four micro-batches of two samples. Data
# parallelism deals micro-batches out in turn: with two ranks the second one sees no image in its
# first micro-batch of batch 0, none at all in batch 1, and none in its last one of batch 2.
MEDIA: tuple[tuple[tuple[int, int], ...], ...] = (
    ((2, 1), (0, 0), (0, 0), (0, 2), (1, 0), (3, 0), (0, 0), (2, 1)),
    ((1, 0), (3, 1), (0, 0), (0, 0), (2, 0), (0, 0), (0, 0), (0, 0)),
    ((0, 0), (0, 1), (2, 0), (1, 1), (1, 0), (0, 0), (0, 1), (0, 0)),
)
MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample: ids, labels and mask [S], images [n, C, h, w], sounds [m, F].

    ``positions_3S`` are for multimodal RoPE; ``spans_S`` numbers each image's tokens from 1 on.
    """

    ids_S: torch.Tensor
    labels_S: torch.Tensor
    mask_S: torch.Tensor
    positions_3S: torch.Tensor
    spans_S: torch.Tensor
    images: torch.Tensor
    sounds: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is varied in the model and its data; the layout is not part of it.

    Attributes:
        layers: of the language model.
        experts: of each of its layers; 0 for a dense model.
        shared_experts: experts that every token takes, beside those that are chosen.
        latent: multi-latent attention.
        biases: of the linear layers of a dense model, the encoder's among them.
        bf16: weights and activations in bf16, main weights and gradients in fp32.
        frozen: names for ``MimoModel.freeze``.
        frozen_start: freeze the embedding side: encoders, embedding, first half of the layers.
        media: False leaves out all images and sounds.
        mrope: multimodal RoPE, with positions in three dimensions.
        spans: an image's tokens see each other in both directions.
        heads: two further heads, of ``tests/distributed/core/heads.py``.
        levels: of image rows that the first decoder layers add (deepstack).
        samples: of each global batch, at most eight.
        linear: every other layer, the first among them, has a gated delta net in place of
            attention; the others' attention has an output gate.
    """

    layers: int = 2
    experts: int = 0
    shared_experts: bool = False
    latent: bool = False
    biases: bool = True
    bf16: bool = False
    tied: bool = False
    learned_positions: bool = False
    frozen: tuple[str, ...] = ()
    frozen_start: bool = False
    media: bool = True
    mrope: bool = False
    spans: bool = False
    heads: bool = False
    levels: int = 0
    samples: int = len(MEDIA[0])
    linear: bool = False


def make_batches(design: Design | None = None) -> list[list[Sample]]:
    """The global batches: lists of samples, always the same; without media, text only."""
    design = design or Design()
    generator = torch.Generator().manual_seed(7)
    return [
        [
            _make_sample(*(counts if design.media else (0, 0)), generator)
            for counts in batch[: design.samples]
        ]
        for batch in MEDIA
    ]


def _make_sample(images: int, sounds: int, generator: torch.Generator) -> Sample:
    ids_S = torch.randint(0, IMAGE, (SEQUENCE,), generator=generator)
    spots = torch.randperm(SEQUENCE, generator=generator)  # placeholders need not be neighbours
    ids_S[spots[: images * PATCHES]] = IMAGE
    ids_S[spots[images * PATCHES : images * PATCHES + sounds]] = SOUND
    spans_S = torch.zeros_like(ids_S)
    spans_S[ids_S == IMAGE] = torch.arange(images).repeat_interleave(PATCHES) + 1
    labels_S = ids_S.roll(-1)
    keep_S = torch.rand(SEQUENCE, generator=generator) < 0.8
    mask_S = ((labels_S < IMAGE) & keep_S).float()
    return Sample(
        ids_S=ids_S,
        labels_S=labels_S.where(labels_S < IMAGE, 0),
        mask_S=mask_S,
        positions_3S=torch.randint(0, SEQUENCE, (3, SEQUENCE), generator=generator),
        spans_S=spans_S,
        images=torch.randn(images, *PIXELS, generator=generator),
        sounds=torch.randn(sounds, SOUND_WIDTH, generator=generator),
    )


_OF_LINEAR_LAYERS: dict[str, Any] = {
    "linear_attention_freq": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "attention_output_gate": True,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-2,  # outputs of a delta net are small here
}


def transformer_config(design: Design | None = None, **changes: Any) -> Any:
    """The language model's configuration; ``changes`` are the layout's."""
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    design = design or Design()
    dtype = torch.bfloat16 if design.bf16 else torch.float32
    settings: dict[str, Any] = {
        "num_layers": design.layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "calculate_per_token_loss": True,
        "add_bias_linear": design.biases,
        "bf16": design.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    if design.mrope:
        settings |= {"kv_channels": 8, "mrope_section": [2, 1, 1]}
    if design.experts:
        settings |= {
            "num_moe_experts": design.experts,
            # In bf16 every expert: rounding must not decide which ones are chosen.
            "moe_router_topk": design.experts if design.bf16 else 2,
            "moe_ffn_hidden_size": 16,
            "moe_router_load_balancing_type": "none",
            "add_bias_linear": False,
        }
    if design.shared_experts:
        settings |= {"moe_shared_expert_intermediate_size": 16}
    if design.linear:
        settings |= _OF_LINEAR_LAYERS
    if design.latent:
        sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_head_dim": 4, "v_head_dim": 4}
        settings |= {"multi_latent_attention": True, "qk_pos_emb_head_dim": 4, **sizes}
        return MLATransformerConfig(**(settings | {"rope_type": "rope"} | changes))
    return TransformerConfig(**(settings | changes))


def build_model(
    config: Any,
    design: Design,
    groups: Any,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
    recompute_projections: bool = False,
    packed: bool = False,
    grids: Any = None,
    inputs_of: str = "encoders",
) -> Any:
    """This rank's part of the model, frozen as the design says; maybe on grids (``Grids``)."""
    from megatron.core.enums import ModelType
    from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from tests.distributed.core.heads import head_specs

    module, layers = _language_parts(config, design, vp_stage)
    language = ModuleSpec(
        module=module,
        params={
            "config": config,
            "transformer_layer_spec": layers,
            "vp_stage": vp_stage,
            "vocab_size": VOCABULARY,
            "max_sequence_length": SEQUENCE,
            "pre_process": first,
            "post_process": last,
            "pg_collection": groups,
            "position_embedding_type": _position_type(design),
            "share_embeddings_and_output_weights": design.tied,
            "scatter_embedding_sequence_parallel": False,
        },
    )
    place = groups if grids is None else grids.groups["images"]
    stages = 1 if grids is None else place.pp.size()
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        params={"recompute_projections": recompute_projections},
        submodules=image_parts(config, place, design.levels, stages),
    )
    model = MimoModel(
        MimoModelConfig(
            language_model_spec=language,
            modality_submodules_spec={"images": images, "sounds": sound_spec(HIDDEN)},
            special_token_ids=PLACEHOLDERS,
            kv_format="thd" if packed else "sbhd",
            heads=head_specs() if design.heads else {},
            module_to_grid_map=None if grids is None else dict(grids.by_module),
            modality_inputs_of=inputs_of,
        ),
        cp_group=groups.cp,
        tp_group=groups.tp,
    )
    model.pg_collection = groups
    model.vp_stage = vp_stage
    model.model_type = ModelType.encoder_or_decoder
    _freeze(model, design)
    return model


def _language_parts(config: Any, design: Design, vp_stage: int | None) -> tuple[Any, Any]:
    """The class of the language model, and the spec of its layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.mimo.layers import language_layer_spec
    from megatron.mimo.layers.deepstack import TakesLevels, deepstack_layers

    layers = language_layer_spec(config, vp_stage=vp_stage)
    if not design.levels:
        return GPTModel, layers
    return type("LeveledGPT", (TakesLevels, GPTModel), {}), deepstack_layers(layers, config)


def _freeze(model: Any, design: Design) -> None:
    model.freeze(*design.frozen)
    if design.frozen_start:
        model.freeze("images", "sounds")
        if model.language_model is None:
            return
        decoder = model.language_model.decoder
        start = [layer for layer in decoder.layers if 2 * layer.layer_number <= design.layers]
        for module in [*start, *([model.language_model.embedding] if model.pre_process else [])]:
            module.requires_grad_(False)
        if design.tied and model.post_process:  # the last stage's copy of the embedding
            model.shared_embedding_or_output_weight().requires_grad_(False)


def _position_type(design: Design) -> str:
    if design.mrope:
        return "mrope"
    return "learned_absolute" if design.learned_positions else "rope"


def sample_losses(model: Any, sample: Sample, *, spans: bool = False) -> torch.Tensor:
    """Losses [S] of one sample, its embedding put together by a loop over its tokens.

    ``model`` runs on one process. Uses its weights and layers, not its alignment.
    """
    language = model.language_model
    vision = model.modality_submodules["images"]
    rows: dict[int, list[torch.Tensor]] = {IMAGE: [], SOUND: []}
    added: list[list[torch.Tensor]] = [[] for _ in vision.level_projections]
    for image in sample.images:
        encoded = vision.encoders["vit"](image[None])
        rows[IMAGE] += _projected(vision.input_projections[0], getattr(encoded, "rows_NH", encoded))
        for level, projection, found in zip(
            getattr(encoded, "levels", ()), vision.level_projections, added, strict=True
        ):
            found += _projected(projection, level)
    hearing = model.modality_submodules["sounds"].encoders["linear"]
    for wave in sample.sounds:
        rows[SOUND].append(hearing(wave.to(hearing.narrow.weight.dtype)))
    embedded = []
    for position, token in enumerate(sample.ids_S.tolist()):
        row_H = rows[token].pop(0) if token in rows else None
        if row_H is None:
            row_H = language.embedding.word_embeddings.weight[token]
        if language.embedding.add_position_embedding:
            row_H = row_H + language.embedding.position_embeddings.weight[position]
        embedded.append(row_H)
    assert not any(rows.values())
    with _adding_to_layers(language.decoder.layers, sample, added):
        logits_SV = language(
            input_ids=None,
            position_ids=sample.positions_3S[:, None],
            attention_mask=_hidden_by_rule(sample)[None, None] if spans else None,
            decoder_input=torch.stack(embedded)[:, None],
        )[0]
    return F.cross_entropy(logits_SV.float(), sample.labels_S, reduction="none")


def _projected(projection: Any, rows_NH: torch.Tensor) -> list[torch.Tensor]:
    rows_NH, bias_H = projection.encoder(rows_NH)
    return [*(rows_NH if bias_H is None else rows_NH + bias_H)]


@contextmanager
def _adding_to_layers(
    layers: Any, sample: Sample, added: list[list[torch.Tensor]]
) -> Iterator[None]:
    """The rows of each level, put to the output of its layer token by token."""

    def add(rows: list[torch.Tensor], _: Any, __: Any, output: tuple[torch.Tensor, Any]) -> Any:
        left = iter(rows)
        states = [
            state_1H + next(left) if token == IMAGE else state_1H
            for token, state_1H in zip(sample.ids_S.tolist(), output[0], strict=True)
        ]
        return torch.stack(states), *output[1:]

    hooks = [
        layer.register_forward_hook(partial(add, rows))
        for layer, rows in zip(layers, added, strict=False)
        if rows
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden_by_rule(sample: Sample) -> torch.Tensor:
    """True [S, S] where a query does not see a key: causal, but for tokens of one image."""
    owner = sample.spans_S.tolist()
    return torch.tensor(
        [
            [key > query and not owner[key] == owner[query] > 0 for key in range(SEQUENCE)]
            for query in range(SEQUENCE)
        ]
    )


def reference_step(model: Any, batch: Sequence[Sample]) -> torch.Tensor:
    """The contract: sum of token losses over the number of label positions; backward included.

    Returns:
        The loss, 0-d. Gradients are in ``parameter.grad``.
    """
    total = torch.zeros(())
    for sample in batch:
        total = total + (sample_losses(model, sample) * sample.mask_S).sum()
    loss = total / sum(sample.mask_S.sum() for sample in batch)
    loss.backward()
    return loss.detach()
