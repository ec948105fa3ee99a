"""What loading a checkpoint unpickles: an index and values, and nothing that runs."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.mimo.backend import select_backend
from megatron.mimo.backend.pickles import load_index, load_object
from megatron.mimo.checkpoints.folders import problem

RAN: list[str] = []


def note(text: str) -> None:
    RAN.append(text)


class Runs:
    """Unpickled, it calls."""

    def __init__(self, call: Any, *given: Any) -> None:
        self.made = (call, given)

    def __reduce__(self) -> Any:
        return self.made


def index_of(file: str = "__0_0.distcp", offset: int = 0) -> Metadata:
    size = torch.Size([2])
    return Metadata(
        state_dict_metadata={
            "w": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                size,
                [ChunkStorageMetadata(torch.Size([0]), size)],
            )
        },
        storage_data={MetadataIndex("w", torch.Size([0])): _StorageInfo(file, offset, 9)},
    )


def test_an_index_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    written = pickle.dumps(index_of())
    assert load_index(io.BytesIO(written)) == pickle.loads(written)
    (tmp_path / ".metadata").write_bytes(written)
    select_backend()
    assert FileSystemReader(tmp_path).read_metadata().storage_data == index_of().storage_data


CALLS = {
    "a function": Runs(note, "ran"),
    "the system": Runs(__import__("os").system, "true"),
    "an attribute of what is admitted": Runs(getattr, torch.Size, "__new__"),
    "torch's own loader": Runs(torch.load, io.BytesIO(b"")),
    "an import": Runs(__import__, "antigravity"),
}


@pytest.mark.parametrize("what", CALLS)
def test_nothing_in_an_index_is_called(what: str, tmp_path: Path) -> None:
    index = index_of()
    index.planner_data = CALLS[what]
    written = pickle.dumps(index)
    with pytest.raises(pickle.UnpicklingError, match="which no index has"):
        load_index(io.BytesIO(written))
    (tmp_path / ".metadata").write_bytes(written)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert "which no index has" in str(problem(tmp_path))
    select_backend()
    with pytest.raises(pickle.UnpicklingError):
        FileSystemReader(tmp_path).read_metadata()
    assert RAN == []


@pytest.mark.parametrize("file", ["../x.distcp", "/etc/passwd", "a/b", "..", ".", ""])
def test_no_part_lies_outside_of_the_checkpoint(file: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="expected one beside it"):
        load_index(io.BytesIO(pickle.dumps(index_of(file))))
    with pytest.raises(pickle.UnpicklingError, match="expected numbers from 0"):
        load_index(io.BytesIO(pickle.dumps(index_of(offset=-1))))


def test_a_damaged_index_is_a_reason_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    index = index_of()
    index.planner_data = CALLS["a function"]
    draws = random.Random(7)
    for whole in (pickle.dumps(index_of()), pickle.dumps(index)):
        for _ in range(1500):
            damaged = bytearray(whole[: draws.randint(1, len(whole))])
            for _ in range(draws.randint(1, 6)):
                damaged[draws.randrange(len(damaged))] = draws.randrange(256)
            (tmp_path / ".metadata").write_bytes(damaged)
            assert isinstance(problem(tmp_path), str)
    assert RAN == []


def test_objects_beside_tensors_are_values(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    select_backend()
    for content, refused in (("values", False), (CALLS["a function"], True)):
        folder = tmp_path / str(refused)
        checkpoint.save({"object": content}, checkpoint_id=folder, no_dist=True)
        loaded: dict[str, Any] = {"object": None}
        if not refused:
            checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
            assert loaded == {"object": content}
            continue
        RAN.clear()  # in case saving has copied it
        with pytest.raises(checkpoint.CheckpointException, match="note"):
            checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    assert RAN == []


def test_a_common_file_of_older_versions(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={})))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 3}, tmp_path / "common.pt")
    assert problem(tmp_path) is None
    torch.save({"iteration": CALLS["a function"]}, tmp_path / "common.pt")
    assert "common.pt cannot be read: UnpicklingError" in str(problem(tmp_path))
    (tmp_path / "common.pt").write_bytes(b"\0" * 40)
    assert "common.pt cannot be read" in str(problem(tmp_path))
    assert RAN == []
    assert load_object(io.BytesIO(_saved({"a": 1}))) == {"a": 1}


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
