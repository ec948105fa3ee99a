"""Recipe ``digits``: a vision-language model that reads handwritten numbers, from scratch.

A ViT of 0.2 million parameters and a GPT of 0.5 million learn in about two minutes on two CPU
cores to read one to four scanned digits, and are judged on images that they never saw.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.backend import capabilities
from megatron.mimo.data import MediaFormat, Sample, SampleCollator
from megatron.mimo.data.digits import scanned as data
from megatron.mimo.encoders import VisionTransformer, encoder_config
from megatron.mimo.layers import encoder_layer_spec, language_layer_spec
from megatron.mimo.layers.turns import TurningGPT
from megatron.mimo.models.common.place import Place, Places, config_at
from megatron.mimo.recipes.recipe import Batch, Datasets, FinishedRun, Recipe
from megatron.mimo.recipes.report import Card, save_report
from megatron.training.argument_utils import core_transformer_config_from_args

PATCH_SIZE = 4
ROWS_PER_IMAGE = (data.IMAGE_SIZE // PATCH_SIZE) ** 2
ENCODER_LAYERS = 2
_GLOBAL_BATCH = 128
_MICRO_BATCH = 16  # on CPUs: 1 to 8 data-parallel processes without a flag; costs 6 % against 64
_WORKERS = 4  # on a GPU
TEST_SAMPLES = 1000
TEST_SEED = 0  # the questions of the final test are the same after every run

ARGUMENTS: dict[str, object] = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.08,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "vocab_size": len(data.VOCABULARY),
    "make_vocab_size_divisible_by": 8,
    "global_batch_size": _GLOBAL_BATCH,
    "train_iters": 500,
    "lr": 3e-3,
    "min_lr": 3e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 50,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "clip_grad": 1.0,
    "log_interval": 10,
    "eval_interval": 125,
    "eval_iters": 4,
    "save_interval": 250,
}


def digits() -> Recipe:
    """The recipe; every figure of :data:`ARGUMENTS` gives way to a flag."""
    return Recipe(
        name="digits",
        summary="read 1 to 4 scanned digits; ViT + GPT from scratch, two minutes on 2 CPU cores",
        arguments=ARGUMENTS,
        describe=describe,
        build_model=build_model,
        build_datasets=build_datasets,
        build_collator=build_collator,
        task_metric=task_metric,
        finish=finish,
    )


def describe(given: Namespace) -> dict[str, object]:
    """Defaults that depend on the device: the size of a micro-batch, and which process reads it.

    On CPUs the training process reads: that takes less time than sending samples between processes.
    A GPU would wait half of the time, so that workers read for it.
    """
    device = capabilities().device
    return {
        "micro_batch_size": micro_batch_size(given, device),
        "num_workers": _WORKERS if device == "cuda" else 0,
    }


def micro_batch_size(given: Namespace, device: str) -> int:
    """Samples of a micro-batch: on a GPU all that a rank has of a batch.

    A kernel of this model takes as long for 16 samples as for 128, and less than starting it does.
    """
    if device != "cuda":
        return _MICRO_BATCH
    cut = 1
    for name in ("tensor", "pipeline", "context"):
        key = "context_parallel_size" if name == "context" else f"{name}_model_parallel_size"
        cut *= getattr(given, key, None) or 1
    ranks = max(int(os.environ.get("WORLD_SIZE", "1")) // cut, 1)
    batch = getattr(given, "global_batch_size", None) or _GLOBAL_BATCH
    return max(batch // ranks, 1) if batch % ranks == 0 else _MICRO_BATCH


def build_model(arguments: Namespace, places: Places) -> MimoModelConfig:
    """A GPT whose placeholder positions take the rows of a ViT over 4 x 4 pixel patches."""
    language = core_transformer_config_from_args(arguments)
    return MimoModelConfig(
        language_model_spec=language_spec(arguments, language, places.language),
        modality_submodules_spec={"images": images_spec(language, places["images"])},
        special_token_ids={"images": data.IMAGE},
    )


def language_spec(arguments: Namespace, config: TransformerConfig, place: Place) -> ModuleSpec:
    """The GPT."""
    tied = not arguments.untie_embeddings_and_output_weights
    return ModuleSpec(
        module=TurningGPT,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config, vp_stage=place.chunk),
            "vocab_size": arguments.padded_vocab_size,
            "max_sequence_length": arguments.max_position_embeddings,
            "pre_process": place.is_first_stage,
            "post_process": place.is_last_stage,
            "vp_stage": place.chunk,
            "pg_collection": place.groups,
            "position_embedding_type": arguments.position_embedding_type,
            "rotary_percent": arguments.rotary_percent,
            "rotary_base": arguments.rotary_base,
            "share_embeddings_and_output_weights": tied,
            "scatter_embedding_sequence_parallel": False,
        },
    )


def images_spec(language: TransformerConfig, place: Place) -> ModuleSpec:
    """The ViT over images, and its projection."""
    size = (data.IMAGE_SIZE, data.IMAGE_SIZE)
    parts = tower_parts(language, place, name="vit", size=size, patch_size=PATCH_SIZE)
    return ModuleSpec(module=VisionModalitySubmodules, submodules=parts)


def tower_parts(
    language: TransformerConfig, place: Place, *, name: str, size: tuple[int, int], patch_size: int
) -> dict[str, Any]:
    """A ViT over pictures of one channel, and an MLP from its width to the language model's.

    Args:
        language: configuration of the language model, whose width the ViT has too.
        place: of the modality.
        name: of the encoder.
        size: height and width of a picture.
        patch_size: of its square patches, each of which gives a row.
    """
    language = config_at(language, place)
    vision = encoder_config(
        language,
        num_layers=ENCODER_LAYERS,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        stages=place.encoder_stages,
    )
    encoder_spec = ModuleSpec(
        module=VisionTransformer,
        params={
            "config": vision,
            "transformer_layer_spec": encoder_layer_spec(vision),
            "image_size": size,
            "patch_size": patch_size,
            "channels": 1,
            "pg_collection": place.groups,
        },
    )
    projection_spec = ModuleSpec(
        module=MultimodalProjector,
        params={
            # Rows of images are not spread over the tensor-parallel group, as a sequence is.
            "config": _without_compiling(
                replace(language, sequence_parallel=False, tp_comm_overlap=False)
            ),
            "submodules": MLPSubmodules(
                linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
            ),
            "projector_type": "mlp",
            "input_size": vision.hidden_size,
            "pg_collection": place.groups,
        },
    )
    return {"encoders": {name: encoder_spec}, "input_projections": [projection_spec]}


def _without_compiling(config: TransformerConfig) -> TransformerConfig:
    """The same activation (tanh GELU), on a GPU as a kernel of torch's own.

    Compiling megatron-core's fused GELU would take as long as the training.
    """
    if capabilities().device != "cuda" or not config.bias_activation_fusion:
        return config
    return replace(
        config,
        bias_activation_fusion=False,
        activation_func=partial(F.gelu, approximate="tanh"),
    )


def build_datasets(arguments: Namespace, counts: tuple[int, int, int]) -> Datasets:
    """Training questions follow ``--seed``; those on held-out images are always the same."""
    built = {
        split: data.DigitsDataset(
            split=split,
            samples=count,
            seed=arguments.seed if split == "train" else TEST_SEED,
            rows_per_image=ROWS_PER_IMAGE,
        )
        if count
        else None
        for split, count in zip(data.SPLITS, counts, strict=True)
    }
    return Datasets(**built)


def build_collator(arguments: Namespace) -> SampleCollator:
    """Pads to ``--seq-length``."""
    shape = (1, data.IMAGE_SIZE, data.IMAGE_SIZE)
    return SampleCollator(
        seq_length=arguments.seq_length,
        vocab_size=len(data.VOCABULARY),
        pad_id=data.PAD,
        special_token_ids={"images": data.IMAGE},
        media_formats={
            "images": MediaFormat(encoder="vit", inputs={"pixel_values": (torch.float32, shape)})
        },
    )


def task_metric(logits_BSV: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Digits of image samples that the model would say next, given the right ones before."""
    labels_BS = batch["labels"]
    shows_images_B1 = (batch["input_ids"] == data.IMAGE).any(dim=1, keepdim=True)
    counted_BS = (batch["loss_mask"] > 0) & (labels_BS != data.END) & shows_images_B1
    right_BS = (logits_BSV.argmax(dim=-1) == labels_BS) & counted_BS
    return {"digit_accuracy": (right_BS.sum(), counted_BS.sum())}


