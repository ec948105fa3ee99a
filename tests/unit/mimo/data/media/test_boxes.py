"""Boxes in the units of a model, against the sizes that its processor gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record
from megatron.mimo.data.media.source import EncodedMedium
from megatron.mimo.recipes.reading_flags import box_writer
from tests.unit.mimo.data.chats import chat_of

SIZE = (90, 50)
BOX = [9, 10, 45, 50]


def encoded(size: tuple[int, int], orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    target = io.BytesIO()
    Image.new("RGB", size).save(target, "JPEG", exif=exif)
    return target.getvalue()


def answer(family: str, objects: dict[str, Any], *images: bytes) -> str:
    record = RawRecord(
        value={
            "messages": [
                {"role": "user", "content": "<image>" * len(images) + "Where?"},
                {"role": "assistant", "content": "At <bbox>."},
            ],
            "images": list(images),
            "objects": objects,
        },
        file=Path("a.jsonl"),
        place="line 1",
    )
    found = read_record(record, ReadingOptions(boxes=box_writer(chat_of(family))))
    assert isinstance(found, Conversation)
    return str(found.turns[1].content[0].value)


@pytest.mark.parametrize(
    ("kind", "box"),
    [("real", BOX), ("norm1", [0.1, 0.2, 0.5, 1.0]), ("norm1000", [100, 200, 500, 1000])],
)
def test_the_same_box_in_all_units(kind: str, box: list[float]) -> None:
    objects = {"bbox": [box], "bbox_type": kind}
    assert answer("qwen3_vl", objects, encoded(SIZE)) == "At [100, 200, 500, 1000]."
    processor = chat_of("qwen2_5_vl").processor
    images = processor.image_processor
    (grid,) = images(Image.new("RGB", SIZE), return_tensors="pt")["image_grid_thw"]
    _, rows, columns = (grid * images.patch_size).tolist()
    assert (columns, rows) != SIZE
    expected = [round(0.1 * columns), round(0.2 * rows), round(0.5 * columns), rows]
    assert answer("qwen2_5_vl", objects, encoded(SIZE)) == f"At {expected}."


def test_a_box_is_in_the_image_that_is_named_as_it_is_shown() -> None:
    turned, other = encoded(SIZE, orientation=6), encoded((100, 100))
    whole = {"bbox": [[0, 0, *reversed(SIZE)]]}
    assert answer("qwen3_vl", whole, turned) == "At [0, 0, 1000, 1000]."
    point = {"bbox": [[25, 50]], "image_id": [1]}
    assert answer("qwen3_vl", point, turned, other) == "At [250, 500]."


@pytest.mark.parametrize(
    ("family", "objects", "images", "message"),
    [
        ("llava", {"bbox": [BOX]}, 1, r"family 'llava' .* is not known here; .*--boxes as-is"),
        ("qwen3_vl", {"bbox": [[0, 0, 91, 9]]}, 1, r"\[0, 0, 91, 9\] is not within 90 x 50"),
        ("qwen3_vl", {"bbox": [BOX], "bbox_type": "norm1"}, 1, r"not within 1 x 1, the units of n"),
        ("qwen3_vl", {"bbox": [BOX], "image_id": [1]}, 1, r"images \[1\], and there are 1"),
        ("qwen3_vl", {"bbox": [BOX]}, 0, r"images \[0\], and there are 0"),
    ],
)
def test_what_cannot_be_written_is_named(
    family: str, objects: dict[str, Any], images: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        answer(family, objects, *[encoded(SIZE)] * images)


def test_a_picture_without_a_size_is_named(tmp_path: Path) -> None:
    writer = box_writer(chat_of("qwen3_vl"))
    broken = EncodedMedium(data=b"no picture", name="broken")
    with pytest.raises(InputError, match=r"line 1: .*broken.* is no image"):
        writer(BOX, "real", broken, "line 1")
    with pytest.raises(InputError, match="missing"):
        writer(BOX, "real", tmp_path / "missing.png", "line 1")
