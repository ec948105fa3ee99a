"""Writes conversations with the chat template, and finds what the assistant says in the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.chat.outlines import Outlines
from megatron.mimo.data.chat.spans import Span, without_thinking
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn

__all__ = ["PROBE", "ChatText", "refuse_marks"]

PROBE = "Probe7Answer"  # stands for an answer; templates write it unchanged
_TAILS = 1024  # texts behind an answer that are remembered, by the roles of the turns


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatText:
    """Writes conversations with a processor's chat template.

    Where an answer ends follows from what the template writes behind one, which a probe answer
    shows. A template that writes no token there (LLaVA's) gets the model's own end.

    Attributes:
        processor: of Hugging Face, with a fast tokenizer.
        end_tokens: ids that end an answer as the model's generation configuration says.
        marks: texts of the tokens that stand for media; other text may not hold them.
        outlines: of its template.
    """

    processor: Any
    end_tokens: Sequence[int]
    marks: Iterable[str]
    outlines: Outlines
    _tails: dict[tuple[Any, ...], str] = field(default_factory=dict, init=False, repr=False)

    def asked(self, conversation: Conversation) -> str:
        """A conversation up to where the assistant begins to speak.

        Raises:
            InputError: the template refuses it, or leaves something out; a text holds a mark.
        """
        messages = self._messages(conversation)
        self._refuse_unwritten(conversation, messages)
        return self.rendered(conversation, messages, asks=True)

    def answered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The whole text, and the spans (first, end) of it that are learned.

        Raises:
            InputError: as ``asked``; the template writes what was said before an answer
                differently behind it.
            ConfigError: neither the template nor the model has an end of an answer.
        """
        messages = self._messages(conversation)
        self._refuse_unwritten(conversation, messages)
        render = partial(self.rendered, conversation)
        beginning = self.outlines.beginnings(messages, render, uses_tools=bool(conversation.tools))
        text, raw, added = "", "", ""
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = beginning(number, True), beginning(number + 1, False)
            is_rewritten = not asked.startswith(raw)
            if not answered.startswith(asked) or (is_rewritten and (spans or added)):
                raise InputError(
                    f"{conversation.name}, message {number}: the chat template writes the turns "
                    "before it differently once the assistant has answered, so that what it says "
                    "cannot be told apart; learn the last answer alone with --learn last, leave "
                    "out what it thought with --thinking drop, or give each answer as a "
                    "conversation of its own"
                )
            if is_rewritten:  # as templates do that forget thoughts; nothing of it was learned
                text, raw = "", ""
            following = asked[len(raw) :]
            if added and following.lstrip().startswith(added):  # the template has it between turns
                following = following.lstrip().removeprefix(added)
            text += following
            start = len(text)
            body = answered[len(asked) :]
            tail = self._tail_of(conversation, messages[: number + 1], body)
            length = self._end_in(tail)
            if length is None:
                added, text = self.own_end, (text + body).rstrip()
                text += "" if text.endswith(added) else added
                stop = len(text)
            else:
                if not body.endswith(tail):
                    raise InputError(
                        f"{conversation.name}, message {number}: the chat template ends this "
                        f"answer with {body[-40:]!r} and others with {tail!r}, so that its end "
                        "cannot be told apart; shorten it to plain text"
                    )
                text += body
                stop, added = len(text) - len(tail) + length, ""
            turn = conversation.turns[number]
            if turn.is_learned:
                span = start, stop
                spans += [span] if turn.learns_thinking else without_thinking(text, span)
            raw = answered
        return text, spans

    @cached_property
    def turn_end(self) -> int | None:
        """The token with which the template ends an answer; None where it writes none."""
        hello = Turn(role="user", content=(ContentPart(kind="text", value="Hello"),))
        greeting = Conversation(name="a greeting", turns=(hello,))
        try:
            tail = self._tail(greeting, self._messages(greeting))
        except InputError:  # of a template that wants more than that
            return None
        length = self._end_in(tail)
        if length is None:
            return None
        ends = [end for end in self._ends if tail[:length].endswith(end)]
        token: int = self.processor.tokenizer.convert_tokens_to_ids(max(ends, key=len))
        return token

    def _tail_of(
        self, conversation: Conversation, messages: Sequence[Mapping[str, Any]], body: str
    ) -> str:
        """What the template writes behind the last of these messages, an answer.

        What it wrote behind an earlier answer to the same roles is taken again, without another
        rendering, if this answer ends with its own text and then with that.

        Args:
            conversation: to which they belong.
            messages: up to the answer.
            body: the answer as the template writes it.
        """
        key = (bool(conversation.tools), *(message["role"] for message in messages))
        known, parts = self._tails.get(key), messages[-1]["content"]
        said = parts[-1].get("text", "").rstrip() if parts else ""
        if known is not None and said and body.endswith(known):
            before = body.removesuffix(known).rstrip()
            if before.endswith(said):
                return known
        tail = self._tail(conversation, messages[:-1])
        if len(self._tails) < _TAILS:
            self._tails[key] = tail
        return tail

    def _tail(self, conversation: Conversation, before: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes behind an answer to these messages."""
        probe = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        text = self.rendered(conversation, [*before, probe], asks=False)
        at = text.rfind(PROBE)
        if at < 0:
            raise InputError(
                f"{conversation.name}: the chat template does not write what the assistant says; "
                "put another chat_template.jinja beside the tokenizer"
            )
        return text[at + len(PROBE) :]

    def _end_in(self, tail: str) -> int | None:
        """Length of ``tail`` up to the token that ends the answer, included; None without one."""
        model_ends = _texts(self.processor.tokenizer, self._model_end_ids)
        for ends in (model_ends, self._ends):  # the model's own count first
            found = [(tail.find(end), -len(end)) for end in ends if end in tail]
            if found:
                at, length = min(found)
                return at - length
        return None

    @cached_property
    def _model_end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the generation configuration's, and the tokenizer's."""
        own = self.processor.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*self.end_tokens, *([] if own is None else [own])]))

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """Texts of all tokens that may end an answer: added tokens that stand for no medium."""
        added = [str(token) for token in self.processor.tokenizer.added_tokens_decoder.values()]
        known = dict.fromkeys([*_texts(self.processor.tokenizer, self._model_end_ids), *added])
        marks = set(self.marks)
        return tuple(text for text in known if text and text.strip() and text not in marks)

    @cached_property
    def own_end(self) -> str:
        """The end of an answer where the template writes none: the tokenizer's, if the model stops
        there, else the first of the generation configuration.

        Raises:
            ConfigError: there is none.
        """
        own = self.processor.tokenizer.eos_token_id
        ends = self.end_tokens or ([] if own is None else [own])
        texts = _texts(self.processor.tokenizer, [own] if own in ends else ends)
        if not texts:
            raise ConfigError(
                "neither the chat template nor the tokenizer nor generation_config.json has a "
                "token that ends an answer, so that the model could not learn to stop; name one "
                "as eos_token in tokenizer_config.json"
            )
        return texts[0]

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages that chat templates take; media are named in them, and read elsewhere."""
        for turn in conversation.turns:
            for part in turn.content:
                refuse_marks(part, self.marks, conversation.name, turn.role)
        return [
            {
                "role": turn.role,
                "content": [_described(part) for part in turn.content],
                **turn.fields,
            }
            for turn in conversation.turns
        ]

    def _refuse_unwritten(
        self, conversation: Conversation, messages: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse tools, calls and reasoning that the template leaves out."""

        def refuse(where: str, name: str) -> None:
            raise InputError(
                f"{where}: the chat template does not write {name!r}, which would be trained "
                "without; leave it out, or put a template that writes it beside the tokenizer"
            )

        if conversation.tools and messages:
            whole = self.rendered(conversation, messages, asks=False)
            without = self.rendered(conversation, messages, asks=False, tools=())
            if whole == without:
                refuse(conversation.name, "tools")
        for number, turn in enumerate(conversation.turns):
            for name in turn.fields:
                if name == "tool_call_id" or (name == "name" and turn.role == "tool"):
                    continue  # they join a call with its result, which stands where it belongs
                until = messages[: number + 1]
                less = {key: value for key, value in until[-1].items() if key != name}
                written = self.rendered(conversation, until, asks=False)
                if written == self.rendered(conversation, [*until[:-1], less], asks=False):
                    refuse(f"{conversation.name}, message {number}", name)

    def rendered(
        self,
        conversation: Conversation,
        messages: Sequence[Any],
        *,
        asks: bool,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Messages as the template writes them.

        Args:
            conversation: whose name errors begin with, and whose tools are offered.
            messages: of it.
            asks: up to where the assistant begins to speak.
            tools: in place of the conversation's.

        Raises:
            InputError: the template refuses them.
        """
        tools = conversation.tools if tools is None else tools
        try:
            text: str = self.processor.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=asks,
                **({"tools": list(tools)} if tools else {}),
            )
        except Exception as error:  # jinja's, and whatever a template raises
            raise InputError(
                f"{conversation.name}: the chat template refuses it: "
                f"{type(error).__name__}: {error}"
            ) from error
        return text


def _texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    return [str(text) for text in tokenizer.convert_ids_to_tokens([*tokens]) if text]


def _described(part: ContentPart) -> dict[str, str]:
    """A part as chat templates read it; the media are read elsewhere."""
    return {"type": "text", "text": part.value} if part.kind == "text" else {"type": part.kind}


def refuse_marks(part: ContentPart, marks: Iterable[str], name: str, role: str) -> None:
    """Refuse a text that holds what stands for a medium.

    Raises:
        InputError: it does.
    """
    found = [mark for mark in marks if part.kind == "text" and mark in part.value]
    if found:
        raise InputError(
            f"{name}: a text of the {role} holds {found[0]!r}, which stands for a medium in this "
            "model; leave it out, and give the medium itself: as a part of the message, or with a "
            "flag such as --image"
        )
