"""Conversations become samples that learn what the assistant says, and nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.chat.dataset import ChatDataset
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.media.files import Video
from megatron.mimo.recipes.tiny import processors, tasks
from tests.unit.mimo.data.chats import ReadFile, chat_of, parse, talk, with_template

PICTURE = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
FAMILIES = (
    "gemma3",
    "internvl",
    "llava",
    "llava_next",
    "llava_avlm",
    "qwen2_audio",
    "qwen2_5_vl",
    "qwen3_vl",
)
VALUES = {
    "image": PICTURE,
    "audio": np.sin(np.arange(6000) / 9).astype(np.float32),
    "video": Video(frames_THWC=np.zeros((4, 16, 16, 3), dtype=np.uint8), fps=2.0),
}
KINDS = {
    "gemma3": ("image", "image"),
    "internvl": ("image", "video", "image"),
    "llava": ("image", "image"),
    "llava_next": ("image", "image"),
    "llava_avlm": ("audio", "image", "audio"),
    "qwen2_audio": ("audio", "audio"),
    "qwen2_5_vl": ("video", "image", "image"),
    "qwen3_vl": ("video", "image", "image"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_assistant_is_learned_whatever_the_media(name: str) -> None:
    chat = chat_of(name)
    first, *others = [(kind, VALUES[kind]) for kind in KINDS[name]]
    sample = chat.sample(
        talk(
            ("user", [first, "What is this?"]),
            ("assistant", ["A cat, 7 low."]),
            ("user", ["And these? ", *others]),
            ("assistant", ["Ünknown"]),
        )
    )
    tokenizer = chat.processor.tokenizer
    said = tokenizer.decode(sample.token_ids[sample.is_label])
    end = tokenizer.eos_token
    assert said.replace(" ", "") == f"Acat,7low.{end}Ünknown{end}"
    frames = 3 if name == "internvl" else 0  # each is an item, the first of them the clip's own
    assert len(sample.media) == len(KINDS[name]) + frames
    placeholders = set(chat.family.media(chat.config).special_token_ids.values())
    is_media_L = torch.isin(sample.token_ids, torch.tensor([*placeholders]))
    assert int(is_media_L.sum()) == sum(item.rows for item in sample.media)
    whole = tokenizer.decode(sample.token_ids[~is_media_L])
    asked = [whole.index(text) for text in ("What is this?", "A cat, 7 low.", "And these?")]
    assert asked == sorted(asked)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prompt_is_the_sample_up_to_the_answer(name: str) -> None:
    chat = chat_of(name)
    asked = ("user", [("image", PICTURE), "What is this?"])
    prompt = chat.prompt(talk(asked))
    sample = chat.sample(talk(asked, ("assistant", [" It"]))).prompt()
    assert prompt.token_ids.tolist() == sample.token_ids.tolist()
    assert not prompt.is_label.any()


def test_errors_name_the_conversation_and_the_file(tmp_path: Path) -> None:
    chat = chat_of("llava")

    def refused(message: str, *parts: str | tuple[str, Any]) -> None:
        with pytest.raises(InputError, match=message):
            chat.sample(talk(("user", parts), ("assistant", ["."]), name="a.jsonl, line 3"))

    refused(r"line 3: image .*/none.png does not exist", ("image", tmp_path / "none.png"))
    (tmp_path / "bad.png").write_text("no image")
    refused(r"line 3: .*/bad.png does not decode", ("image", tmp_path / "bad.png"))
    refused(r"line 3: holds audio, which .*'llava' does not take; it takes image", ("audio", []))
    refused(r"line 3: a text of the user holds '<image>', .*; leave it out", "an <image>")
    refused(r"line 3: the processor refuses it", ("image", "no picture"))
    wavfile.write(tmp_path / "long.wav", 8000, np.ones(16000, dtype=np.int16))
    long = talk(("user", [("audio", tmp_path / "long.wav")]), ("assistant", ["."]))
    with pytest.raises(InputError, match=r"lasts 2.0 s, and the model hears 1.0 s; cut it"):
        chat_of("qwen2_audio").sample(long)


def test_processors_that_cannot_be_used() -> None:
    good = chat_of("llava")
    processor = processors.llava_processor(good.config)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        Chat(family=good.family, config=good.config, processor=processor)
    other = good.family.tiny()
    other.image_token_index = 499
    with pytest.raises(ConfigError, match=r"none for the placeholder of images \(id 499\)"):
        Chat(family=good.family, config=other, processor=good.processor)


def test_processors_that_lack_a_setting_say_which() -> None:
    for name in ("llava", "llava_next"):
        known = chat_of(name)
        for setting, value in (
            ("patch_size", known.config.vision_config.patch_size),
            ("vision_feature_select_strategy", known.config.vision_feature_select_strategy),
        ):
            processor = getattr(processors, f"{name}_processor")(known.config)
            setattr(processor, setting, None)
            with pytest.raises(ConfigError, match=rf"Processor has no {setting}; .*{value}.* in c"):
                Chat(family=known.family, config=known.config, processor=processor)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    known = chat_of("llava")
    processor = processors.llava_processor(known.config)
    rows = known.config.get_text_config().vocab_size
    more = rows - len(processor.tokenizer) + 3
    processor.tokenizer.add_tokens([f"<loc{number}>" for number in range(more)])
    with pytest.raises(ConfigError, match=rf"{rows} embeddings; .*_embeddings\({rows + 3}\)"):
        Chat(family=known.family, config=known.config, processor=processor)


def test_samples_in_memory_are_finite() -> None:
    bad = np.ones(4000, dtype=np.float32)
    bad[7] = np.nan
    told = talk(("user", [("audio", bad)]), ("assistant", ["."]), name="a.jsonl, line 3")
    with pytest.raises(InputError, match="line 3: a recording has 1 samples that are not finite"):
        chat_of("qwen2_audio").sample(told)


def test_a_clip_too_short_for_a_row_is_named(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", 8000, np.ones(40, dtype=np.float32))
    told = talk(("user", [("audio", tmp_path / "a.wav")]), ("assistant", ["."]), name="line 3")
    with pytest.raises(InputError, match=r"line 3: .*<\|AUDIO\|>.* gives no row.*too short"):
        chat_of("qwen2_audio").sample(told)


def test_parts_of_a_video_and_lists_of_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (20 * number, 0, 0)) for number in range(12)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    chat = chat_of("qwen2_5_vl")

    def grid(**more: Any) -> int:
        part = {"type": "video", "path": str(tmp_path), **more}
        entry = {
            "messages": [
                {"role": "user", "content": [part]},
                {"role": "assistant", "content": "."},
            ]
        }
        [item] = chat.sample(parse(entry, folder=tmp_path)).media
        return int(item.inputs["grid"].tolist()[0])

    assert grid() == 6  # pairs of frames
    assert grid(nframes=4) == 2
    assert grid(fps=0.5) == 2  # 3 frames of 6 s
    assert grid(video_start=0.0, video_end=1.0) == 2  # 3 frames
    assert grid(path=["3.png", "1.png"]) == 1


def numbers(dataset: ChatDataset) -> list[str]:
    return [dataset[index].name for index in range(len(dataset))]


def lengthy(count: int) -> list[Conversation]:
    """Every third one is long."""
    return [
        talk(
            ("user", ["?" * (200 if index % 3 == 2 else 2)]), ("assistant", ["."]), name=str(index)
        )
        for index in range(count)
    ]


def test_each_pass_has_an_order_of_its_own() -> None:
    conversations = lengthy(2)
    settings: dict[str, Any] = {"chat": chat_of("llava"), "seq_length": 64, "count": 20}
    told = [numbers(ChatDataset(conversations, seed=seed, **settings)) for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    for start in range(0, 20, 2):
        assert sorted(told[0][start : start + 2]) == ["0", "1"]
    assert numbers(ChatDataset(conversations, **settings)) == ["0", "1"] * 10
    dataset = ChatDataset(conversations, seed=1, **settings)
    assert [dataset[index].name for index in (13, 3)] == [told[0][13], told[0][3]]


def test_too_long_is_an_error_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    conversations, chat = lengthy(6), chat_of("llava")
    strict = ChatDataset(conversations, chat=chat, seq_length=64)
    with pytest.raises(
        InputError, match=r"2: \d+ tokens, \d+ more than --seq-length 64; .*-long skip"
    ):
        strict[2]
    with caplog.at_level(logging.WARNING):
        skipping = ChatDataset(conversations, chat=chat, seq_length=64, on_too_long="skip")
        assert numbers(skipping) == ["0", "1", "3", "3", "4", "0"]
    assert len(caplog.records) == 1
    assert "1 of 6 conversations so far" in caplog.text
    fresh = ChatDataset(conversations, chat=chat, seq_length=64, on_too_long="skip")
    assert fresh[5].name == "0"  # whatever was read before
    tight = ChatDataset(conversations, chat=chat, seq_length=4, on_too_long="skip")
    with pytest.raises(InputError, match="all 6 conversations are longer than --seq-length 4"):
        tight[0]


@pytest.mark.parametrize("seed", range(8))
def test_one_that_fits_is_found_wherever_it_stands(seed: int) -> None:
    conversations = [
        talk(("user", ["?" * (2 if index == 3 else 200)]), ("assistant", ["."]), name=str(index))
        for index in range(5)
    ]
    settings: dict[str, Any] = {"chat": chat_of("llava"), "seq_length": 64, "count": 15}
    dataset = ChatDataset(conversations, seed=seed, on_too_long="skip", **settings)
    assert set(numbers(dataset)) == {"3"}


def test_files_and_memory_give_the_same_sample(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]
    line = {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "A cat."},
        ]
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    chat = chat_of("llava")
    [read] = ReadFile(tmp_path / "a.jsonl")
    told = talk(("user", [("image", PICTURE), "What is this?"]), ("assistant", ["A cat."]))
    one, other = chat.sample(read), chat.sample(told)
    assert torch.equal(one.token_ids, other.token_ids)
    assert torch.equal(one.media[0].inputs["pixel_values"], other.media[0].inputs["pixel_values"])


def test_made_conversations_are_those_of_their_number() -> None:
    made = tasks.Made(tasks.say_tones_and_digits, 50, held_out=False)
    again = tasks.Made(tasks.say_tones_and_digits, 9, held_out=False)
    for one, other in zip(made[:9], again, strict=True):
        for part, twin in zip(one.turns[0].content, other.turns[0].content, strict=True):
            assert np.array_equal(np.asarray(part.value), np.asarray(twin.value))
    held_out = tasks.Made(tasks.say_tones_and_digits, 50, held_out=True)
    answers = [[one.turns[-1].content[0].value for one in each] for each in (made, held_out)]
    assert answers[0] != answers[1]
    assert len(set(answers[0])) > 10


TWO_ANSWERS = (
    ("user", [("image", PICTURE), "What is this?"]),
    ("assistant", ["A cat."]),
    ("user", ["Sure?"]),
    ("assistant", ["Yes."]),
)
INSTRUCTIONS = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}[INST] {% endif %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %} {{ part['text'] }}{% else %}<image>{% endif %}
{%- endfor %}
{%- if message['role'] == 'user' %} [/INST]{% else %}</s>{% endif %}
{%- endfor %}"""


def test_a_template_that_writes_first_and_last_tokens_itself() -> None:
    chat = with_template(INSTRUCTIONS)
    sample = chat.sample(talk(*TWO_ANSWERS))
    tokenizer = chat.processor.tokenizer
    tokens = sample.token_ids.tolist()
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens.count(tokenizer.eos_token_id) == 2
    assert tokens[-1] == tokenizer.eos_token_id
    said = tokenizer.decode(sample.token_ids[sample.is_label])
    assert said == " A cat.</s> Yes.</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = "{{ messages | length }} {{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(InputError, match=r"talk, message 1: .* writes the turns before it diff"):
        with_template(forgetful).sample(talk(*TWO_ANSWERS))
    with pytest.raises(InputError, match=r"talk: the chat template refuses it: .*alternate"):
        with_template("{{ raise_exception('roles have to alternate') }}").sample(talk(*TWO_ANSWERS))
