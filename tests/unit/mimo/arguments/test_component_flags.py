"""--component: from the command line and from a file, and what contradicts it."""

from __future__ import annotations

import argparse

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.command_line import config_values
from megatron.mimo.arguments.component_flags import (
    add_component_arguments,
    components_of,
    layout_text,
    take_components,
)


def arguments(*components: str, **values: object) -> argparse.Namespace:
    given = {
        "component": list(components),
        "encoder_activations": "keep",
        "world_size": 4,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 4,
        "use_distributed_optimizer": False,
        "dist_ckpt_optim_fully_reshardable": True,
    }
    return argparse.Namespace(**(given | values))


def test_megatron_gets_the_language_models_sizes() -> None:
    args = arguments("images=dp=4", "language=tp=2,pp=2")
    take_components(args)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert [*components_of(args.component, world_size=4)] == ["images", "language"]
    assert "tp1 pp1" in layout_text(args)


def test_without_components_nothing_changes() -> None:
    args = arguments(tensor_model_parallel_size=2, data_parallel_size=2)
    take_components(args)
    assert args.tensor_model_parallel_size == 2
    assert "uniform" in layout_text(args)


CONTRADICTIONS = {
    "another size": (
        arguments("images=dp=4", "language=tp=2,pp=2", tensor_model_parallel_size=4),
        "--tensor-model-parallel-size 4 and --component language=tp=2,pp=2",
    ),
    "activations of the uniform layout": (
        arguments(encoder_activations="recompute"),
        "--encoder-activations recompute without --component",
    ),
    "state of one layout": (
        arguments(
            "images=dp=4",
            "language=pp=4",
            use_distributed_optimizer=True,
            dist_ckpt_optim_fully_reshardable=False,
        ),
        "saves state that any layout loads",
    ),
    "a cache": (
        arguments("images=dp=4", "language=pp=4", cache_encoder="rows"),
        "--cache-encoder with --component",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case: str) -> None:
    args, text = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as error:
        take_components(args)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"images": {"dp": 4}, "language": {"tp": 2, "pp": 2}},
        {"images": "dp=4", "language": "tp=2,pp=2"},
        ["images=dp=4", "language=tp=2,pp=2"],
    ],
    ids=["nested", "mapping", "list"],
)
def test_a_file_says_the_same(content: object) -> None:
    parser = argparse.ArgumentParser()
    add_component_arguments(parser.add_argument_group())
    values = config_values(parser, {"component": content})
    assert values == {"component": ["images=dp=4", "language=tp=2,pp=2"]}