def finish(run: FinishedRun) -> dict[str, Any]:
    """Answer questions about held-out images, by generation, and draw the report."""
    dataset = data.DigitsDataset(
        split="test", samples=TEST_SAMPLES, seed=TEST_SEED, rows_per_image=ROWS_PER_IMAGE
    )
    samples = [dataset[index] for index in range(TEST_SAMPLES)]
    answers = run.generate(samples, data.MAX_DIGITS + 1, data.END)
    metrics = data.score(samples, answers)
    metrics["train_seconds"] = round(run.train_seconds, 2)
    metrics["samples_per_second"] = round(run.samples_per_second, 1)
    if run.output is not None and torch.distributed.get_rank() == 0:
        cards = [_card(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        wrong = [card for card in cards if card.answer != card.truth]
        save_report(
            run.output / "report.png",
            title="Reading handwritten numbers that the model never saw",
            summary=(
                f"{metrics['digit_accuracy']:.1%} of digits and {metrics['exact_match']:.1%} of "
                f"whole numbers right, {metrics['text_exact_match']:.1%} of numbers in words; "
                f"{run.train_seconds:.0f} s of training, {run.samples_per_second:.0f} samples/s"
            ),
            sections=[
                (f"The first of {len(cards)} questions", cards[:15]),
                (f"Mistakes ({len(wrong)} of {len(cards)})", wrong[:5]),
            ],
            loss_curve=run.loss_curve,
        )
    return metrics


def _card(sample: Sample, answer: list[int]) -> Card:
    return Card(
        images=[item.inputs["pixel_values"] for item in sample.media],
        question=data.question_text(sample),
        truth=data.decode(sample.token_ids[sample.is_label].tolist()),
        answer=data.decode(answer),
    )
