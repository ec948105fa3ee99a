from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
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


@pytest.mark.parametrize("file", ["../1.safetensors", "/tmp/1.safetensors", "a/1.safetensors", "x"])
def test_an_index_names_files_beside_it(tmp_path: Path, file: str) -> None:
    write_shards(tmp_path)
    content = json.loads((tmp_path / INDEX_FILE).read_text())
    content["weight_map"]["a"] = file
    (tmp_path / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"names the file .* without a folder"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "offsets"),
    [("b", [0, 8]), ("b", [4, 12]), ("b", [12, 20]), ("a", [-8, 0]), ("b", [8.0, 16.0])],
    ids=["alias", "overlap", "gap", "negative", "fraction"],
)
def test_tensors_follow_each_other_as_the_format_says(
    tmp_path: Path, name: str, offsets: list[float]
) -> None:
    path = tmp_path / "model.safetensors"
    entries = {"a": [0, 8], "b": [8, 16], name: offsets}
    header = json.dumps(
        {key: {"dtype": "F32", "shape": [2], "data_offsets": at} for key, at in entries.items()}
    ).encode()
    data = bytes(int(max(max(at) for at in entries.values())))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(InputError, match="damaged header"):
        Weights(tmp_path)


def test_a_shape_of_negative_numbers_and_a_name_twice(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":%s,"data_offsets":[0,8]}'
    for header in (
        '{"a":' + entry % "[-2,-1]" + "}",
        '{"a":' + entry % "[2]" + ',"a":' + entry % "[2]" + "}",
    ):
        content = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="damaged header"):
            Weights(tmp_path)


def test_of_two_sets_the_one_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=500)
    other = LlamaForCausalLM(config).state_dict()
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights, theirs = Weights(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in theirs.items())
    assert "two sets of weights" in weights.notes[0]
    assert weights.index is None
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "model.safetensors")})
    )
    assert Weights(tmp_path).notes == []
