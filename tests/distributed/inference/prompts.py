"""Prompts for the model of ``tests/distributed/core/reference``, and its answers by plain loops.

Legend: L tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron.mimo.data import MediaFormat, MediaItem, Sample, SampleCollator
from tests.distributed.core.reference import (
    IMAGE,
    PATCHES,
    PIXELS,
    PLACEHOLDERS,
    SEQUENCE,
    SOUND,
    SOUND_WIDTH,
    VOCABULARY,
    Design,
)

# images, sounds and other tokens of each prompt: 10, 14, 6, 4, 10 and 1 tokens
CONTENTS = ((1, 1, 5), (3, 0, 2), (0, 0, 6), (0, 2, 2), (2, 1, 1), (0, 0, 1))
NEW_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of each prompt: tokens of its answer, and the logits [V] that chose each of them."""

    tokens: list[list[int]]
    logits: list[list[torch.Tensor]]


def collator(*, spans: bool = False, mrope: bool = False) -> SampleCollator:
    return SampleCollator(
        seq_length=SEQUENCE,
        vocab_size=VOCABULARY,
        pad_id=0,
        special_token_ids=PLACEHOLDERS,
        media_formats={
            "images": MediaFormat(encoder="vit", inputs={"pixel_values": (torch.float32, PIXELS)}),
            "sounds": MediaFormat(
                encoder="linear", inputs={"waves": (torch.float32, (SOUND_WIDTH,))}
            ),
        },
        span_modalities=("images",) if spans else (),
        mrope=mrope,
    )


def make_prompts(*, mrope: bool = False) -> list[Sample]:
    generator = torch.Generator().manual_seed(11)
    prompts = []
    for number, (images, sounds, others) in enumerate(CONTENTS):
        ids = [IMAGE] * (PATCHES * images) + [SOUND] * sounds
        ids += torch.randint(0, IMAGE, (others,), generator=generator).tolist()
        # an item's placeholders stay together; a token before them where there is one to spare
        ids = ids[-1:] + ids[:-1]
        media = [
            _item("images", "vit", "pixel_values", torch.randn(PIXELS, generator=generator), 4)
            for _ in range(images)
        ]
        media += [
            _item("sounds", "linear", "waves", torch.randn(SOUND_WIDTH, generator=generator), 1)
            for _ in range(sounds)
        ]
        positions = torch.randint(0, SEQUENCE, (3, len(ids)), generator=generator)
        prompts.append(
            Sample(
                name=f"prompt/{number}",
                token_ids=torch.tensor(ids),
                is_label=torch.zeros(len(ids), dtype=torch.bool),
                media=tuple(media),
                position_ids=positions if mrope else None,
            )
        )
    return prompts


def _item(modality: str, encoder: str, name: str, value: torch.Tensor, rows: int) -> MediaItem:
    return MediaItem(modality=modality, encoder=encoder, inputs={name: value}, rows=rows)


@torch.no_grad()
def answer_by_loop(model: Any, design: Design) -> Expected:
    """One prompt at a time, without padding and cache, the whole sequence for each token."""
    model.eval()
    expected = Expected(tokens=[], logits=[])
    for prompt in make_prompts(mrope=design.mrope):
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        media: dict[str, Any] = {}
        for item in prompt.media:
            (name, value), *_ = item.inputs.items()
            held = media.setdefault(item.modality, {item.encoder: {name: []}})
            held[item.encoder][name].append(value)
        for encoders in media.values():
            for arguments in encoders.values():
                dtype = model.config.params_dtype
                arguments.update(
                    {name: torch.stack(rows).to(dtype) for name, rows in arguments.items()}
                )
        for _ in range(NEW_TOKENS):
            ids_1S = torch.tensor([[*prompt.token_ids.tolist(), *tokens]])
            output, _ = model(
                input_ids=ids_1S,
                position_ids=_positions(prompt, len(tokens)),
                modality_inputs=media,
                span_ids=_spans(prompt, len(tokens)) if design.spans else None,
            )
            logits.append(output[0, -1])
            answer = logits[-1].clone()
            answer[[IMAGE, SOUND]] = -torch.inf
            tokens.append(int(answer.argmax()))
            if ids_1S.size(1) == SEQUENCE:
                break
        expected.tokens.append(tokens)
        expected.logits.append(logits)
    return expected


def _positions(prompt: Sample, new: int) -> torch.Tensor:
    if prompt.position_ids is None:
        return torch.arange(len(prompt.token_ids) + new)[None]
    following = prompt.position_ids[:, -1].max() + 1 + torch.arange(new)
    return torch.cat([prompt.position_ids, following.expand(3, -1)], dim=1)[:, None]


def _spans(prompt: Sample, new: int) -> torch.Tensor:
    spans_L = torch.zeros(len(prompt.token_ids) + new, dtype=torch.int32)
    places = (prompt.token_ids == IMAGE).nonzero().squeeze(1)
    spans_L[places] = torch.arange(len(places), dtype=torch.int32) // PATCHES + 1
    return spans_L[None]
