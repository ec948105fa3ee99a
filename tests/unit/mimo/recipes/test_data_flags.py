from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.recipes.costs import cost_model
from megatron.mimo.recipes.data_flags import add_data_arguments, check_data, training_mixture
from tests.unit.mimo.data.sources.records import numbered, write_lines, write_tar


def parsed(*flags: str, **paths: Any) -> Namespace:
    parser = ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(flags)
    return Namespace(**vars(args), **({"data_path": None, "train_data_path": None} | paths), seed=1)


def test_paths_are_one_source_and_a_mixture_is_several(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", numbered(5))
    write_tar(tmp_path / "b.tar", numbered(5))
    folder = ("--index-folder", str(tmp_path / "index"))
    assert training_mixture(parsed()) is None
    one = training_mixture(parsed(*folder, data_path=[str(lines)]))
    assert one is not None
    assert one.names == ["data"]
    assert not one.sources[0].is_streaming
    both = training_mixture(parsed(*folder, train_data_path=[str(tmp_path / "*.*")]))
    assert both is not None
    assert both.sources[0].is_streaming
    (tmp_path / "mix.yaml").write_text("sources: {a: a.jsonl, b: b.tar}")
    mixture = training_mixture(parsed(*folder, "--data-mixture", str(tmp_path / "mix.yaml")))
    assert mixture is not None
    assert mixture.names == ["a", "b"]
    assert [source.is_streaming for source in mixture.sources] == [False, True]


def test_what_makes_no_sense_is_refused() -> None:
    check_data(parsed())
    for flag in ("--shuffle-buffer", "--pack-look-ahead"):
        with pytest.raises(ConfigError, match=f"{flag} is 0; expected at least 1"):
            check_data(parsed(flag, "0"))
    with pytest.raises(ConfigError, match=r"--data-mixture m.yaml and --data-path a: both name"):
        check_data(parsed("--data-mixture", "m.yaml", data_path=["a"]))


def model_arguments(**changes: Any) -> Namespace:
    sizes = {"hidden_size": 8, "num_layers": 2, "ffn_hidden_size": 16, "padded_vocab_size": 100}
    kinds = {"swiglu": True, "num_experts": None, "freeze": []}
    return Namespace(**(sizes | kinds | changes))


def test_costs_follow_from_sizes() -> None:
    vision = SimpleNamespace(hidden_size=4, num_hidden_layers=3, intermediate_size=8)
    config = SimpleNamespace(vision_config=vision)
    costs = cost_model(model_arguments(), config)
    assert costs.per_token == 3 * (2 * 2 * (4 * 64 + 3 * 8 * 16) + 2 * 8 * 100)
    assert costs.per_pair == 3 * 4 * 2 * 8
    trained = costs.encoders["images"]
    assert trained == (3 * 2 * 3 * (4 * 16 + 2 * 4 * 8), 0.0)
    frozen = cost_model(model_arguments(freeze=["images.encoders"]), config).encoders["images"]
    assert frozen[0] * 3 == trained[0]
    vision.spatial_merge_size = 2  # four patches in a row
    merged = cost_model(model_arguments(), config).encoders["images"]
    assert merged == (trained[0] * 4, 3 * 4 * 3 * 4 * 16)
    assert cost_model(model_arguments(), SimpleNamespace()).encoders == {}
