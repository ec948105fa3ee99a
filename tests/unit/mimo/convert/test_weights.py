from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.convert.weights import INDEX_FILE, Weights, WeightsFile, make_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.weight": torch.randn(4, 5).to(torch.bfloat16),
    "empty": torch.empty(0, 3),
    "flag": torch.tensor([True, False, True]),
    "whole": torch.tensor(7, dtype=torch.int64),
}


def write_shards(folder: Path) -> None:
    files = {"1.safetensors": ["a", "empty"], "2.safetensors": ["b.weight", "flag", "whole"]}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    mapped = {name: file for file, names in files.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": mapped}))


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    write_shards(tmp_path)
    weights = Weights(tmp_path)
    assert weights.by_name.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        got = weights.read(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)
    assert weights.size(["a", "b.weight"]) == 24 + 40


def test_writes_what_safetensors_reads(tmp_path: Path) -> None:
    kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    file = WeightsFile(tmp_path / "x.safetensors", make_header(kinds))
    for name in reversed(TENSORS):
        file.write(name, TENSORS[name])
    file.close()
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())


def test_a_header_gives_the_same_file_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "ä"})
    weights = Weights(tmp_path)
    again = WeightsFile(tmp_path / "again", weights.headers["model.safetensors"])
    for name in TENSORS:
        again.write(name, weights.read(name))
    again.close()
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def cut(folder: Path) -> None:
    path = folder / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def cut_header(folder: Path) -> None:
    path = folder / "2.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def leave_pointer(folder: Path) -> None:
    (folder / "2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


def spoil_header(folder: Path) -> None:
    path = folder / "2.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"XX16"'))


def remove_shard(folder: Path) -> None:
    (folder / "2.safetensors").unlink()


def remove_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()


def spoil_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{")


def shift_index(folder: Path) -> None:
    content = json.loads((folder / INDEX_FILE).read_text())
    content["weight_map"]["a"] = "2.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(content))


def only_pickles(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["2.safetensors has", "expected", "fetch it again"]),
        (cut_header, ["2.safetensors is not a whole safetensors file"]),
        (leave_pointer, ["2.safetensors is not", "run git lfs pull"]),
        (spoil_header, ["2.safetensors has a damaged header", "XX16"]),
        (remove_shard, ["1 of 2 files", "2.safetensors"]),
        (remove_index, ["the index that says what is in which is missing"]),
        (spoil_index, ["is not an index of weights"]),
        (shift_index, ["says that a is in 2.safetensors, which is not so"]),
        (only_pickles, ["pickled (*.bin)", "save_pretrained"]),
    ],
)
def test_names_what_is_damaged(tmp_path: Path, damage: object, words: list[str]) -> None:
    write_shards(tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        Weights(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
