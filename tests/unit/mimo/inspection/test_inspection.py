"""``inspect`` shows what training reads: text and labels, media, refusals, numbers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron.mimo.inspection.command import main
from megatron.mimo.inspection.statistics import Bar, Statistics, histogram
from tests.unit.mimo.data.chats import chat_of

DATA = Path(__file__).parents[4] / "examples/data"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hf")
    chat = chat_of("qwen2_5_vl")
    chat.config.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return str(folder)


def shown(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> str:
    assert main(["inspect", *flags]) == code
    return capsys.readouterr().out


class Page(HTMLParser):
    """What a page holds: texts by class, pictures, references to other files."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.learned, self.pictures, self.outside = "", list[bytes](), list[str]()
        self._open: list[bool] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        source = given.get("src") or given.get("href") or ""
        if source.startswith("data:image/png;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))
        elif source:
            self.outside.append(source)
        if tag == "span":
            self._open.append(given.get("class") == "learned")
        assert tag not in ("script", "link")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1]:
            self.learned += data


@pytest.mark.parametrize(
    ("lengths", "most"), [([31, 32], 32), (range(1, 101), 95), (range(1, 21), 19), ([7], 7)]
)
def test_95_percent_are_no_longer_than_is_said(lengths: Sequence[int], most: int) -> None:
    (told,) = (
        line for line in Statistics(lengths=[*lengths], learned=[1]).lines() if "tokens per" in line
    )
    assert f", 95 % up to {most}, " in told


def test_samples_labels_media_and_numbers_are_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: str
) -> None:
    page = tmp_path / "page.html"
    files = [str(DATA / "marked_messages.jsonl"), str(DATA / "video_audio.jsonl")]
    told = shown(capsys, *files, "--hf", hf, "-n", "4", "--html", str(page), code=1)
    assert "marked_messages.jsonl, line 2 (marked-messages): 44 tokens, 7 learned" in told
    assert "<|vision_start|>[images: 16 rows]<|vision_end|>What is this?" in told
    assert "«A dog.<|im_end|>»" in told
    assert re.search(r"image .*media/dog.jpg: 32 x 32\n", told)
    assert re.search(r"video .*media/clip.gif: 2 frames at 2 per second, 32 x 32\n", told)
    assert "5 records read: 5 marked-messages" in told
    assert "images: 4 media, rows of each: least 16" in told
    assert "1 refused: bad" in told
    assert re.search(r"video_audio.jsonl, line 2: holds audio, which .* does not take", told)
    assert "\x1b[" not in told
    found = Page(page.read_text())
    assert found.learned.count("A cat.<|im_end|>") == 2
    assert found.learned.startswith("learned")  # the legend
    assert found.outside == []
    sizes = [Image.open(io.BytesIO(data)).size for data in found.pictures]
    assert sizes == [(32, 32), (32, 32), (32, 32), (64, 32)]  # two frames side by side
    assert "holds audio, which" in page.read_text()


def test_what_strangers_write_is_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: str
) -> None:
    file, page = tmp_path / "a.jsonl", tmp_path / "page.html"
    talk = [{"role": "user", "content": "<script>x</script>\x1b[2J"}]
    talk.append({"role": "assistant", "content": "</pre><b>"})
    file.write_text(json.dumps({"messages": talk}) + "\n{not json\n")
    told = shown(capsys, str(file), "--hf", hf, "--html", str(page), "--colour", "yes", code=1)
    assert "\x1b[2J" not in told
    assert r"<script>x</script>\x1b[2J" in told
    assert "\x1b[30;42m</pre><b><|im_end|>\x1b[0m" in told
    assert "a.jsonl, line 2: not valid JSON" in told
    found = Page(page.read_text())  # refuses tags of scripts
    assert "</pre><b><|im_end|>" in found.learned


def test_flags_of_reading_are_those_of_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: str
) -> None:
    labels = str(DATA / "labels.jsonl")
    assert "«Hello!<|im_end|>»" in shown(capsys, labels, "--hf", hf)
    last = shown(capsys, labels, "--hf", hf, "--learn", "last", "--tokens")
    assert "«Hello!" not in last
    assert re.search(r"^ +\d+ \* '5'$", last, re.MULTILINE)
    long = shown(capsys, labels, "--hf", hf, "--seq-length", "30", code=1)
    assert "2 refused: too long" in long
    cut = shown(capsys, labels, "--hf", hf, "--seq-length", "30", "--on-too-long", "cut-front")
    assert "2 turns cut away" in cut
    assert "Hello!" not in cut
    assert "2 samples lost turns" in cut


def test_arguments_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: str
) -> None:
    file, empty = str(DATA / "labels.jsonl"), tmp_path / "empty.jsonl"
    empty.touch()
    for flags, message in (
        ((str(empty), "--hf", hf), "empty.jsonl: no records; expected at least one"),
        ((file, "--hf", str(tmp_path / "none")), "there is no such folder"),
        ((str(tmp_path / "none.jsonl"), "--hf", hf), "cannot be read: No such file"),
        ((file, "--hf", hf, "--first", "9"), "--first 9: there are 2 records"),
        ((file, "--hf", hf, "-n", "-1"), "-n is -1; expected at least 0"),
        ((file, "--hf", hf, "--first", "0"), "count from 1"),
    ):
        assert main(["inspect", *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_record_of_no_format_is_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"one": 1}\n')
    told = shown(capsys, str(tmp_path / "bad.jsonl"), "--hf", hf, code=1)
    assert "1 records read: 1 of no known format\n1 refused: bad\n" in told


def test_a_histogram_covers_all_values() -> None:
    assert histogram([]) == []
    assert histogram([7, 7]) == [Bar(7, 8, 2)]
    bars = histogram([1, 2, 50, 100], bars=10)
    assert (bars[0].low, bars[-1].high) == (1, 101)
    assert [bar.count for bar in bars if bar.count] == [2, 1, 1]
    assert all(one.high == two.low for one, two in itertools.pairwise(bars))
