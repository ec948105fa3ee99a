"""Rows of documents: what is in them, and that they are the documents."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data import (
    MediaFormat,
    MediaItem,
    PackedDataset,
    PackingCollator,
    Sample,
    SampleCollator,
    first_fit,
)
from megatron.mimo.data.micro_batches.packing import packed_sequences

IMAGE, PAD, VOCAB = 90, 3, 50
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_id": PAD,
    "special_token_ids": {"images": IMAGE},
    "media_formats": {
        "images": [
            MediaFormat(encoder="near", inputs={"pixels": (torch.float32, (2,))}),
            MediaFormat(encoder="far", inputs={"pixels": (torch.float32, (3,))}),
        ]
    },
    "span_modalities": ("images",),
}
ROWS = {"near": 2, "far": 3}


def item(encoder: str, value: float) -> MediaItem:
    pixels = torch.full((ROWS[encoder],), value)
    return MediaItem(
        modality="images", encoder=encoder, inputs={"pixels": pixels}, rows=ROWS[encoder]
    )


def sample(number: int, *segments: int | str) -> Sample:
    """Text lengths and encoder names; item k of sample n holds the value 10 * n + k."""
    ids: list[int] = []
    media: list[MediaItem] = []
    for segment in segments:
        if isinstance(segment, str):
            media.append(item(segment, 10.0 * number + len(media)))
            ids += [IMAGE] * ROWS[segment]
        else:
            ids += [(number + at) % VOCAB for at in range(segment)]
    ids_L = torch.tensor(ids)
    return Sample(name=f"s/{number}", token_ids=ids_L, is_label=ids_L != IMAGE, media=tuple(media))


DOCUMENTS = [sample(1, 5), sample(2, 1, "far", "near", 2), sample(3, "near", 1), sample(4, 4)]


@pytest.mark.parametrize(("cp_size", "length"), [(1, 32), (2, 32), (4, 40), (1, 20), (1, 21)])
def test_a_row_holds_each_document_as_it_is_alone(cp_size: int, length: int) -> None:
    batch = PackingCollator(**SETTINGS, seq_length=length, cp_size=cp_size)(DOCUMENTS)
    borders = batch["packing_kwargs"]
    sums = borders["cu_seqlens_q"]
    places = borders.get("cu_seqlens_q_padded", sums)
    assert places[-1] == length
    assert all(
        (stop - start) % (2 * cp_size if cp_size > 1 else 1) == 0
        for start, stop in pairwise(places)
    )
    assert borders["max_seqlen_q"] == max(stop - start for start, stop in pairwise(places))
    for number, one in enumerate(DOCUMENTS):
        size = len(one.token_ids)
        assert sums[number + 1] - sums[number] == size
        alone = SampleCollator(**SETTINGS, seq_length=size)([one])
        held = slice(places[number], places[number] + size)
        for name in ("input_ids", "position_ids", "labels", "loss_mask"):
            assert torch.equal(batch[name][:, held], alone[name]), name
        assert batch["loss_mask"][0, held][-1] == 0  # the next token is another document's
        spans = batch["span_ids"][0, held]
        assert torch.equal(spans > 0, one.token_ids == IMAGE)
    assert batch["loss_mask"].sum() == sum(int(one.is_label[1:].sum()) for one in DOCUMENTS)
    behind = slice(places[len(DOCUMENTS)], None)  # none with the row of 20
    assert (batch["input_ids"][0, behind] == PAD).all()
    assert batch["span_ids"].unique().tolist() == [0, 1, 2, 3]  # three images


def test_rows_of_several_encoders_go_to_the_placeholders_of_their_items() -> None:
    batch = PackingCollator(**SETTINGS, seq_length=21)(DOCUMENTS)
    inputs = batch["modality_inputs"]["images"]
    assert list(inputs) == ["near", "far"]
    # As the model concatenates them: rows of all near items, then of all far ones.
    rows = [float(pixels[0]) for pixels in inputs["near"]["pixels"] for _ in range(2)]
    rows += [float(pixels[0]) for pixels in inputs["far"]["pixels"] for _ in range(3)]
    stream = batch["alignment_plan"].streams["images"]
    placed = torch.zeros(21)
    placed[stream.rows_N] = torch.tensor(rows)[stream.sources_N]
    expected = [
        value
        for one in DOCUMENTS
        for media in one.media
        for value in [media.inputs["pixels"][0]] * media.rows
    ]
    assert placed[batch["input_ids"][0] == IMAGE].tolist() == expected


def test_an_encoder_without_items_gets_empty_tensors() -> None:
    batch = SampleCollator(**SETTINGS, seq_length=8)([sample(1, "far", 2)])
    near = batch["modality_inputs"]["images"]["near"]["pixels"]
    assert near.shape == (0, 2)
    assert (
        "images" not in SampleCollator(**SETTINGS, seq_length=8)([sample(1, 2)])["modality_inputs"]
    )


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_by_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 30) for _ in range(200)]
    rows = first_fit(lengths, 40, open_bins=10**9)
    room: list[int] = []
    expected: list[list[int]] = []
    for number, length in enumerate(lengths):
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(40)
            expected.append([])
        room[row] -= length
        expected[row].append(number)
    assert rows == expected
    bounded = first_fit(lengths, 40, open_bins=4)
    assert sorted(number for row in bounded for number in row) == list(range(200))
    assert all(sum(lengths[number] for number in row) <= 40 for row in bounded)
    assert len(rows) <= len(bounded) < 200


def test_a_packed_dataset_is_a_function_of_the_lengths() -> None:
    class Counted(torch.utils.data.Dataset[Sample]):
        reads = 0

        def __len__(self) -> int:
            return len(DOCUMENTS)

        def __getitem__(self, index: int) -> Sample:
            self.reads += 1
            return DOCUMENTS[index]

    dataset = Counted()
    lengths = [len(one.token_ids) for one in DOCUMENTS]
    by_length = PackedDataset(dataset, seq_length=16, multiple=4, lengths=lengths)
    assert dataset.reads == 0
    by_reading = PackedDataset(dataset, seq_length=16, multiple=4)
    rows = [[one.name for one in by_length[index]] for index in range(len(by_length))]
    assert rows == [[one.name for one in by_reading[index]] for index in range(len(by_reading))]
    assert rows == [["s/1", "s/2"], ["s/3", "s/4"]]  # places 8 + 8, 4 + 4
    with pytest.raises(ConfigError, match="1 lengths for 4 samples"):
        PackedDataset(dataset, seq_length=16, lengths=[1])


@pytest.mark.parametrize("cp_size", [1, 2])
def test_several_sequences_are_one_row_of_their_documents(cp_size: int) -> None:
    collate = PackingCollator(**SETTINGS, seq_length=16, cp_size=cp_size, marks_padding=True)
    first, second = tuple(DOCUMENTS[:2]), tuple(DOCUMENTS[2:])
    both, alone = collate([first, second]), [collate([first]), collate([second])]
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "padding_mask"):
        assert torch.equal(both[name], torch.cat([one[name] for one in alone], dim=1)), name
    borders = both["packing_kwargs"]
    for name in [name for name in borders if name.startswith("cu_seqlens")]:
        one, other = (one["packing_kwargs"].get(name) for one in alone)
        one = one or alone[0]["packing_kwargs"][name.removesuffix("_padded")]
        other = other or alone[1]["packing_kwargs"][name.removesuffix("_padded")]
        assert borders[name] == (*one, *(one[-1] + end for end in other[1:])), name
    rows = [one["alignment_plan"].streams["images"].rows_N for one in alone]
    merged = both["alignment_plan"].streams["images"].rows_N
    assert merged.tolist() == [*rows[0].tolist(), *(16 + row for row in rows[1].tolist())]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"seq_length 30 is not divisible by 2\*cp\*tp = 8; use 32"
    ):
        PackingCollator(**SETTINGS, seq_length=30, cp_size=2, tp_size=2)
    collate = PackingCollator(**SETTINGS, seq_length=16)
    with pytest.raises(InputError, match=r"4 samples \(s/1 to s/4\) take 20 tokens in one seq"):
        collate(DOCUMENTS)
    with pytest.raises(InputError, match="1 packed sequences and 1 samples"):
        collate([(DOCUMENTS[0],), DOCUMENTS[1]])
    with pytest.raises(InputError, match="a packed sequence of 0 samples"):
        collate([(DOCUMENTS[0],), ()])
    with pytest.raises(InputError, match="0 samples"):
        collate([])
    with pytest.raises(InputError, match="sample 1 takes 50 tokens, more than a sequence of 40"):
        first_fit([40, 50], 40)
    with pytest.raises(ConfigError, match=r"span_modalities names \['sounds'\]"):
        SampleCollator(**{**SETTINGS, "span_modalities": ("sounds",)}, seq_length=8)


class Broken(Dataset[Sample]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        raise TypeError("unhashable type: 'list'")


def test_a_sample_that_cannot_be_read_is_named() -> None:
    for read in (
        lambda: PackedDataset(Broken(), seq_length=8),
        lambda: packed_sequences(lambda _: Broken(), 1, seq_length=8),
    ):
        with pytest.raises(InputError, match=r"sample 0 cannot be read for its length: TypeError"):
            read()
