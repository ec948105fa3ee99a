from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample, BadSamplePolicy
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.measure import Measure, measure_of
from megatron.mimo.data.reading.sample_measurer import SampleMeasurer
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.sample import Sample
from tests.unit.mimo.data.chats import chat_of

SIZES = ((20, 30), (33, 17), (16, 16), (40, 40))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        image, exif = Image.new("RGB", size, (number, 2, 3)), Image.Exif()
        exif[274] = 6 if number == 1 else 1  # turned by 90 degrees
        image.save(tmp_path / f"{number}.png", exif=exif)
    return tmp_path


def conversation(
    folder: Path, *images: str, text: str = "what? 1 2 3", times: int = 1
) -> RawRecord:
    asked = [*({"type": "image", "path": name} for name in images), {"type": "text", "text": text}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "seven 7"}]
    return RawRecord(value={"messages": turns * times}, file=folder / "a.jsonl", place="line 1")


def measurer(family: str, **settings: Any) -> SampleMeasurer:
    reader = SampleReader(chat=chat_of(family), **({"seq_length": 4096} | settings))
    return SampleMeasurer(reader=reader)


class Unread(SampleReader):
    """Must not be asked."""

    def __call__(self, record: RawRecord) -> Sample | BadSample:
        raise AssertionError("a record was read for its length")


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_headers_tell_what_reading_would(family: str, folder: Path) -> None:
    by_headers = SampleMeasurer(reader=Unread(chat=chat_of(family), seq_length=4096))
    read = SampleReader(chat=chat_of(family), seq_length=4096)
    for names in ((), ("0.png",), ("1.png", "0.png"), ("3.png", "2.png", "2.png", "1.png")):
        record = conversation(folder, *names, times=2)
        sample = read(record)
        assert isinstance(sample, Sample)
        expected = measure_of(sample)
        found = by_headers(record)
        assert isinstance(found, Measure)
        assert found.length == expected.length
        assert sum(rows for _, rows in found.media) == sum(rows for _, rows in expected.media)
        assert {name for name, _ in found.media} == {name for name, _ in expected.media}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("limit", [None, 60.0])
def test_videos_are_measured_by_their_first_frame(
    family: str, limit: float | None, folder: Path
) -> None:
    policy = BadSamplePolicy(sample_timeout=limit)
    by_headers = SampleMeasurer(reader=Unread(chat=chat_of(family), seq_length=4096, policy=policy))
    read = SampleReader(chat=chat_of(family), seq_length=4096)
    for name, size, count in (("a", (40, 24), 5), ("b", (24, 24), 2)):
        frames = [Image.fromarray(np.full((*size, 3), n, np.uint8)) for n in range(count)]
        target = folder / f"{name}.gif"
        frames[0].save(target, save_all=True, append_images=frames[1:], duration=500)
    several = ("1.png", "a.gif", "a.gif" if family == "internvl" else "b.gif")
    for names in (("a.gif",), ("b.gif", "0.png"), several):
        record = conversation(folder, *names)
        for part in record.value["messages"][0]["content"]:
            if part.get("path", "").endswith(".gif"):
                part["type"] = "video"
        sample = read(record)
        assert isinstance(sample, Sample)
        found = by_headers(record)
        assert isinstance(found, Measure)
        assert found.length == measure_of(sample).length
        assert sum(rows for _, rows in found.media) == sum(
            rows for _, rows in measure_of(sample).media
        )


def test_images_in_memory_are_measured_alike(folder: Path) -> None:
    data = (folder / "1.png").read_bytes()
    record = conversation(folder, "1.png")
    value = {"messages": record.value["messages"]}
    value["messages"][0]["content"][0] = {"type": "image", "image": {"bytes": data, "path": None}}
    inner = RawRecord(value=value, file=record.file, place=record.place)
    by_headers = SampleMeasurer(reader=Unread(chat=chat_of("qwen2_5_vl"), seq_length=4096))
    assert by_headers(inner) == by_headers(conversation(folder, "1.png"))


def asking_about(folder: Path, *recordings: str) -> RawRecord:
    record = conversation(folder)
    for name in recordings:
        record.value["messages"][0]["content"].insert(0, {"type": "audio", "path": name})
    return record


@pytest.mark.parametrize("family", ["qwen2_audio", "llava_avlm"])
def test_recordings_are_measured_by_their_headers(family: str, folder: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    chat = chat_of(family)
    by_headers = SampleMeasurer(reader=Unread(chat=chat, seq_length=4096))
    read = SampleReader(chat=chat, seq_length=4096)
    hears = chat.processor.feature_extractor.n_samples / 16000
    for share in (0.41, 0.93, 0.55, 0.5501, 0.42, 1.0):
        for rate, kind in ((16000, "wav"), (22050, "wav"), (44100, "flac"), (48000, "ogg")):
            tone = np.zeros((int(share * hears * rate), 2), dtype=np.float32)
            soundfile.write(folder / f"tone.{kind}", tone, rate)
            record = asking_about(folder, f"tone.{kind}")
            sample = read(record)
            assert isinstance(sample, Sample)
            assert by_headers(record) == measure_of(sample), (share, rate, kind)


def test_what_headers_cannot_tell_is_read(folder: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(folder / "tone.mp3", np.zeros(4000), 16000)
    record = asking_about(folder, "tone.mp3")
    measure = measurer("qwen2_audio")
    sample = measure.reader(record)
    assert isinstance(sample, Sample)
    assert measure(record) == measure_of(sample)
    with pytest.raises(AssertionError, match="read for its length"):
        SampleMeasurer(reader=Unread(chat=measure.reader.chat, seq_length=4096))(record)


def test_bad_records_are_found_without_decoding(folder: Path) -> None:
    skip = {"policy": BadSamplePolicy(on_bad_sample="skip", on_too_long="skip")}
    (folder / "text.png").write_text("no image")
    for names, text, kind in (
        (("none.png",), "a", "bad"),
        (("text.png",), "a", "bad"),
        (("0.png",), "1 " * 300, "too long"),
    ):
        record = conversation(folder, *names, text=text)
        found = measurer("llava", seq_length=200, **skip)(record)
        assert isinstance(found, BadSample)
        assert found.kind == kind
        with pytest.raises(InputError, match=r"a.jsonl, line 1"):
            measurer("llava", seq_length=200)(record)


def test_an_image_that_breaks_within_is_found_when_it_is_decoded(folder: Path) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="png")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:2000])
    measure = measurer("llava", policy=BadSamplePolicy(on_bad_sample="skip"))
    record = conversation(folder, "cut.png")
    assert isinstance(measure(record), Measure)
    assert isinstance(measure.reader(record), BadSample)
