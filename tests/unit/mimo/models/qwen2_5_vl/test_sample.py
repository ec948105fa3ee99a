"""One conversation of Qwen2.5-VL as a sample, and its table of names, against transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.mimo.models import family_of, load_family, read_hf_config
from tests.rank_pool import RankPool

IMAGE, VIDEO = 5, 6


@pytest.fixture(scope="module")
def config() -> Any:
    return load_family("qwen2_5_vl").tiny()


def conversation(*parts: tuple[int, int]) -> torch.Tensor:
    return torch.cat([torch.full((count,), token) for token, count in parts])[None]


def mixed() -> dict[str, torch.Tensor]:
    """A clip of 2 frames of 1 x 1 squares between images of 1 x 2 and 2 x 1 squares."""
    return {
        "input_ids": conversation((9, 2), (IMAGE, 2), (7, 1), (VIDEO, 2), (8, 1), (IMAGE, 2)),
        "pixel_values": torch.arange(16.0)[:, None].expand(16, 96),
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 2]]),
        "pixel_values_videos": -torch.arange(8.0)[:, None].expand(8, 96),
        "video_grid_thw": torch.tensor([[2, 2, 2]]),
        "second_per_grid_ts": torch.tensor([0.9]),
    }


def test_images_and_clips_stand_in_the_order_of_their_placeholders(config: Any) -> None:
    sample = load_family("qwen2_5_vl").sample(config, mixed())
    assert sample.token_ids.tolist() == [9, 9, IMAGE, IMAGE, 7, IMAGE, IMAGE, 8, IMAGE, IMAGE]
    assert sample.is_label.tolist() == [True] * 2 + [False] * 2 + [True] + [False] * 2 + [
        True, False, False]  # fmt: skip
    assert [item.rows for item in sample.media] == [2, 2, 2]
    assert [item.inputs["grid"].tolist() for item in sample.media] == [
        [1, 2, 4], [2, 2, 2], [1, 4, 2]]  # fmt: skip
    first = [item.inputs["pixel_values"][0, 0].item() for item in sample.media]
    assert first == [0, 0, 8]
    assert sample.media[1].inputs["pixel_values"][-1, 0].item() == -7
    # 0.9 seconds of 2 positions each: the second frame is 1 behind the first, rounded down.
    assert sample.position_ids is not None
    assert sample.position_ids[0].tolist() == [0, 1, 2, 2, 4, 5, 6, 6, 7, 7]


def compare_positions(conversations: int) -> int:
    """How many tokens have the positions that transformers gives them: all, or it raises."""
    family = load_family("qwen2_5_vl")
    config = family.tiny()
    reference: Any = family.reference(config)
    generator = torch.Generator().manual_seed(3)
    count = 0
    for _ in range(conversations):
        features = family.example(config, generator)
        sample = family.sample(config, features)
        wanted, _ = reference.model.get_rope_index(
            **{
                name: features.get(name)
                for name in (
                    "input_ids",
                    "mm_token_type_ids",
                    "image_grid_thw",
                    "video_grid_thw",
                    "second_per_grid_ts",
                )
            }
        )
        assert sample.position_ids is not None
        assert sample.position_ids.tolist() == wanted[:, 0].tolist()
        count += len(sample.token_ids)
    text = family.sample(config, {"input_ids": torch.tensor([[9, 8, 7]])})
    assert text.position_ids is not None
    assert text.position_ids.tolist() == [[0, 1, 2]] * 3
    return count


def test_positions_are_those_of_transformers(ranks: RankPool) -> None:
    assert ranks(1)(compare_positions, 40)[0] > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": None}, "one of pixel_values and image_grid_thw is missing"),
        ({"image_grid_thw": [[1, 2, 4]]}, "16 patches for image_grid_thw .*expected 8"),
        ({"image_grid_thw": [[1, 4, 2], [1, 1, 8]]}, "a grid is .1, 1, 8."),
        ({"image_grid_thw": [[1, 2, 2], [1, 6, 2]]}, r"needs 3 image tokens in a row and finds 1"),
        ({"video_grid_thw": [[1, 2, 4]], "second_per_grid_ts": [1, 1]}, "2 entries for 1 videos"),
        (
            {"pixel_values_videos": None, "video_grid_thw": None, "second_per_grid_ts": None},
            "2 video tokens are left and no video",
        ),
        (
            {"input_ids": [[9, IMAGE, IMAGE, VIDEO, VIDEO]]},
            "the last 1 of its images have no image tokens",
        ),
        ({"mm_token_type_ids": [[0] * 10]}, "mm_token_type_ids are not those of input_ids"),
        ({"input_ids": [[9], [9]]}, "expected one conversation"),
    ],
)
def test_conversations_that_do_not_fit_their_media_are_refused(
    config: Any, changes: dict[str, Any], message: str
) -> None:
    features = mixed()
    for name, value in changes.items():
        features.pop(name, None)
        if value is not None:
            features[name] = torch.tensor(value)
    with pytest.raises(InputError, match=f"sample s/1: .*{message}"):
        load_family("qwen2_5_vl").sample(config, features, name="s/1")


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_names_that_transformers_writes(tied: bool, tmp_path: Any) -> None:
    from safetensors import safe_open

    family = load_family("qwen2_5_vl")
    config = family.tiny()
    config.tie_word_embeddings = tied
    reference: Any = family.reference(config)
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    table = family.keys(read_hf_config(tmp_path))
    assert {name for row in table.each() for name in row.hf} == set(shapes)
    others = {table.canonical(name) for name in reference.state_dict()}
    assert others - {"lm_head.weight"} == set(shapes) - {"lm_head.weight"}
    assert bool(table.tied) == tied


def test_joined_queries_keys_and_values_come_back_bit_for_bit() -> None:
    from megatron.mimo.models.common.keys import JoinedQKV

    transform = JoinedQKV(heads=3, head_size=2)
    joined = torch.arange(18)
    fused = transform.to_mimo([joined])
    assert fused.tolist() == [0, 1, 6, 7, 12, 13, 2, 3, 8, 9, 14, 15, 4, 5, 10, 11, 16, 17]
    assert transform.to_hf(fused)[0].tolist() == joined.tolist()


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "gelu"), ("patch_size", [4, 4]), ("rope_type", "default")]
)
def test_another_vision_encoder_is_refused(name: str, value: Any) -> None:
    from megatron.mimo.models.qwen2_5_vl.vision import patch_geometry

    vision = load_family("qwen2_5_vl").tiny().vision_config
    if name == "rope_type":
        vision.rope_parameters = {"rope_type": value, "rope_theta": 1e4}
    else:
        setattr(vision, name, value)
    with pytest.raises(UnsupportedError, match=name):
        patch_geometry(vision)


def test_the_flat_configuration_of_older_files_is_understood(tmp_path: Any) -> None:
    """Laid out as the published files are: text settings at the top, rope_scaling of type mrope."""
    from megatron.mimo.models.qwen2_5_vl.vision import patch_geometry

    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "max_position_embeddings": 128,
        "sliding_window": 32,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "window_size": 112,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    whole = {
        **text,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
        "image_token_id": 5,
        "video_token_id": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = read_hf_config(tmp_path)
    family = family_of(config)
    assert family.name == "qwen2_5_vl"
    arguments = family.arguments(config)
    assert arguments["mrope_section"] == [2, 3, 3]
    assert arguments["position_embedding_type"] == "mrope"
    assert arguments["rotary_base"] == 1_000_000
    assert arguments["untie_embeddings_and_output_weights"] is False
    assert patch_geometry(config.vision_config).window == 4
    assert family.keys(config).tied
