"""Media of any size, and sizes that stay on the host: as lists, in the order of the items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.comm.encoder_split import cut_inputs
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.model.encoding.encode import is_empty
from megatron.mimo.data import MediaFormat, MediaItem, PackingCollator, Sample, SampleCollator
from megatron.mimo.data.micro_batches.batch import keep_for_stage
from megatron.mimo.data.micro_batches.broadcast import pack, unpack

IMAGE = 90
RAGGED = MediaFormat(
    encoder="patches",
    inputs={
        "pixels": (torch.float32, (None, 4)),
        "grid": (torch.int64, (2,)),
        "frames": (torch.int64, ()),
        "rate": (torch.float32, ()),
    },
    on_host=("grid", "frames"),
)
FIXED = MediaFormat(encoder="whole", inputs={"pixels": (torch.float32, (3,))})
SETTINGS: dict[str, Any] = {
    "seq_length": 16,
    "vocab_size": 50,
    "pad_id": 0,
    "special_token_ids": {"images": IMAGE},
}
COLLATE = SampleCollator(**SETTINGS, media_formats={"images": RAGGED})
BOTH = SampleCollator(**SETTINGS, media_formats={"images": [RAGGED, FIXED]})


def item(rows: int, columns: int) -> MediaItem:
    inputs = {
        "pixels": torch.full((rows * columns, 4), float(rows)),
        "grid": torch.tensor([rows, columns]),
        "frames": torch.tensor(rows),
        "rate": torch.tensor(rows / 2),
    }
    return MediaItem(modality="images", encoder="patches", inputs=inputs, rows=rows * columns)


def whole() -> MediaItem:
    inputs = {"pixels": torch.ones(3)}
    return MediaItem(modality="images", encoder="whole", inputs=inputs, rows=1)


def sample(*media: MediaItem) -> Sample:
    ids_L = torch.tensor([1, *[IMAGE] * sum(one.rows for one in media), 2])
    return Sample(name="s/7", token_ids=ids_L, is_label=ids_L == 2, media=media)


SAMPLES = [sample(item(1, 2), item(2, 3)), sample(), sample(item(3, 1))]


@pytest.mark.parametrize(
    "collate",
    [COLLATE, PackingCollator(**SETTINGS | {"seq_length": 32}, media_formats={"images": RAGGED})],
)
def test_items_of_any_size_are_lists(collate: SampleCollator) -> None:
    inputs = collate(SAMPLES)["modality_inputs"]["images"]["patches"]
    assert [tensor.shape for tensor in inputs["pixels"]] == [(2, 4), (6, 4), (3, 4)]
    assert [float(tensor[0, 0]) for tensor in inputs["pixels"]] == [1, 2, 3]
    assert inputs["grid"] == [(1, 2), (2, 3), (3, 1)]
    assert inputs["frames"] == [1, 2, 3]
    assert all(type(number) is int for grid in inputs["grid"] for number in grid)
    assert inputs["rate"].tolist() == [0.5, 1, 1.5]


def test_an_encoder_without_items_gets_empty_lists() -> None:
    inputs = BOTH([sample(whole())])["modality_inputs"]["images"]
    assert inputs["whole"]["pixels"].shape == (1, 3)
    ragged = inputs["patches"]
    assert (ragged["pixels"], ragged["grid"], ragged["frames"]) == ([], [], [])
    assert ragged["rate"].shape == (0,)
    assert is_empty({"patches": ragged})
    assert not is_empty(BOTH([SAMPLES[0]])["modality_inputs"]["images"])
    assert COLLATE([sample()])["modality_inputs"] == {}


def test_lists_are_cast_broadcast_and_divided_by_item() -> None:
    batch = COLLATE(SAMPLES)
    part = keep_for_stage(batch, pre_process=True, post_process=True, dtype=torch.bfloat16)
    found = unpack(*pack(part))["modality_inputs"]["images"]["patches"]
    assert {tensor.dtype for tensor in [*found["pixels"], found["rate"]]} == {torch.bfloat16}
    assert [tensor.shape for tensor in found["pixels"]] == [(2, 4), (6, 4), (3, 4)]
    assert [float(tensor[0, 0]) for tensor in found["pixels"]] == [1, 2, 3]
    assert found["grid"] == [(1, 2), (2, 3), (3, 1)]
    held = cut_inputs("patches", found, 3, 1, 3)
    assert held["grid"] == [(2, 3), (3, 1)]
    assert [tensor.shape for tensor in held["pixels"]] == [(6, 4), (3, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.ones(2, 5)}, r"pixels is torch.float32 \[2, 5\]; expected .* \[any, 4\]"),
        ({"pixels": torch.ones(4)}, r"pixels is torch.float32 \[4\]; expected .* \[any, 4\]"),
        ({"grid": torch.tensor([1, 2, 3])}, r"grid is torch.int64 \[3\]; expected .* \[2\]"),
        ({"grid": torch.tensor([1, 2]).int()}, r"grid is torch.int32 \[2\]; expected torch.int64"),
    ],
)
def test_items_of_another_form_are_named(change: dict[str, Any], message: str) -> None:
    good = item(1, 2)
    bad = replace(good, inputs={**good.inputs, **change})
    with pytest.raises(InputError, match=rf"sample s/7, media item 1: {message}"):
        COLLATE([sample(good, bad)])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"gird": (torch.int64, (2,))}, r"'patches': on_host names \['grid'\]; .* \['gird'\]"),
        ({"grid": (torch.float32, (2,))}, r"on_host names 'grid', which is torch.float32"),
        ({"grid": (torch.int64, (-1,))}, r"'grid' has shape \[-1\]; .* None for any"),
    ],
)
def test_formats_that_cannot_be(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MediaFormat(encoder="patches", inputs=inputs, on_host=("grid",))
