"""What is said of a text whose media bring text of their own."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.mimo.data.chat.expanded import split_text

TEXT = "Look: <i>. A cat\n<i>!"
SPANS = [(11, 21)]  # "A cat\n<i>!"
WHOLE = "Look: [iii]. A cat\n\n\n[i]\n!"
MEDIA = [
    {"text": "<i>", "replacement": "[iii]", "span": (6, 9), "new_span": (6, 11)},
    {"text": "<i>", "replacement": "\n\n[i]\n", "span": (17, 20), "new_span": (19, 25)},
]


def said(*tokens: str, media: Any = MEDIA) -> list[str]:
    """Of the tokens that make ``WHOLE``, those that are learned."""
    assert "".join(tokens) == WHOLE
    offsets, at = [], 0
    for token in tokens:
        offsets.append((at, at + len(token)))
        at += len(token)
    features = {
        "input_ids": [list(range(len(tokens)))],
        "offset_mapping": [offsets],
        "text_replacement_offsets": [media],
        "mm_token_type_ids": [[0] * len(tokens)],
    }
    given, expanded = split_text(features)
    assert {name: tuple(value.shape) for name, value in given.items()} == {
        "input_ids": (1, len(tokens))
    }
    is_said_L = expanded.is_said(TEXT, SPANS)
    return [token for token, learned in zip(tokens, is_said_L.tolist(), strict=True) if learned]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # Text that a medium brings is not learned, nor what joins with it.
        (["Look: ", "[iii]", ".", " A", " cat", "\n\n\n", "[i]", "\n", "!"], [" A", " cat", "!"]),
        (
            ["Look: ", "[", "iii", "]", ".", " ", "A", " cat", "\n", "\n\n[i]", "\n!"],
            ["A", " cat", "\n"],
        ),
        (["Look: [iii]. ", "A cat", "\n", "\n\n", "[i]\n", "!"], ["A cat", "\n", "!"]),
        # A token that begins before an answer does, with more than white space.
        (["Look: [iii]", ". A", " cat", "\n\n\n[i]\n", "!"], [" cat", "!"]),
    ],
)
def test_text_of_media_is_not_learned(tokens: list[str], expected: list[str]) -> None:
    assert said(*tokens) == expected
