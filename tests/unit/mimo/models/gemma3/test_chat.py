"""Conversations with images that pan-and-scan cuts into crops."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.recipes.tiny.processors import gemma3_processor
from tests.unit.mimo.data.chats import chat_of, talk

WIDE = Image.fromarray(np.arange(20 * 60 * 3, dtype=np.uint8).reshape(20, 60, 3))
SQUARE = WIDE.crop((0, 0, 20, 20))
TALK = talk(
    ("user", [("image", WIDE), "What is this? ", ("image", SQUARE)]),
    ("assistant", ["A cat."]),
)


def test_crops_are_those_of_the_processor() -> None:
    chat = chat_of("gemma3")
    sample = chat.sample(TALK)
    text, _ = chat.text.answered(TALK)
    wanted = chat.processor(
        text=[text],
        images=[[WIDE, SQUARE]],
        return_tensors="pt",
        add_special_tokens=False,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=8,
        pan_and_scan_max_num_crops=2,
        pan_and_scan_min_ratio_to_activate=1.8,
    )
    assert sample.token_ids.tolist() == wanted["input_ids"][0].tolist()
    assert len(sample.media) == 4  # the whole image, two crops of it, the other image
    pixels = torch.stack([item.inputs["pixel_values"] for item in sample.media])
    assert torch.equal(pixels, wanted["pixel_values"])
    tokenizer = chat.processor.tokenizer
    whole = tokenizer.decode(sample.token_ids)
    assert "here are some crops to help you see better" in whole
    assert tokenizer.decode(sample.token_ids[sample.is_label]) == "A cat.<end_of_turn>"


def test_pan_and_scan_is_off_where_the_image_processor_says_so_or_nothing() -> None:
    known = chat_of("gemma3")
    for setting in (False, None):
        processor = gemma3_processor(known.config)
        processor.image_processor.do_pan_and_scan = setting
        chat = Chat(family=known.family, config=known.config, processor=processor)
        assert len(chat.sample(TALK).media) == 2
