"""Text that comes token by token, with a byte-level tokenizer: a token may be half a character."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.mimo.inference.text_stream import TextStream
from megatron.mimo.recipes.tiny.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    special = {"<s>": 0, "</s>": 1, "<pad>": 2}
    return tiny_tokenizer(
        special, vocab_size=300, texts=["a few words"], bos="<s>", eos="</s>", pad="<pad>"
    )


def stream(tokenizer: Any, text: str, *stop_texts: str) -> tuple[list[str], str, bool]:
    told: list[str] = []
    one = TextStream(tokenizer, stop_texts=stop_texts, write=told.append)
    stopped = any(one.feed(token) for token in tokenizer(text, add_special_tokens=False).input_ids)
    whole = one.close()
    assert "".join(told) == whole
    return told, whole, stopped


TEXT = "a few words, 12 ½ € and 字, 😀 then\nmore  words"


def test_pieces_are_the_text(tokenizer: Any) -> None:
    told, whole, stopped = stream(tokenizer, TEXT)
    assert whole == TEXT
    assert len(told) > 20
    assert not stopped
    assert "😀" in told


def test_an_unfinished_character_is_told_at_the_end(tokenizer: Any) -> None:
    one = TextStream(tokenizer)
    tokens = tokenizer("a😀", add_special_tokens=False).input_ids
    for token in tokens[:-1]:
        one.feed(token)
    assert one.text == "a"
    assert one.close().startswith("a\ufffd")


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("and",), "a few words, 12 ½ € "),
        (("words, 13", "12 ½ €"), "a few words, "),
        (("\nmore", "then\nmo"), "a few words, 12 ½ € and 字, 😀 "),
        (("a few",), ""),
    ],
)
def test_the_answer_ends_before_the_first_stop_text(
    tokenizer: Any, stops: tuple[str, ...], expected: str
) -> None:
    told, whole, stopped = stream(tokenizer, TEXT, *stops)
    assert stopped
    assert whole == expected
    assert not any(stop in "".join(told) for stop in stops)


def test_what_only_began_like_a_stop_text_is_told(tokenizer: Any) -> None:
    told, whole, stopped = stream(tokenizer, "words wor", "wordy", "worst", "")
    assert (whole, stopped) == ("words wor", False)
    assert told[-1] == "wor"


def test_special_tokens_are_kept_where_asked_for(tokenizer: Any) -> None:
    tokens = [2, *tokenizer("a few", add_special_tokens=False).input_ids, 2]
    for keep, expected in ((False, "a few"), (True, "<pad>a few<pad>")):
        one = TextStream(tokenizer, keep_special_tokens=keep)
        assert not any(one.feed(token) for token in tokens)
        assert one.close() == expected
