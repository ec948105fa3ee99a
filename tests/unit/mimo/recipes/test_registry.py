"""The recipes as a list: what it says of each, their sizes, stages and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.recipes import load_recipe, locate_recipe, recipe_names, recipe_summaries
from tests.tiers import crossed

RECIPES = Path(__file__).parents[4] / "megatron/mimo/recipes"
FROM_SCRATCH = ("digits", "digits_dialled")
TINY = [name for name in recipe_names() if name.endswith("_tiny")]
# Parameters of the published models, in millions.
PUBLISHED = {
    "gemma3_4b": 4300,
    "gemma3_12b": 12187,
    "gemma3_27b": 27432,
    "internvl3_5_1b": 1061,
    "internvl3_5_8b": 8528,
    "internvl3_5_14b": 15120,
    "internvl3_5_30b_a3b": 30849,
    "internvl3_5_38b": 38390,
    "internvl3_8b": 7944,
    "llava_1_5_7b": 7063,
    "llava_1_5_13b": 13351,
    "llava_next": 7567,
    "qwen2_audio_7b": 8397,
    "qwen2_5_vl_3b": 3755,
    "qwen2_5_vl_7b": 8292,
}


def given(**changes: Any) -> Namespace:
    flags = {"data_path": None, "train_data_path": None, "load": None, "hf": None}
    flags |= {"pretrained_checkpoint": None, "data_mixture": None}
    return Namespace(**flags | changes)


def parsed(recipe: str, *flags: str) -> Namespace:
    from megatron.mimo.arguments.command_line import parse_arguments
    from megatron.mimo.backend import capabilities

    return parse_arguments(
        load_recipe(recipe),
        machine=capabilities(),
        config={},
        argv=["--no-output", *flags],
    )


@pytest.mark.parametrize("name", recipe_names())
def test_the_list_says_what_the_recipe_says(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary == recipe_summaries()[name]
    module = locate_recipe(name).partition(":")[0].removeprefix("megatron.mimo.recipes.")
    if name not in FROM_SCRATCH:
        file = RECIPES / f"{module.replace('.', '/')}.py"
        assert len(file.read_text().splitlines()) <= 120
        assert {"projector", "full", "lora"} == set(recipe.presets)


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if name not in (*FROM_SCRATCH, *TINY)]
)
def test_every_model_has_a_tiny_twin(name: str) -> None:
    from megatron.mimo.models import family_of

    recipe, twin = load_recipe(name), load_recipe(f"{name}_tiny")
    assert twin.name in TINY
    assert recipe.hf_config is not None
    assert twin.hf_config is not None
    assert family_of(twin.hf_config()).name == family_of(recipe.hf_config()).name


def test_listing_loads_no_recipe_and_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; from megatron.mimo.training import main; code = main(['--list-recipes']); "
        "loaded = {'transformers', 'torch', 'megatron.core', 'megatron.mimo.recipes.digits'}; "
        "assert not loaded & set(sys.modules), 'imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(recipe_names())


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_sizes_are_those_that_were_published(name: str, millions: int, tmp_path: Path) -> None:
    import torch

    from megatron.mimo.models import family_of

    make_config = load_recipe(name).hf_config
    assert make_config is not None
    config = make_config()
    with torch.device("meta"):
        model = family_of(config).reference(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_presets_are_below_flags() -> None:
    assert parsed("llava_tiny").stage == "full"
    assert parsed("llava_tiny").freeze == []
    projector = parsed("llava_tiny", "--stage", "projector")
    assert projector.freeze == ["language"]
    assert projector.lr == load_recipe("llava_tiny").arguments["lr"]
    lora = parsed("llava_tiny", "--stage", "lora", "--lora-rank", "3")
    assert (lora.lora, lora.lora_rank) == (["language"], 3)
    with pytest.raises(ConfigError, match=r"--stage ful: .* has projector, full, lora"):
        parsed("llava_tiny", "--stage", "ful")
    with pytest.raises(ConfigError, match=r"--stage full: recipe 'digits' .* it has none"):
        parsed("digits", "--stage", "full")


def test_real_recipes_ask_for_data_and_a_processor(tmp_path: Path) -> None:
    recipe = load_recipe("llava_1_5_7b")
    assert recipe.describe is not None
    assert recipe.require is not None
    with pytest.raises(ConfigError, match=r"give --data-path train.jsonl"):
        recipe.require(given())
    with pytest.raises(ConfigError, match=r"give --load .* or --hf"):
        recipe.require(given(data_path=["a.jsonl"]))
    with pytest.raises(ConfigError, match=r"--hf with a folder that has processor_config.json"):
        recipe.require(given(data_path=["a.jsonl"], hf=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"/none: there is no such folder"):
        recipe.require(given(data_path=["a.jsonl"], hf=f"{tmp_path}/none"))
    with pytest.raises(ConfigError, match=r"--pretrained-checkpoint .*/none: there is no such"):
        recipe.require(given(data_path=["a.jsonl"], pretrained_checkpoint=f"{tmp_path}/none"))
    (tmp_path / "processor_config.json").touch()  # without config.json: the recipe's own sizes
    recipe.require(given(data_path=["a.jsonl"], hf=str(tmp_path)))
    told = recipe.describe(given(data_path=["a.jsonl"], hf=str(tmp_path)))
    assert told["num_layers"] == 32


def test_a_checkpoint_describes_the_model(tmp_path: Path) -> None:
    from megatron.mimo.models import load_family

    config = load_family("llava").tiny()
    config.text_config.num_hidden_layers = 5
    config.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/processor_config.json").touch()
    recipe = load_recipe("llava_1_5_7b")
    assert recipe.describe is not None
    assert recipe.require is not None
    told = recipe.describe(given(data_path=["a.jsonl"], hf=str(tmp_path / "hf")))
    assert told["num_layers"] == 5
    with pytest.raises(ConfigError, match=r"--load .* holds no checkpoint"):  # yet
        recipe.require(given(data_path=["a.jsonl"], load=str(tmp_path)))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    told = load_recipe("llava_1_5_7b").describe(  # type: ignore[misc]
        given(data_path=["a.jsonl"], load=str(tmp_path))
    )
    assert told["num_layers"] == 5
    other = load_recipe("qwen2_audio_7b")
    with pytest.raises(ConfigError, match=r"'qwen2_audio', and .*/hf holds one of 'llava'"):
        other.describe(given(data_path=["a.jsonl"], load=str(tmp_path)))  # type: ignore[misc]


def test_sizes_that_the_configuration_does_not_say_are_refused(tmp_path: Path) -> None:
    args = parsed("llava_tiny", "--num-layers", "3")
    recipe = load_recipe("llava_tiny")
    assert recipe.save_assets is not None
    with pytest.raises(ConfigError, match=r"num_layers is 3 and .* configuration says 2"):
        recipe.save_assets(args, tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_what_a_checkpoint_keeps_reads_back(name: str, tmp_path: Path) -> None:
    from megatron.mimo.checkpoints.assets import read_processor
    from megatron.mimo.models import family_of, read_hf_config

    args, recipe = parsed(name), load_recipe(name)
    assert recipe.save_assets is not None
    recipe.save_assets(args, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert f"{family_of(read_hf_config(tmp_path / 'hf')).name}_tiny" == name
    processor = read_processor(tmp_path / "hf")
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == processor.tokenizer.eos_token_id
    text = "What digits? 7 é\n"
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(tokens) == text
    (tmp_path / "hf/mark").touch()
    recipe.save_assets(args, tmp_path)  # no checkpoint yet: written anew
    assert not (tmp_path / "hf/mark").exists()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "hf/mark").touch()
    recipe.save_assets(args, tmp_path)  # they belong to the checkpoint now
    other = tmp_path / "other"
    args.load = str(tmp_path)
    recipe.save_assets(args, other)  # and go with it, with all that is in the folder
    assert (other / "hf/mark").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), crossed([*PUBLISHED, "llava_avlm"], ["projector", "full", "lora"])
)
def test_megatron_takes_the_settings_of_every_stage(name: str, stage: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").touch()
    args = parsed(
        name,
        *("--hf", str(tmp_path), "--data-path", "a.jsonl", "--valid-data-path", "b.jsonl"),
        *("--stage", stage, "--eval-iters", "2"),
    )
    preset = load_recipe(name).presets[stage]
    assert {key: getattr(args, key) for key in preset} == preset
    assert args.lr > 0
    assert args.global_batch_size % args.micro_batch_size == 0
    assert bool(args.lora) == (stage == "lora")


def test_an_evaluation_needs_conversations_and_these_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").touch()
    given = ("llava_1_5_7b", "--hf", str(tmp_path), "--data-path", "a.jsonl")
    with pytest.raises(ConfigError, match=r"--eval-iters 2: .* give --valid-data-path"):
        parsed(*given, "--eval-iters", "2")
    with pytest.raises(ConfigError, match=r"--valid-data-path b\.jsonl is never read"):
        parsed(*given, "--valid-data-path", "b.jsonl")
    with pytest.raises(ConfigError, match="--test-data-path has no effect"):
        parsed(*given, "--test-data-path", "b.jsonl")
    assert parsed("llava_tiny", "--eval-iters", "2").eval_iters == 2  # it makes its own
