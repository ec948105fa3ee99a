"""No flag trains another model than the checkpoint's configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.command_line import parse_arguments
from megatron.mimo.backend import capabilities
from megatron.mimo.recipes import load_recipe

FLAGS = {
    "layernorm_epsilon": ["--norm-epsilon", "0.1"],
    "rotary_base": ["--rotary-base", "50"],
    "rope_scaling_factor": ["--rope-scaling-factor", "4"],
    "use_rope_scaling": ["--use-rope-scaling"],
    "rotary_percent": ["--rotary-percent", "0.5"],
    "rotary_seq_len_interpolation_factor": ["--rotary-seq-len-interpolation-factor", "2"],
    "qk_layernorm": ["--qk-layernorm"],
    "layernorm_zero_centered_gamma": ["--apply-layernorm-1p"],
    "ffn_hidden_size": ["--ffn-hidden-size", "128"],
}


def save(folder: Path, *flags: str) -> None:
    recipe = load_recipe("llava_1_5_7b_tiny")
    common = ["--train-iters=1", "--no-output", *flags]
    args = parse_arguments(recipe, machine=capabilities(), config={}, argv=common)
    assert recipe.save_assets is not None
    recipe.save_assets(args, folder)


def test_the_recipes_own_flags_are_those_of_its_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    assert (tmp_path / "hf" / "config.json").is_file()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_another_model_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .* and the model's configuration says"):
        save(tmp_path, *FLAGS[name])
    assert not (tmp_path / "hf").exists()
