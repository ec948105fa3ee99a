"""Labels of a text in which the processor has replaced the marks of media.

A mark becomes placeholders, and with some models text around them: tags, "Frame1:", time stamps,
new lines that the tokenizer joins with those before. None of it is learned.

Legend: L tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.mimo.data.chat.text import Span

__all__ = ["ExpandedText", "Replaced", "split_text"]

# Entries of a processor's result that the model does not take.
_OFFSETS, _REPLACED, _UNUSED = "offset_mapping", "text_replacement_offsets", "mm_token_type_ids"


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """One medium of a text.

    Attributes:
        mark: what stood for it.
        by: what stands there now.
        before: where the mark stood, first and end, in the text before.
        after: where ``by`` stands in the text with the media.
    """

    mark: str
    by: str
    before: Span
    after: Span


@dataclass(frozen=True, kw_only=True)
class ExpandedText:
    """Where the tokens of a text are, once its media have been put in.

    Attributes:
        offsets: first and end of every token; equal where a token stands for no text.
        replaced: its media, in order.
    """

    offsets: Sequence[Span]
    replaced: Sequence[Replaced]

    def is_said(self, text: str, spans: Sequence[Span]) -> Tensor:
        """Bool [L]: which tokens lie within ``spans`` and belong to no medium.

        A token may begin with the white space before a span.

        Args:
            text: before the media were put in.
            spans: first and end, in ``text``.
        """
        moved = [(self._moved(first), self._moved(end)) for first, end in spans]
        flat = np.fromiter(chain.from_iterable(self.offsets), np.int64, 2 * len(self.offsets))
        starts_L, stops_L = flat.reshape(-1, 2).T
        said_L = np.zeros(len(starts_L), dtype=bool)
        for first, end in moved:
            within_L = (first < stops_L) & (stops_L <= end)
            for at in np.flatnonzero(within_L & (starts_L < first)):
                within_L[at] = not self._whole(text)[starts_L[at] : first].strip()
            said_L |= within_L
        for one in self.replaced:
            said_L &= (starts_L >= one.after[1]) | (stops_L <= one.after[0])
        return torch.from_numpy(said_L)

    def _whole(self, text: str) -> str:
        """The text with its media."""
        pieces, last = [], 0
        for one in self.replaced:
            pieces += [text[last : one.before[0]], one.by]
            last = one.before[1]
        return "".join([*pieces, text[last:]])

    def _moved(self, at: int) -> int:
        """A place in the text before media were put in, as a place in the text after it."""
        return at + sum(len(one.by) - len(one.mark) for one in self.replaced if one.before[1] <= at)


def split_text(features: Mapping[str, Any]) -> tuple[dict[str, Tensor], ExpandedText]:
    """A processor's result for one text: the model's arguments, and where the tokens are.

    Args:
        features: of a call for one text with ``return_offsets_mapping`` and
            ``return_text_replacement_offsets``.
    """
    # Of a processor without media of its own kinds there are none.
    replaced = [one for of_text in features.get(_REPLACED, ()) for one in of_text]
    expanded = ExpandedText(
        offsets=features[_OFFSETS][0],
        replaced=[
            Replaced(
                mark=one["text"], by=one["replacement"], before=one["span"], after=one["new_span"]
            )
            for one in replaced
        ],
    )
    aside = (_OFFSETS, _REPLACED, _UNUSED)
    given = {name: value for name, value in features.items() if name not in aside}
    return {name: _tensor(value) for name, value in given.items()}, expanded


def _tensor(value: Any) -> Tensor:
    """NumPy reads lists of numbers several times faster than torch does."""
    return torch.as_tensor(np.asarray(value) if isinstance(value, list) else value)
