from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.convert.assets import NAMES_FILE, check_placeholders, copy_assets
from megatron.mimo.convert.assets import read_name_index as read


def test_copies_all_but_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "hf", tmp_path / "out"
    (source / "templates").mkdir(parents=True)
    kept = ["config.json", "tokenizer.model", "merges.txt", "templates/chat.jinja"]
    left = ["a.safetensors", "b.bin", "model.safetensors.index.json", NAMES_FILE, ".gitattributes"]
    for name in [*kept, *left]:
        (source / name).write_text(name)
    copy_assets(source, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == set(kept)


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, [["a", 0.0], ["b", 0.0]]])
def test_looks_for_placeholders(tmp_path: Path, vocab: object) -> None:
    check_placeholders(tmp_path, {"images": 99})  # no tokenizer, nothing to say
    content = {"model": {"vocab": vocab}, "added_tokens": [{"id": 7, "content": "<image>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_placeholders(tmp_path, {"images": 7, "audio": 1})
    with pytest.raises(InputError, match=r"no token 8, which config\.json gives as the"):
        check_placeholders(tmp_path, {"images": 7, "audio": 8})
    check_placeholders(tmp_path, {"images": 7}, vocab_size=2)  # a placeholder needs no embedding
    for rows in (1, 7):
        with pytest.raises(InputError, match=rf"to id \d, and .* {rows} emb.*_embeddings\(8\)"):
            check_placeholders(tmp_path, {} if rows == 7 else {"images": 7}, vocab_size=rows)


def test_names_a_damaged_index(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (tmp_path / NAMES_FILE).write_text('{"files": {"a": "nothing"}}')
    with pytest.raises(InputError, match="is damaged"):
        read(tmp_path)
