"""What a folder beside a checkpoint says of the end of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.assets import end_tokens


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        ({"eos_token_id": 3}, {"eos_token_id": 2}, (3,)),
        ({"eos_token_id": [3, 4]}, None, (3, 4)),
        ({}, {"eos_token_id": 2}, ()),  # as transformers: the file there is decides
        (None, {"eos_token_id": 2}, (2,)),
        (None, {"text_config": {"eos_token_id": [5]}}, (5,)),
        (None, {}, ()),
    ],
)
def test_ends_are_those_of_the_generation_configuration(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config.json is not JSON"):
        end_tokens(tmp_path)
