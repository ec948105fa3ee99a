"""Configurations as they are published: of later versions that differ in sizes, and of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.mimo.models import family_of, load_family, read_hf_config

# As config.json of Qwen3.6 27B and Qwen3.8 27B has it, fields that transformers does not read
# among them.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_text",
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "full_attention_interval": 4,
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "model_type": "qwen3_5",
        "deepstack_visual_indexes": [],
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 5120,
        "patch_size": 16,
    },
}


def read(folder: Path, content: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(content))
    return read_hf_config(folder)


def test_a_later_version_of_other_sizes_is_this_family(tmp_path: Path) -> None:
    from megatron.mimo.recipes import load_recipe

    family = family_of(read(tmp_path, PUBLISHED))
    assert family.name == "qwen3_5"
    arguments = family.arguments(read(tmp_path, PUBLISHED))
    assert arguments["linear_attention_freq"] == [1, 1, 1, 0] * 16
    assert arguments["rotary_percent"] == 0.25
    assert arguments["attention_output_gate"] is True
    make = load_recipe("qwen3_5_27b").hf_config
    assert make is not None
    assert family.arguments(make()) == arguments


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "attn_output_gate", False),
        ("text_config", "output_gate_type", "sigmoid"),
        ("text_config", "mamba_ssm_dtype", "bfloat16"),
        ("text_config", "mlp_only_layers", [0]),
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "deepstack_visual_indexes", [8]),
    ],
)
def test_another_mathematics_is_refused_by_its_field(
    tmp_path: Path, part: str, name: str, value: object
) -> None:
    """Also where transformers takes no notice of the field."""
    content = {**PUBLISHED, part: PUBLISHED[part] | {name: value}}
    config = read(tmp_path, content)
    with pytest.raises(UnsupportedError, match=name):
        family_of(config).arguments(config)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("MiniCPMV4_6ForConditionalGeneration", "windows of patches between its layers"),
        ("Qwen4ExpForConditionalGeneration", "n-grams"),
    ],
)
def test_relatives_with_other_layers_are_refused_by_name(architecture: str, reason: str) -> None:
    config: Any = load_family("qwen3_5").tiny()
    config.architectures = [architecture]
    with pytest.raises(UnsupportedError, match=f"{architecture}.*{reason}"):
        family_of(config)
