"""A recipe that trains in milliseconds, for tests of the training layer."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data import MediaFormat, MediaItem, Sample, SampleCollator
from megatron.mimo.encoders.work import EncoderWork
from megatron.mimo.layers import language_layer_spec
from megatron.mimo.models.common.place import Place, Places
from megatron.mimo.recipes.recipe import Batch, Datasets, FinishedRun, Recipe
from megatron.training.argument_utils import core_transformer_config_from_args

IMAGE, STOP, PAD, PIXELS = 20, 21, 22, 6
# pixels that break a run: themselves, what the encoder makes of them, its gradient, or itself
FAULTS = {"nan": float("nan"), "overflow": 3e38, "gradient": 77.0, "encoder": 88.0}

ARGUMENTS: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "seq_length": 12,
    "max_position_embeddings": 12,
    "vocab_size": 23,
    "make_vocab_size_divisible_by": 8,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 6,
    "lr": 1e-2,
    "lr_decay_style": "constant",
    "log_interval": 2,
    "save_interval": 3,
}

# how the process ends that reads a sample
ENDS: Mapping[str, Callable[[], object]] = {
    "refused": lambda: _refuse_connection(),
    "_exit": lambda: os._exit(3),
    "well": lambda: os._exit(0),
    "segv": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sys.exit": lambda: sys.exit(0),
    "sleep": lambda: time.sleep(10000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def _refuse_connection() -> None:
    raise RuntimeError("Connection refused")


def tiny() -> Recipe:
    return Recipe(
        name="tiny",
        summary="a test",
        arguments=ARGUMENTS,
        build_model=_build_model,
        build_datasets=lambda args, counts: Datasets(
            train=_Colours(counts[0], args), valid=_Colours(counts[1] or 1, args), test=None
        ),
        build_collator=_build_collator,
        add_arguments=_add_arguments,
        task_metric=_task_metric,
        finish=_finish,
    )


class _Linear(nn.Linear):
    """Rows of pixels -> rows of the language model."""

    def forward(self, pixels: Tensor) -> Tensor:
        if bool((pixels == FAULTS["encoder"]).any()):
            raise ArithmeticError("the encoder fails")
        rows: Tensor = super().forward(pixels)
        if rows.requires_grad and bool((pixels == FAULTS["gradient"]).any()):
            rows.register_hook(lambda gradient: gradient * float("nan"))
        return rows


class _Layers(nn.Module):
    """``_Linear`` and a second layer, which a second pipeline stage may have."""

    def __init__(self, in_features: int, out_features: int, place: Place) -> None:
        super().__init__()
        numbers = range(2) if place.encoder_stages == 1 else [place.groups.pp.rank()]
        self.layers = nn.ModuleDict(
            {str(n): _Linear(out_features if n else in_features, out_features) for n in numbers}
        )

    def forward(self, pixels: Tensor | None, hidden_states: Tensor | None = None) -> Tensor:
        hidden = pixels if hidden_states is None else hidden_states
        assert hidden is not None
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden))
        return hidden

    def blank_inputs(self) -> dict[str, Tensor]:
        return {"pixels": torch.zeros(1, PIXELS)}

    def work(self, pixels: Tensor) -> EncoderWork:
        return EncoderWork(vectors={"layers": len(pixels)}, pairs={}, rows=len(pixels))


class _Failing(GPTModel):
    """A language model whose last stage fails in a forward pass."""

    def __init__(self, *args: Any, at: int, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._left = at
        if self.post_process:
            self.register_forward_pre_hook(self._count_down)

    def _count_down(self, *_: object) -> None:
        self._left -= 1
        if not self._left:
            raise ArithmeticError("the language model fails")


class _Colours(torch.utils.data.Dataset[Sample]):
    """0 to 3 images, then what they show: the index of the brightest pixel."""

    def __init__(self, count: int, args: Namespace) -> None:
        self._count = count
        self._bad = args.tiny_bad_sample
        self._disk_full_from = args.tiny_disk_full_from
        kind, _, broken = args.tiny_fault.partition(":")
        self._end, _, at = args.tiny_end.partition(":")
        self._end_at = int(at or -1)
        self._fault, self._broken = FAULTS.get(kind), int(broken or -1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        if index == self._end_at:
            ENDS[self._end]()
        if index == self._bad:
            raise OSError("cannot decode image")
        if index == self._disk_full_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        generator = torch.Generator().manual_seed(index)
        images = torch.randn(index % 4, PIXELS, generator=generator)
        if self._fault is not None and index == self._broken:
            images[:] = self._fault
        answer = images.argmax(dim=1).tolist()
        ids = [7] + [IMAGE] * len(images) + [8, *answer, STOP]
        labels = [False] * (2 + len(images)) + [True] * (len(answer) + 1)
        return Sample(
            name=f"tiny/{index}",
            token_ids=torch.tensor(ids),
            is_label=torch.tensor(labels),
            media=tuple(
                MediaItem(modality="images", encoder="linear", inputs={"pixels": row}, rows=1)
                for row in images
            ),
        )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--tiny-bad-sample", type=int, default=-1)
    parser.add_argument("--tiny-disk-full-from", type=int, default=-1)
    parser.add_argument("--tiny-fault", default="", metavar="KIND:NUMBER")
    parser.add_argument("--tiny-end", default="", metavar="HOW:SAMPLE")
    parser.add_argument("--tiny-die-at-finish", action="store_true")
    parser.add_argument("--tiny-two-layers", action="store_true")


def _build_model(args: Namespace, places: Places) -> MimoModelConfig:
    config, place = core_transformer_config_from_args(args), places.language
    sizes: dict[str, Any] = {"in_features": PIXELS, "out_features": config.hidden_size}
    encoder = ModuleSpec(module=_Linear, params=sizes)
    if args.tiny_two_layers:
        encoder = ModuleSpec(module=_Layers, params=sizes | {"place": places["images"]})
    kind, _, at = args.tiny_fault.partition(":")
    fails = kind == "language"
    return MimoModelConfig(
        language_model_spec=ModuleSpec(
            module=_Failing if fails else GPTModel,
            params={
                **({"at": int(at)} if fails else {}),
                "config": config,
                "transformer_layer_spec": language_layer_spec(config, vp_stage=place.chunk),
                "vp_stage": place.chunk,
                "vocab_size": args.padded_vocab_size,
                "max_sequence_length": args.max_position_embeddings,
                "pre_process": place.is_first_stage,
                "post_process": place.is_last_stage,
                "pg_collection": place.groups,
                "position_embedding_type": args.position_embedding_type,
                "scatter_embedding_sequence_parallel": False,
            },
        ),
        modality_submodules_spec={
            "images": ModuleSpec(
                module=VisionModalitySubmodules, submodules={"encoders": {"linear": encoder}}
            )
        },
        special_token_ids={"images": IMAGE},
    )


def _build_collator(args: Namespace) -> SampleCollator:
    return SampleCollator(
        seq_length=args.seq_length,
        vocab_size=23,
        pad_id=PAD,
        special_token_ids={"images": IMAGE},
        media_formats={
            "images": MediaFormat(encoder="linear", inputs={"pixels": (torch.float32, (PIXELS,))})
        },
    )


def _task_metric(logits_BSV: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    counted_BS = batch["loss_mask"] > 0
    right_BS = (logits_BSV.argmax(dim=-1) == batch["labels"]) & counted_BS
    return {"accuracy": (right_BS.sum(), counted_BS.sum())}


def _finish(run: FinishedRun) -> dict[str, Any]:
    if run.arguments.tiny_die_at_finish:
        os._exit(9)
    dataset = _Colours(9, run.arguments)
    answers = run.generate([dataset[i] for i in range(9)], 4, STOP)
    return {"answers": answers, "points": len(run.loss_curve)}
