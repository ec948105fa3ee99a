"""What ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.mimo.inference.assistant import _stop_tokens


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(7, None, (7,)), (7, 3, (3, 7)), (7, [7, 9], (7, 9)), (None, [4], (4,)), (None, None, ())],
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    tmp_path: Path, own: int | None, given: object, expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert _stop_tokens(tmp_path, SimpleNamespace(eos_token_id=own)) == expected
