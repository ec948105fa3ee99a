"""Encoders of transformers in a MimoModel equal the same model without Megatron, in every layout.

One is trained and split over tensor-parallel ranks, one frozen; both are saved and loaded on
another layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.ranks import Layout, compare
from tests.distributed.models.unchecked import unchecked_family
from tests.rank_pool import RankPool

NAME = "wrapped"
IMAGE, CLIP = 4, 5  # placeholder tokens
CLIP_SHAPE = (6, 20)


def vision_config() -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )


def whisper() -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        num_mel_bins=CLIP_SHAPE[0],
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        d_model=32,
        max_source_positions=CLIP_SHAPE[1] // 2,
    )


def clip_rows(input_features: Tensor, lengths: list[int]) -> list[int]:
    assert len(input_features) == len(lengths)
    return [length // 2 for length in lengths]


class Reference(nn.Module):
    """DINOv2's last layer but one, Whisper, a linear layer for each, LLaMA."""

    def __init__(self, text: Any) -> None:
        from transformers import AutoModel, LlamaForCausalLM
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        self.vision = AutoModel.from_config(vision_config())
        self.audio = WhisperEncoder(whisper()).requires_grad_(False)
        self.from_vision = nn.Linear(32, text.hidden_size)
        self.from_audio = nn.Linear(32, text.hidden_size)
        self.language = LlamaForCausalLM(text)

    def forward(self, input_ids: Tensor, **media: Tensor) -> Any:
        embeddings = self.language.get_input_embeddings()(input_ids)
        if "pixel_values" in media:
            states = self.vision(media["pixel_values"], output_hidden_states=True).hidden_states
            rows = self.from_vision(states[-2][:, 1:].flatten(0, 1))
            embeddings = embeddings.masked_scatter((input_ids == IMAGE)[..., None], rows)
        if "input_features" in media:
            states = self.audio(media["input_features"]).last_hidden_state
            counts = clip_rows(media["input_features"], media["lengths"].tolist())
            kept = [state[:count] for state, count in zip(states, counts, strict=True)]
            rows = self.from_audio(torch.cat(kept))
            embeddings = embeddings.masked_scatter((input_ids == CLIP)[..., None], rows)
        return self.language(inputs_embeds=embeddings)


def build(config: Any, settings: Any, places: Any) -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.encoders import HuggingFaceEncoder, Projector
    from megatron.mimo.models.common.language import language_spec

    language = language_spec(settings, places.language, config)
    projection = {
        "config": language.params["config"],
        "input_size": 32,
        "output_size": config.hidden_size,
        "num_layers": 1,
        "pg_collection": places["images"].groups,
    }

    def modality(name: str, **params: Any) -> ModuleSpec:
        parts = {
            "encoders": {name: ModuleSpec(HuggingFaceEncoder, params=params)},
            "input_projections": [ModuleSpec(Projector, params=projection)],
        }
        return ModuleSpec(VisionModalitySubmodules, submodules=parts)

    images = modality(
        "dino",
        source=vision_config(),
        blank={"pixel_values": torch.zeros(1, 3, 8, 8)},
        feature=-2,
        drop_first=1,
    )
    audio = modality(
        "whisper",
        source=whisper(),
        model_class=WhisperEncoder,
        blank={"input_features": torch.zeros(1, *CLIP_SHAPE), "lengths": [2]},
        rows=clip_rows,
        frozen=True,
    )
    return MimoModelConfig(
        language_model_spec=language,
        modality_submodules_spec={"images": images, "audio": audio},
        special_token_ids={"images": IMAGE, "audio": CLIP},
    )


def key_table(config: Any) -> Any:
    from megatron.mimo.models.common.keys import KeyEntry, KeyTable
    from megatron.mimo.models.common.language import language_entries

    reference = Reference(config)
    rows = list(language_entries(config, model="language.model.", head="language."))
    for hf, modality, name in (("vision", "images", "dino"), ("audio", "audio", "whisper")):
        ours = f"modality_submodules.{modality}."
        rows += [
            KeyEntry(mimo=f"{ours}encoders.{name}.model.{key}", hf=(f"{hf}.{key}",))
            for key in reference.get_submodule(hf).state_dict()
        ]
        rows += [
            KeyEntry(mimo=f"{ours}input_projections.0.linear_fc1.{kind}", hf=(f"from_{hf}.{kind}",))
            for kind in ("weight", "bias")
        ]
    return KeyTable(entries=tuple(rows))


def sample(config: Any, features: Mapping[str, Tensor], **given: Any) -> Any:
    from megatron.mimo.data import MediaItem, Sample

    tokens = features["input_ids"][0]
    items = []
    for pixels in features.get("pixel_values", ()):
        inputs = {"pixel_values": pixels}
        items.append(MediaItem(modality="images", encoder="dino", inputs=inputs, rows=4))
    clips = zip(features.get("input_features", ()), features.get("lengths", ()), strict=True)
    for clip, length in clips:
        inputs, rows = {"input_features": clip, "lengths": length}, int(length) // 2
        items.append(MediaItem(modality="audio", encoder="whisper", inputs=inputs, rows=rows))
    return Sample(name="sample", token_ids=tokens, is_label=tokens > CLIP, media=tuple(items))


