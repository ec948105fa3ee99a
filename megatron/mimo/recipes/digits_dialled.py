"""Recipe ``digits_dialled``: numbers that are read, heard or both, by two encoders and a GPT."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo import AudioModalitySubmodules, MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data import MediaFormat, SampleCollator
from megatron.mimo.data.digits import dialled as data
from megatron.mimo.data.digits import scanned as images
from megatron.mimo.models.common.place import Places
from megatron.mimo.recipes import digits as seen
from megatron.mimo.recipes.recipe import Batch, Datasets, FinishedRun, Recipe
from megatron.training.argument_utils import core_transformer_config_from_args

PATCH_SIZE = 8
ROWS_PER_SOUND = data.BINS // PATCH_SIZE

ARGUMENTS: dict[str, object] = seen.ARGUMENTS | {
    "seq_length": 48,
    "max_position_embeddings": 48,
    "vocab_size": len(data.VOCABULARY),
}


def digits_dialled() -> Recipe:
    """The recipe; every figure of :data:`ARGUMENTS` gives way to a flag."""
    return Recipe(
        name="digits_dialled",
        summary="numbers that are read, heard as telephone tones, or both; two encoders + GPT",
        arguments=ARGUMENTS,
        build_model=build_model,
        build_datasets=build_datasets,
        build_collator=build_collator,
        task_metric=task_metric,
        finish=finish,
    )


def build_model(arguments: Namespace, places: Places) -> MimoModelConfig:
    """The GPT and the ViT of ``digits``, and a transformer over spectrograms."""
    language = core_transformer_config_from_args(arguments)
    size = (data.BINS, data.FRAMES)
    sounds = seen.tower_parts(
        language, places["sounds"], name="spectrogram", size=size, patch_size=PATCH_SIZE
    )
    return MimoModelConfig(
        language_model_spec=seen.language_spec(arguments, language, places.language),
        modality_submodules_spec={
            "images": seen.images_spec(language, places["images"]),
            "sounds": ModuleSpec(module=AudioModalitySubmodules, submodules=sounds),
        },
        special_token_ids={"images": images.IMAGE, "sounds": data.SOUND},
    )


def build_datasets(arguments: Namespace, counts: tuple[int, int, int]) -> Datasets:
    """Training questions follow ``--seed``; those on held-out images are always the same."""
    built = {
        split: _dataset(split, count, arguments.seed if split == "train" else seen.TEST_SEED)
        if count
        else None
        for split, count in zip(images.SPLITS, counts, strict=True)
    }
    return Datasets(**built)


def _dataset(split: images.Split, samples: int, seed: int) -> data.DialledDigits:
    return data.DialledDigits(
        split=split,
        samples=samples,
        seed=seed,
        rows_per_image=seen.ROWS_PER_IMAGE,
        rows_per_sound=ROWS_PER_SOUND,
    )


def build_collator(arguments: Namespace) -> SampleCollator:
    """Pads to ``--seq-length``."""
    pixels = (torch.float32, (1, images.IMAGE_SIZE, images.IMAGE_SIZE))
    spectrum = (torch.float32, (1, data.BINS, data.FRAMES))
    return SampleCollator(
        seq_length=arguments.seq_length,
        vocab_size=len(data.VOCABULARY),
        pad_id=images.PAD,
        special_token_ids={"images": images.IMAGE, "sounds": data.SOUND},
        media_formats={
            "images": MediaFormat(encoder="vit", inputs={"pixel_values": pixels}),
            "sounds": MediaFormat(encoder="spectrogram", inputs={"pixel_values": spectrum}),
        },
    )


def task_metric(logits_BSV: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Digits that the model would say next, given the right ones before."""
    labels_BS = batch["labels"]
    counted_BS = (batch["loss_mask"] > 0) & (labels_BS != images.END)
    right_BS = (logits_BSV.argmax(dim=-1) == labels_BS) & counted_BS
    return {"digit_accuracy": (right_BS.sum(), counted_BS.sum())}


def finish(run: FinishedRun) -> dict[str, Any]:
    """Answer questions about held-out images and new sounds, by generation."""
    dataset = _dataset("test", seen.TEST_SAMPLES, seen.TEST_SEED)
    samples = [dataset[index] for index in range(seen.TEST_SAMPLES)]
    answers = run.generate(samples, images.MAX_DIGITS + 1, images.END)
    return {
        **images.score(samples, answers),
        "train_seconds": round(run.train_seconds, 2),
        "samples_per_second": round(run.samples_per_second, 1),
    }
