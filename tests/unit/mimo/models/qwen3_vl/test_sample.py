"""One conversation of Qwen3-VL as a sample, and its table of names, against transformers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.mimo.data.media.files import Video
from megatron.mimo.models import load_family, read_hf_config
from tests.rank_pool import RankPool
from tests.unit.mimo.data.chats import chat_of, talk

IMAGE, VIDEO = 5, 6


@pytest.fixture(scope="module")
def config() -> Any:
    return load_family("qwen3_vl").tiny()


def mixed() -> dict[str, torch.Tensor]:
    """An image and a clip of 2 frames, each of 1 x 2 squares, the frames behind text."""
    tokens = [9, IMAGE, IMAGE, 8, 20, 3, VIDEO, VIDEO, 4, 21, 3, VIDEO, VIDEO, 4, 7]
    return {
        "input_ids": torch.tensor([tokens]),
        "pixel_values": torch.arange(8.0)[:, None].expand(8, 96),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "pixel_values_videos": -torch.arange(16.0)[:, None].expand(16, 96),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }


def test_a_clip_is_one_item_whose_frames_stand_apart(config: Any) -> None:
    sample = load_family("qwen3_vl").sample(config, mixed())
    tokens = [9, IMAGE, IMAGE, 8, 20, 3, IMAGE, IMAGE, 4, 21, 3, IMAGE, IMAGE, 4, 7]
    assert sample.token_ids.tolist() == tokens
    assert sample.is_label.tolist() == [token != IMAGE for token in tokens]
    assert [item.rows for item in sample.media] == [2, 4]
    assert [item.inputs["grid"].tolist() for item in sample.media] == [[1, 2, 4], [2, 2, 4]]
    assert sample.media[1].inputs["pixel_values"][-1, 0].item() == -15
    assert sample.position_ids is not None
    # Each frame begins anew behind its text: time stands still within it, as in an image.
    time, height, width = sample.position_ids.tolist()
    assert time == [0, 1, 1, 3, 4, 5, 6, 6, 8, 9, 10, 11, 11, 13, 14]
    assert height == time
    assert width == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def compare_positions(conversations: int) -> int:
    """How many tokens have the positions that transformers gives them: all, or it raises."""
    family = load_family("qwen3_vl")
    config = family.tiny()
    reference: Any = family.reference(config)
    generator = torch.Generator().manual_seed(3)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    count = 0
    for _ in range(conversations):
        features = family.example(config, generator)
        sample = family.sample(config, features)
        wanted, _ = reference.model.get_rope_index(**{name: features.get(name) for name in names})
        assert sample.position_ids is not None
        assert sample.position_ids.tolist() == wanted[:, 0].tolist()
        count += len(sample.token_ids)
    return count


def test_positions_are_those_of_transformers(ranks: RankPool) -> None:
    assert ranks(1)(compare_positions, 40)[0] > 1000


def test_seconds_stand_as_text_before_each_frame() -> None:
    chat, random = chat_of("qwen3_vl"), np.random.default_rng(2)
    clip = Video(frames_THWC=random.integers(0, 255, (5, 16, 24, 3), dtype=np.uint8), fps=2.0)
    still = Image.fromarray(random.integers(0, 255, (24, 16, 3), dtype=np.uint8))
    sample = chat.sample(
        talk(
            ("user", [("video", clip), ("image", still), "What digits?"]),
            ("assistant", ["42"]),
        )
    )
    text = chat.processor.tokenizer.decode(sample.token_ids)
    # 5 frames at 2 a second, in pairs, the last of which is filled up.
    seconds = re.findall("<([0-9.]+) seconds>", text)
    assert seconds == ["0.2", "1.2", "2.0"]
    assert [item.inputs["grid"].tolist() for item in sample.media] == [[3, 4, 6], [1, 6, 4]]
    learned = sample.token_ids[sample.is_label]
    assert chat.processor.tokenizer.decode(learned) == "42<|im_end|>"


def test_seconds_of_another_model_are_refused(config: Any) -> None:
    features = mixed() | {"second_per_grid_ts": torch.tensor([0.5])}
    with pytest.raises(InputError, match=r"\['second_per_grid_ts'\] are not known to this model"):
        load_family("qwen3_vl").sample(config, features)


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_names_that_transformers_writes(tied: bool, tmp_path: Any) -> None:
    from safetensors import safe_open

    family = load_family("qwen3_vl")
    config = family.tiny()
    config.tie_word_embeddings = tied
    reference: Any = family.reference(config)
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    table = family.keys(read_hf_config(tmp_path))
    assert {name for row in table.each() for name in row.hf} == names
    others = {table.canonical(name) for name in reference.state_dict()}
    assert others - {"lm_head.weight"} == names - {"lm_head.weight"}
    assert bool(table.tied) == tied


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "gelu"), ("patch_size", [4, 4]), ("num_position_embeddings", 24)],
)
def test_another_vision_encoder_is_refused(name: str, value: Any) -> None:
    from megatron.mimo.models.common.frame_tower import frame_geometry

    vision = load_family("qwen3_vl").tiny().vision_config
    setattr(vision, name, value)
    with pytest.raises(UnsupportedError, match=name):
        frame_geometry(vision)


def test_an_encoder_of_another_width_is_refused() -> None:
    family = load_family("qwen3_vl")
    config = family.tiny()
    config.vision_config.out_hidden_size = 32
    with pytest.raises(ConfigError, match="out_hidden_size is 32; expected 64"):
        family.arguments(config)


@pytest.mark.parametrize("layers", [[2, 0], [1, 1], [0, 4], [-1]])
def test_levels_of_no_layers_are_refused(layers: list[int]) -> None:
    family = load_family("qwen3_vl")
    config = family.tiny()
    config.vision_config.deepstack_visual_indexes = layers
    with pytest.raises(ConfigError, match=r"deepstack_visual_indexes is .*; expected asc"):
        family.arguments(config)


def test_more_levels_than_decoder_layers_are_refused() -> None:
    family = load_family("qwen3_vl")
    config = family.tiny()
    config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    with pytest.raises(ConfigError, match="num_hidden_layers is 2; expected at least 3"):
        family.arguments(config)
