"""What the encoders of one modality give. Legend: N rows of the modality, H features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.core.models.mimo.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Rows of one modality and, for models with deepstack, further levels of the same rows.

    A row takes one position of the sequence. What level l has for a row is added to the hidden
    state at that position, as decoder layer l gives it. An encoder whose layers give no levels
    may return the tensor of its rows alone; everywhere a tensor stands for rows without levels.

    Attributes:
        rows_NH: [N, H].
        levels: tensors [N, H_level], level 0 first; projected, they have the width of the rows.

    Raises:
        InputError: a level of another number of rows or another dtype.
    """

    rows_NH: torch.Tensor
    levels: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        rows = self.rows_NH
        for number, level in enumerate(self.levels):
            if level.shape[:-1] != rows.shape[:-1] or level.dtype != rows.dtype:
                raise InputError(
                    f"level {number} of encoded rows is {level.dtype} {list(level.shape)}, and the "
                    f"rows are {rows.dtype} {list(rows.shape)}; expected as many rows, of one dtype"
                )

    @classmethod
    def of(cls, encoded: Encoded) -> EncodedRows:
        """Rows as an ``EncodedRows``; a tensor has no levels."""
        return encoded if isinstance(encoded, EncodedRows) else cls(rows_NH=encoded)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows and every level."""
        return (self.rows_NH, *self.levels)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.rows_NH.size(0)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> EncodedRows:
        """The same change made to the rows and to every level."""
        return EncodedRows(rows_NH=change(self.rows_NH), levels=tuple(map(change, self.levels)))

    def simplest(self) -> Encoded:
        """The tensor of rows where there are no levels, as scripts for stock MIMO expect."""
        return self if self.levels else self.rows_NH


Encoded = torch.Tensor | EncodedRows