def media(config: Any) -> Any:
    from megatron.mimo.data import MediaFormat
    from megatron.mimo.models.common.family import Media

    images = {"pixel_values": (torch.float32, (3, 8, 8))}
    clips = {"input_features": (torch.float32, CLIP_SHAPE), "lengths": (torch.int64, ())}
    return Media(
        special_token_ids={"images": IMAGE, "audio": CLIP},
        formats={
            "images": MediaFormat(encoder="dino", inputs=images),
            "audio": MediaFormat(encoder="whisper", inputs=clips, on_host=("lengths",)),
        },
    )


def tiny() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=128,
        initializer_range=0.1,
    )


def example(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Images and clips by turns of the calls: 3 and 2, 1 and 0, 0 and 1, none."""
    call = int(torch.randint(0, 4, (), generator=generator))
    images, lengths = [(3, [20, 7]), (1, []), (0, [13]), (0, [])][call]
    features: dict[str, Tensor] = {}
    runs = [torch.full((4,), IMAGE)] * images + [torch.full((n // 2,), CLIP) for n in lengths]
    if images:
        features["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
    if lengths:
        features["input_features"] = torch.randn(len(lengths), *CLIP_SHAPE, generator=generator)
        features["lengths"] = torch.tensor(lengths)
    words = [torch.randint(6, 100, (3,), generator=generator) for _ in range(len(runs) + 1)]
    parts = [words[0], *(part for pair in zip(runs, words[1:], strict=True) for part in pair)]
    return {"input_ids": torch.cat(parts)[None], **features}


@contextmanager
def registered() -> Iterator[None]:
    """The model above as a family, for what asks for one by name."""
    from megatron.mimo import models
    from megatron.mimo.models.common.language import language_arguments

    family = unchecked_family(
        name=NAME,
        language=language_arguments,
        build=build,
        keys=key_table,
        media=media,
        sample=sample,
        tiny=tiny,
        example=example,
        reference=Reference,
    )
    before = models.load_family
    models.load_family = lambda name: family if name == NAME else before(name)
    try:
        yield
    finally:
        models.load_family = before


def make_expected() -> Expected:
    with registered():
        return compute_expected(NAME, samples=8)


def deviations(layout: Layout, expected: Expected, overlapped: bool) -> Any:
    with registered(), reductions(overlapped=overlapped):
        return compare(NAME, layout, expected)


@contextmanager
def reductions(*, overlapped: bool) -> Iterator[None]:
    """Gradients are reduced as they arrive: every rank has to have all, in one order."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    before = DistributedDataParallel.__init__

    def overlapping(self: Any, config: Any, _: Any, module: Any) -> None:
        # buckets so small that many are under way
        settings = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000)
        before(self, config, settings, module)
        config.no_sync_func = self.no_sync

    if overlapped:
        DistributedDataParallel.__init__ = overlapping
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = before


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Expected:
    (made,) = ranks(1)(make_expected)
    sizes = {tuple(sorted(one.keys() - {"input_ids"})) for one in made.examples}
    assert len(sizes) > 2  # with and without each of the two
    return made


@pytest.mark.parametrize(
    ("layout", "overlapped"),
    [
        (Layout(), False),
        (Layout(tp=2), False),
        (Layout(pp=2), False),
        (Layout(dp=2), False),
        (Layout(dp=2), True),
    ],
    ids=["one", "tp2", "pp2", "dp2", "dp2-overlapped"],
)
def test_equals_transformers(
    ranks: RankPool, expected: Expected, layout: Layout, overlapped: bool
) -> None:
    compared: set[str] = set()
    for deviation in ranks(layout.world_size)(deviations, layout, expected, overlapped):
        assert deviation.logits is None or deviation.logits < 1e-4
        # A bias of keys cancels in the softmax: its gradient is rounding.
        wrong = {
            key: error
            for key, error in deviation.gradients.items()
            if not error < 1e-3 and not key.endswith("k_proj.bias")
        }
        assert not wrong
        compared |= deviation.gradients.keys()
    assert any("dino" in key for key in compared)
    assert not any("whisper" in key or "mask_token" in key for key in compared)


def save_and_sum(folder: str, tp: int, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The encoders' state, after it was saved (with ``weights``) or loaded (without)."""
    from megatron.core import dist_checkpointing
    from megatron.mimo import models
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from tests.rank_pool import model_parallel

    with registered():
        model_parallel(tp=tp)
        family, config = models.load_family(NAME), tiny()
        settings = model_settings(family, config, tp_size=tp)
        torch.manual_seed(99)
        model = build_model(family, config, settings, device=torch.device("cpu"))
        if weights is not None:
            load_hugging_face(model, weights, family.keys(config))
            dist_checkpointing.save(model.sharded_state_dict(), folder)
        else:
            state = dist_checkpointing.load(model.sharded_state_dict(), folder)
            model.load_state_dict(state)
        return dict(model.modality_submodules.state_dict())


def test_saved_under_tp2_and_loaded_without(
    ranks: RankPool, expected: Expected, tmp_path: Path
) -> None:
    saved = ranks(2)(save_and_sum, str(tmp_path), 2, expected.weights)
    (loaded,) = ranks(1)(save_and_sum, str(tmp_path), 1, None)
    encoders = [name for name in loaded if ".encoders." in name]
    assert len(encoders) > 50
    for name in encoders:
        assert torch.equal(loaded[name], saved[0][name])
        assert torch.equal(saved[1][name], saved[0][name])
    key = "vision.embeddings.position_embeddings"
    name = "images.encoders.dino.model.embeddings.position_embeddings"
    assert torch.equal(loaded[name], expected.weights[key])
