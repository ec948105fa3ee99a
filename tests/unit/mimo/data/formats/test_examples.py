"""Every file of ``examples/data``: its format, and the tokens and labels of its samples."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.formats import RawRecord, ReadingOptions, detect, read_record
from megatron.mimo.data.sources import files_of, open_file
from tests.unit.mimo.data.chats import chat_of, with_template
from tests.unit.mimo.data.formats.templates import TOOL_TEMPLATE

ROOT = Path(__file__).parents[5]
DATA = ROOT / "examples/data"

# The text of a sample with what is learned in «»; ▣ ▷ ♪ stand for the rows of a picture, a clip, a
# sound.
CAT = "<s>USER: ▣What is this? ASSISTANT:« A cat.</s>»"
DOG = "<s>USER: ▣What is this? ASSISTANT:« A dog.</s>»"
TOOLS = (
    "<s>tools: weather\nuser: Is it warm in Rome?\nassistant:« call weather {'place': 'Rome'}</s>»"
    'tool: {"celsius": 31}\nassistant:« Yes, 31 degrees.</s>»'
)
MOVING: list[tuple[str, str, str]] = [
    (
        "qwen2_5_vl",
        "marked-messages",
        "<|im_start|>user\n<|vision_start|>▷<|vision_end|>What moves?<|im_end|>\n"
        "<|im_start|>assistant\n«A disc.<|im_end|>»\n",
    ),
    (
        "qwen2_audio",
        "marked-messages",
        "<|im_start|>user\n<|audio_bos|>♪<|audio_eos|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n«A tone.<|im_end|>»\n",
    ),
]
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "llava.json": [
        ("llava", CAT),
        ("sharegpt", "<s>USER: Hi ASSISTANT:« A cat.</s>»"),
    ],
    "messages.jsonl": [("messages", CAT), ("messages", CAT)],
    "marked_messages.jsonl": [
        ("marked-messages", CAT),
        ("marked-messages", DOG),
        ("marked-messages", CAT),
    ],
    "alpaca.json": [
        ("alpaca", "<s>USER: ▣Name the animal. ASSISTANT:« A cat.</s>»"),
        (
            "alpaca",
            "<s>USER: Hi ASSISTANT:« Hello!</s>»USER: Add.\n2 and 3 ASSISTANT:« 5</s>»",
        ),
    ],
    "swift.jsonl": [
        ("swift", "<s>USER: ▣Find the cat. ASSISTANT:« It is at [4, 4, 27, 27].</s>»"),
        ("swift", DOG),
    ],
    "prompt_completion.jsonl": [
        ("prompt-completion", "<s>USER: What is 2 and 3? ASSISTANT:« 5</s>»"),
        ("prompt-completion", CAT),
    ],
    "exchanges.jsonl": [("exchanges", f"{CAT}USER: Is it blue? ASSISTANT:« No.</s>»")],
    "visual_questions.jsonl": [("visual-questions", CAT), ("visual-questions", DOG)],
    "labels.jsonl": [
        ("messages", "<s>USER: Hi ASSISTANT: Hello!</s>USER: 2 and 3? ASSISTANT:« 5</s>»"),
        ("messages", "<s>USER: Hi ASSISTANT:« Hello!</s>»USER: 2 and 3? ASSISTANT:« 5</s>»"),
    ],
    "thinking.jsonl": [
        ("messages", "<s>USER: 2 and 3? ASSISTANT:« <think>2 + 3 = 5</think>\n\n5</s>»"),
    ],
    "text.jsonl.gz": [("text", "<s>«Cats are small.</s>»"), ("text", "<s>«Dogs bark.</s>»")],
    "text.jsonl.zst": [("text", "<s>«Cats are small.</s>»"), ("text", "<s>«Dogs bark.</s>»")],
    "captions.jsonl": [
        ("captions", "<s>▣«An orange disc.</s>»"),
        ("captions", "<s>▣«A blue disc.</s>»"),
    ],
    "interleaved.jsonl": [
        ("interleaved", "<s>«A cat:»▣«and no dog.</s>»"),
        ("interleaved", "<s>«Two animals.»▣«This one barks.</s>»"),
        ("interleaved", "<s>«A cat: »▣« and a dog: »▣«</s>»"),
    ],
    "embedded.parquet": [("marked-messages", CAT), ("marked-messages", DOG)],
    "paths.arrow": [("marked-messages", CAT), ("marked-messages", DOG)],
    "saved_dataset": [("marked-messages", CAT), ("marked-messages", DOG)],
    "shard-000000.tar": [("sharegpt", CAT), ("captions", "<s>▣«A blue disc.</s>»")],
}
# Files that a model of another kind reads, or a template that writes tools.
OTHERS: dict[str, list[tuple[str, str, str]]] = {
    "video_audio.jsonl": MOVING,
    "video_audio.parquet": MOVING,
    "tools.jsonl": [("tools", "messages", TOOLS)],
    "sharegpt.jsonl": [
        ("llava", "sharegpt", CAT.replace("<s>", "<s>Be brief. ")),
        ("tools", "sharegpt", TOOLS),
        ("llava", "sharegpt", "<s>USER: Hi ASSISTANT:« Hello!</s>»"),
    ],
}
ROWS = {"▣": 9 * "<image>", "▷": 16 * "<|image_pad|>", "♪": 4 * "<|AUDIO|>"}
CASES = [
    *(
        (name, number, "llava", *one)
        for name, records in EXPECTED.items()
        for number, one in enumerate(records)
    ),
    *(
        (name, number, *one)
        for name, records in OTHERS.items()
        for number, one in enumerate(records)
    ),
]


def records_of(path: Path, index_folder: Path) -> list[RawRecord]:
    files = [open_file(file, index_folder) for file in files_of([path])]
    return [file[number] for file in files for number in range(len(file))]


def chat_named(name: str) -> Chat:
    return with_template(TOOL_TEMPLATE) if name == "tools" else chat_of(name)


def pieces(expected: str) -> Iterator[tuple[str, bool]]:
    """The text of a case, cut where what is learned begins and ends."""
    for mark, rows in ROWS.items():
        expected = expected.replace(mark, rows)
    for number, text in enumerate(re.split("[«»]", expected)):
        if text:
            yield text, number % 2 == 1


def told(chat: Chat, sample: Any) -> list[tuple[str, bool]]:
    """The text of a sample, cut where labels begin and end."""
    tokens = zip(sample.token_ids.tolist(), sample.is_label.tolist(), strict=True)
    return [
        (chat.processor.tokenizer.decode([token for token, _ in group]), learned)
        for learned, group in itertools.groupby(tokens, key=lambda pair: pair[1])
    ]


@pytest.mark.parametrize(("name", "number", "family", "format_", "text"), CASES)
def test_samples_of_the_examples(
    tmp_path: Path, name: str, number: int, family: str, format_: str, text: str
) -> None:
    records = records_of(DATA / name, tmp_path)
    assert len(records) == len(EXPECTED.get(name) or OTHERS[name])
    record, chat = records[number], chat_named(family)
    assert detect(record).name == format_
    sample = chat.sample(read_record(record, ReadingOptions()))
    expected = list(pieces(text))
    assert told(chat, sample) == expected
    tokenizer = chat.processor.tokenizer
    whole = "".join(piece for piece, _ in expected)
    assert sample.token_ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_energon_dataset_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron.energon") is None:
        with pytest.raises(InputError, match=r"energon is an Energon dataset.*pip install mega"):
            records_of(DATA / "energon", tmp_path)
        return
    records = records_of(DATA / "energon", tmp_path)
    chat = chat_of("llava")
    samples = [chat.sample(read_record(record, ReadingOptions())) for record in records]
    expected = [list(pieces(text)) for _, text in EXPECTED["shard-000000.tar"]]
    assert [told(chat, sample) for sample in samples] == expected


def test_the_documentation_names_every_example() -> None:
    page = (ROOT / "docs/data.md").read_text()
    left = {"media", "make.py", "__pycache__"}
    names = {path.name for path in DATA.iterdir() if not path.name.startswith(".")} - left
    assert {name for name in names if f"examples/data/{name}" not in page} == set()
    assert set(EXPECTED) | set(OTHERS) | {"energon"} == names
