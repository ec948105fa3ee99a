"""What a data set yields: one conversation as token ids, plus the media that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaItem:
    """One image (or clip, or recording) of a sample.

    Attributes:
        modality: name of the modality, as in ``MimoModelConfig.special_token_ids``.
        encoder: name of the encoder that takes ``inputs``.
        inputs: the encoder's keyword arguments, without a batch dimension.
        rows: embedding rows that the encoder yields for this item; the sample has as many
            placeholder tokens for it.
    """

    modality: str
    encoder: str
    inputs: Mapping[str, Tensor]
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One training example, or a prompt to continue.

    Attributes:
        name: says which sample it is in error messages ("digits/train/17").
        token_ids: int64 [length]; every media item already stands as ``rows`` placeholder tokens.
        is_label: bool [length]; True where the model has to predict this token. The flag of the
            first token has no effect, as nothing precedes it.
        media: the items in the order of their placeholders.
        position_ids: int64 [length], or [3, length] for multimodal RoPE (see
            ``positions.grid_positions``); None for 0, 1, 2 and so on.
        cut_turns: turns (of a document, pieces of text) that were cut away, so that it fits.
    """

    name: str
    token_ids: Tensor
    is_label: Tensor
    media: tuple[MediaItem, ...] = ()
    position_ids: Tensor | None = None
    cut_turns: int = 0

    def prompt(self) -> Sample:
        """The sample up to its first label: what generation starts from."""
        labels = torch.nonzero(self.is_label)
        length = int(labels[0]) if len(labels) else len(self.token_ids)
        positions = self.position_ids
        return replace(
            self,
            token_ids=self.token_ids[:length],
            is_label=self.is_label[:length],
            position_ids=None if positions is None else positions[..., :length],
        )
