"""The text of a document: its texts and media in order, without turns or a chat template."""

from __future__ import annotations

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.spans import Span
from megatron.mimo.data.chat.text import PROBE, ChatText, refuse_marks
from megatron.mimo.data.conversation import Conversation, Document

__all__ = ["document_text"]


def document_text(document: Document, chat: ChatText) -> tuple[str, list[Span]]:
    """The text of a document, and the spans (first, end) of it that are learned, its end included.

    Media stand as the chat template writes them in a question. The end is the tokenizer's token
    for it or, where it has none, the one that ends an answer.

    Raises:
        InputError: a text holds a mark; the processor has no token for a medium.
        ConfigError: there is no token that ends a text.
    """
    text, spans = "", list[Span]()
    for part in document.content:
        if part.kind != "text":
            text += _medium(part.kind, document, chat)
            continue
        refuse_marks(part, chat.marks, document.name, "document")
        spans.append((len(text), len(text) + len(part.value)))
        text += part.value
    if not document.ends:
        return text, spans
    end = chat.processor.tokenizer.eos_token or chat.own_end
    return text + end, [*spans, (len(text), len(text) + len(end))]


def _medium(kind: str, document: Document, chat: ChatText) -> str:
    """What the template writes for a medium between two texts; its token, where it writes media
    elsewhere.
    """
    around = {"type": "text", "text": PROBE}
    question = {"role": "user", "content": [around, {"type": kind}, around]}
    probe = Conversation(name=document.name, turns=())
    pieces = chat.rendered(probe, [question], asks=False).split(PROBE)
    if len(pieces) == 3 and any(mark in pieces[1] for mark in chat.marks):
        return pieces[1]
    token = getattr(chat.processor, f"{kind}_token", None)
    if token is None:
        raise InputError(
            f"{document.name}: holds {kind}, for which the {type(chat.processor).__name__} has no "
            "token; give it as a conversation"
        )
    return str(token)
