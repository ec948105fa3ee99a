"""What a folder beside a checkpoint says of the end of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.assets import ASSET_HASHES, changed_asset, end_tokens, hash_assets


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


def test_what_has_changed_is_named_until_its_hash_is_renewed(tmp_path: Path) -> None:
    for name in ("config.json", "mimo_media.json", "sub/a.txt", "carried.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert changed_asset(tmp_path) is None  # nothing is known
    hash_assets(tmp_path, "mimo_media.json")
    assert not (tmp_path / ASSET_HASHES).exists()
    hash_assets(tmp_path)
    assert changed_asset(tmp_path) is changed_asset(tmp_path, weights=True) is None
    (tmp_path / "mimo_media.json").write_text("other")
    (tmp_path / "sub/a.txt").write_text("Sub/a.txt")
    (tmp_path / "carried.safetensors").write_text("Carried.safetensors")
    hash_assets(tmp_path, "mimo_media.json")
    said = changed_asset(tmp_path)
    assert said is not None
    assert said.startswith(f"{tmp_path}/sub/a.txt has the hash ")
    assert said.endswith(
        f"restore it or, if it was changed on purpose, remove {tmp_path}/mimo_hashes.json"
    )
    said = changed_asset(tmp_path, weights=True)
    assert said is not None
    assert said.startswith(f"{tmp_path}/carried.safetensors has the hash ")
    (tmp_path / "sub/a.txt").unlink()
    assert "sub/a.txt is missing" in str(changed_asset(tmp_path))
    (tmp_path / ASSET_HASHES).write_text("{")
    assert "mimo_hashes.json cannot be read" in str(changed_asset(tmp_path))
