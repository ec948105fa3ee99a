"""Images of any resolution, cut into tiles of one size, and the order of their rows.

An image gives the rows of several tiles. The rows that the language model reads are arranged from
them after the projection: tiles side by side, without those of padding, and a learned row at the
end of every line.

Legend: N rows of all tiles, I input width, H output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

__all__ = ["NEWLINE", "AnyResolutionSubmodules", "NewlineProjection"]

NEWLINE = -1  # in ``row_sources``: the learned row
_SOURCES = "row_sources"


class NewlineProjection(nn.Module):
    """A projector, and the row that ends lines.

    Args:
        config: of the language model.
        projector: spec of the module that projects rows.
    """

    def __init__(self, config: TransformerConfig, projector: ModuleSpec) -> None:
        super().__init__()
        self.projector = build_module(projector)
        self.newline = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        if config.perform_initialization:
            nn.init.normal_(self.newline, std=config.hidden_size**-0.5)

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N, I] -> [N, H]; the projector's."""
        rows_NH: Tensor = self.projector(rows_NI)
        return rows_NH


class AnyResolutionSubmodules(VisionModalitySubmodules):
    """The submodules of a modality whose data say how the rows of tiles make an image.

    It has one encoder, and a :class:`NewlineProjection`. Its inputs may have a further argument
    ``row_sources``, which the encoder does not get: for each image an int64 tensor with an entry
    for each row that the image gives, the number of the encoder's row among those of this image or
    ``NEWLINE``. Without it an image gives all rows and a newline.
    """

    def forward(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_states: Encoded | None = None,
    ) -> Encoded | None:
        """Rows [N, H] of all images; None where there is nothing to encode.

        Raises:
            InputError: not as many ``row_sources`` as images.
            UnsupportedError: ``hidden_states``, which tell nothing of images; an encoder that gives
                levels, which newlines do not have.
        """
        if hidden_states is not None:
            raise UnsupportedError(
                f"{type(self).__name__} takes no hidden_states: the rows of an image are known "
                "from encoder_inputs only; give these"
            )
        if not encoder_inputs:
            return super().forward(encoder_inputs)
        ((name, inputs),) = encoder_inputs.items()
        seen = {key: value for key, value in inputs.items() if key != _SOURCES}
        encoded = super().forward({name: seen})
        if encoded is None:
            return None
        if isinstance(encoded, EncodedRows):
            raise UnsupportedError(
                f"encoder {name!r} gives levels of its rows, and a newline has none; use an "
                "encoder without levels for images of any resolution"
            )
        rows_NH = encoded
        counts = unwrap_model(self.encoders[name]).rows_per_item(**seen)
        sources = inputs.get(_SOURCES)
        if sources is None:
            device = rows_NH.device
            newline_1 = torch.full((1,), NEWLINE, device=device)
            sources = [
                torch.cat([torch.arange(count, device=device), newline_1]) for count in counts
            ]
        if len(sources) != len(counts):
            raise InputError(
                f"{len(sources)} row_sources for {len(counts)} images; expected one for each"
            )
        newline_1H = unwrap_model(self.input_projections[0]).newline[None]
        return arrange(rows_NH, newline_1H, sources, counts)


def arrange(
    rows_NH: Tensor, newline_1H: Tensor, sources: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    """The rows of all images in the order that their ``sources`` say.

    Args:
        rows_NH: of all tiles of all images.
        newline_1H: the row that ends lines.
        sources: per image int64 [rows], numbers among its own rows or ``NEWLINE``.
        counts: rows in ``rows_NH`` of each image.
    """
    if not counts:
        return rows_NH
    end = len(rows_NH)
    starts = [0, *accumulate(counts)][:-1]
    index = torch.cat(
        [
            torch.where(source == NEWLINE, end, source + start)
            for source, start in zip(sources, starts, strict=True)
        ]
    )
    return torch.cat([rows_NH, newline_1H.to(rows_NH.dtype)]).index_select(0, index)
