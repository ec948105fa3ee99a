"""The tokenizer of a model of parts: placeholders, padding, a chat template that shows media."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.convert.part_weights import Growth
from megatron.mimo.models.common.templates import LLAVA_TEMPLATE

__all__ = ["add_tokens", "chat_template"]

_MULTIPLE = 64  # what a vocabulary is rounded up to
# Stands before a template that takes texts only: messages become texts with placeholders in them.
_WITH_MEDIA = """\
{%- set shown = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set said.text = said.text + part['text'] -%}
{%- else -%}
{%- set said.text = said.text + '<' + part['type'] + '>' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set shown.messages = shown.messages + [{'role': message['role'], 'content': said.text}] -%}
{%- endfor -%}
{%- set messages = shown.messages %}
"""


def add_tokens(
    tokenizer: Any, placeholders: Mapping[str, str], vocab_size: int
) -> tuple[Growth, list[str]]:
    """Give a tokenizer the placeholders and a padding token, where it does not have them.

    Args:
        tokenizer: of transformers; changed.
        placeholders: token of each modality.
        vocab_size: rows of the language model's embedding.

    Returns:
        What becomes of these rows; what was done, for a human.
    """
    from transformers import AddedToken

    known = set(tokenizer.get_vocab())
    missing = [token for token in placeholders.values() if token not in known]
    # One that is a word of the vocabulary keeps its number; texts would be split into others.
    plain = [token for token in placeholders.values() if token not in tokenizer.get_added_vocab()]
    if plain:
        added = [AddedToken(token, special=True, normalized=False) for token in plain]
        tokenizer.add_tokens(added, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        if "<pad>" not in known:
            missing.append("<pad>")
    new = {token: tokenizer.convert_tokens_to_ids(token) for token in missing}
    needed = 1 + max(tokenizer.get_vocab().values())
    rows = vocab_size
    if needed > vocab_size:
        rows = -(-needed // _MULTIPLE) * _MULTIPLE
    growth = Growth(old_rows=vocab_size, rows=rows, tokens=tuple(new.values()))
    notes = []
    if new:
        listed = ", ".join(f"{token} ({number})" for token, number in new.items())
        notes.append(f"added to the tokenizer: {listed}")
    if new or rows != vocab_size:
        notes.append(
            f"the vocabulary has {rows} rows (the language model's {vocab_size}); those of new "
            "tokens are the mean of the old ones, in the embedding and in the output layer"
        )
    return growth, notes


def chat_template(tokenizer: Any, placeholders: Mapping[str, str]) -> tuple[str, list[str]]:
    """A chat template that writes one placeholder for each medium.

    The language model's own where it can do this; else the same with the media written into its
    texts; else one in LLaVA's manner.

    Args:
        tokenizer: of the language model, with the placeholders.
        placeholders: token of each modality.

    Returns:
        The template; what was done, for a human.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return LLAVA_TEMPLATE, ["chat template: LLaVA's (USER: ... ASSISTANT: ...)"]
    if _shows(tokenizer, own, placeholders):
        return own, []
    with_media = _WITH_MEDIA + own
    if _shows(tokenizer, with_media, placeholders):
        return with_media, ["chat template: the language model's, extended to show media"]
    return LLAVA_TEMPLATE, [
        "chat template: LLaVA's (USER: ... ASSISTANT: ...), for media cannot be written into the "
        "language model's"
    ]


def _shows(tokenizer: Any, template: str, placeholders: Mapping[str, str]) -> bool:
    from jinja2 import TemplateError

    parts = [{"type": token.strip("<>")} for token in placeholders.values()]
    question = "What is there?"
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError):
        return False
    # A list that is printed as it is has its keys in the text.
    words = [question, *placeholders.values()]
    return "'type'" not in text and all(text.count(word) == 1 for word in words)
