"""The beginnings of a conversation are what the template writes for them, at one rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.chat.outlines import Outlines
from megatron.mimo.recipes.tiny import processors
from tests.unit.mimo.data.chats import chat_of, talk, with_template

FAMILIES = [name.removesuffix("_processor") for name in processors.__all__]
BOUND = "<turn>{{ m['role'] }}:{% for p in m['content'] %}"
ASKED = "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
LOOP = f"{{% for m in messages %}}{BOUND}{{{{ TEXT }}}}{{% endfor %}}</turn>{{% endfor %}}{ASKED}"
HINT = "{% if '/no_think' in messages[-1].content[0].text %}<think>{% endif %}"
TEMPLATES = {
    "looks for a mark": (LOOP.replace("TEXT", "p['text']") + HINT, 4),
    "plain": (LOOP.replace("TEXT", "p['text']"), 1),
    "trims": (LOOP.replace("TEXT", "p['text'] | trim"), 1),
    "changes": (LOOP.replace("TEXT", "p['text'] | upper"), 4),
    "reads": (LOOP.replace("TEXT", "p['text'] + ('!' if 'not' in p['text'] else '')"), 4),
    "refuses": (LOOP.replace("TEXT", "p['text'] if ' ' in p['text'] else none + 1"), 4),
    "forgets": (LOOP.replace("TEXT", "p['text'][: 99 if m == messages[-1] else 3]"), 4),
}


def told(*texts: str, media: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A system's turn, then those of user and assistant; media stand in the first of the user's."""
    roles = ["system", *(["user", "assistant"] * len(texts))]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(roles, texts, strict=False)
    ]
    messages[1]["content"] = [*({"type": kind} for kind in media), *messages[1]["content"]]
    return messages


class Counted:
    """Has a template write messages, and counts."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self.times = chat, 0

    def __call__(self, messages: Sequence[Mapping[str, Any]], /, *, asks: bool) -> str:
        self.times += 1
        text: str = self._chat.text.rendered(talk(), messages, asks=asks)
        return text


def fresh(chat: Chat) -> tuple[Chat, Outlines]:
    return chat, Outlines(chat.processor.chat_template)


def renderings(chat: Chat, outlines: Outlines, messages: list[dict[str, Any]]) -> int:
    """How often the template is asked for the beginnings of which answers are told; each is as
    the template writes it."""
    render, plain = Counted(chat), Counted(chat)
    beginning = outlines.beginnings(messages, render, uses_tools=False)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            assert beginning(number, True) == plain(messages[:number], asks=True)
            assert beginning(number + 1, False) == plain(messages[: number + 1], asks=False)
    return render.times


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_families_are_asked_once(name: str) -> None:
    chat, outlines = fresh(chat_of(name))
    media = [
        kind for kind in ("image", "video", "audio") if hasattr(chat.processor, f"{kind}_token")
    ]
    renderings(chat, outlines, told("Be brief.", "What?", "A cat.", "Where?", "Here.", media=media))
    for texts in (
        ("You see.", "And <b>this</b>?\n\nOr {{ that }}?", "I'm no cat", "é?", "<turn> 7 \\n"),
        ("x", "Probe0Text", "Probe2Text or Probe1Text", "?", "Probe7Answer"),
    ):
        assert renderings(chat, outlines, told(*texts, media=media)) == 1
    assert renderings(chat, outlines, told("S", "U", "A", "U", " \nwhite space ", media=media)) <= 4


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_do_more_with_texts_are_asked_each_time(name: str) -> None:
    template, times = TEMPLATES[name]
    chat, outlines = fresh(with_template(template))
    renderings(chat, outlines, told("Be brief .", "Why not ?", "A cat .", "Where ?", "Here ."))
    texts = ("Be good .", "Is it not /no_think ?", " It is a dog .\n", "And here ?", " It is not .")
    assert renderings(chat, outlines, told(*texts)) == times


def test_what_is_refused_is_refused() -> None:
    chat, outlines = fresh(with_template("{{ raise_exception('no roles') }}"))
    with pytest.raises(InputError, match="the chat template refuses it: TemplateError: no roles"):
        outlines.beginnings(told("a", "b", "c"), Counted(chat), uses_tools=False)


def test_tools_and_calls_are_rendered() -> None:
    template = LOOP.replace("TEXT", "p['text'] + (m.reasoning_content or '')")
    chat, outlines = fresh(with_template(template))
    messages = told("Be brief.", "What?", "A cat.", "Where?", "Here.")
    assert renderings(chat, outlines, messages) > 4
    assert renderings(chat, outlines, messages) == 1
    messages[2]["reasoning_content"] = "I see fur."
    assert renderings(chat, outlines, messages) == 4
