"""A model alone is built of the settings that a run has, without a run and its parser."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import capabilities
from megatron.mimo.models import family_names, load_family

FLAGS = {torch.float32: "--fp32", torch.bfloat16: "--bf16", torch.float16: "--fp16"}
OF_INFERENCE_ENGINES = {"inference_sampling_seed"}  # a run's --seed; nothing here reads it


def settings_of_a_run(family: str, tp: int, pp: int, dtype: torch.dtype, *more: str) -> Any:
    from megatron.mimo.arguments.command_line import parse_arguments
    from megatron.mimo.recipes import load_recipe
    from megatron.mimo.recipes.language import language_settings
    from megatron.training.models.gpt import calculate_padded_vocab_size

    layout = (f"--tensor-model-parallel-size={tp}", f"--pipeline-model-parallel-size={pp}")
    args = parse_arguments(
        load_recipe(f"{family}_tiny"),
        machine=capabilities(),
        config={},
        argv=["--no-output", "--train-iters=1", *layout, FLAGS[dtype], *more],
    )
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, tp
    )
    return language_settings(args)


def plain(value: Any) -> Any:
    """What can be compared: a partial function is its parts."""
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    return value


@pytest.mark.parametrize(
    ("tp", "pp", "dtype"), [(1, 1, torch.float32), (2, 1, torch.bfloat16), (1, 2, torch.float16)]
)
@pytest.mark.parametrize("name", family_names())
def test_settings_are_those_of_a_run(
    name: str, tp: int, pp: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.mimo.arguments.standalone import model_settings

    monkeypatch.setenv("WORLD_SIZE", str(tp * pp))
    family = load_family(name)
    found = model_settings(family, family.tiny(), tp_size=tp, pp_size=pp, dtype=dtype)
    # Megatron's experts need it under tensor parallelism; a model alone has it by itself.
    more = ["--sequence-parallel"] if tp > 1 and found.transformer.num_moe_experts else []
    wanted = settings_of_a_run(name, tp, pp, dtype, *more)
    for one in (found, found.transformer):
        other = wanted if one is found else wanted.transformer
        names = {field.name for field in fields(one)} - {"transformer"} - OF_INFERENCE_ENGINES
        differ = {
            name: (getattr(one, name), getattr(other, name))
            for name in names
            if plain(getattr(one, name)) != plain(getattr(other, name))
        }
        assert differ == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1.0}, "lr: not an argument of a model alone"),
        ({"num_query_groups": 3}, "3 query groups and tensor-parallel size 2: one must divide"),
        ({"num_layers": 1, "pipeline_model_parallel_size": 2}, "use at most 1 stages"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    from megatron.mimo.arguments.standalone import model_settings

    family = load_family("llava")
    with pytest.raises(ConfigError, match=message):
        model_settings(family, family.tiny(), tp_size=2, changes=changes)
