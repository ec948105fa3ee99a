"""Streams text token by token: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["TextStream"]

_INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose last bytes are to come
_WINDOW = 8  # tokens that are decoded with the new ones, which decides about spaces


class TextStream:
    """The text of one answer.

    A token may be half a character, and the beginning of a stop text may turn out to be one:
    such an end of the text is held back until it is decided.

    Args:
        tokenizer: of transformers.
        stop_texts: the answer ends before the first of them.
        write: called with the text, piece by piece; None for no one.
        keep_special_tokens: special tokens are text.

    Attributes:
        text: what has been written.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_texts: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
        keep_special_tokens: bool = False,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop_texts = [text for text in stop_texts if text]
        self._write = write
        self._skip_special_tokens = not keep_special_tokens
        self._tokens: list[int] = []
        self._decided = 0  # tokens whose text is complete
        self._held = ""

    def feed(self, token: int) -> bool:
        """Add a token; True once a stop text has come."""
        self._tokens.append(token)
        context = self._tokens[max(0, self._decided - _WINDOW) : self._decided]
        before, after = self._decode(context), self._decode(context + self._undecided())
        if after.endswith(_INCOMPLETE):
            return False
        self._decided = len(self._tokens)
        return self._take(after[len(before) :])

    def close(self) -> str:
        """Write what was held back, and return the whole text."""
        if self._decided < len(self._tokens):
            self._take(self._decode(self._undecided()))
        self._tell(self._held)
        self._held = ""
        return self.text

    def _undecided(self) -> list[int]:
        return self._tokens[self._decided :]

    def _take(self, new: str) -> bool:
        held = self._held + new
        found = [at for stop in self._stop_texts if (at := held.find(stop)) >= 0]
        if found:
            self._tell(held[: min(found)])
            self._held = ""
            return True
        keep = max((_begun(held, stop) for stop in self._stop_texts), default=0)
        self._tell(held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        return False

    def _tell(self, text: str) -> None:
        self.text += text
        if text and self._write is not None:
            self._write(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(
            tokens,
            skip_special_tokens=self._skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return decoded


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
