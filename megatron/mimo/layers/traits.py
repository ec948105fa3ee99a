"""What layers of a language model have that megatron-core has no setting for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerTraits"]


@dataclass(frozen=True, kw_only=True)
class LayerTraits:
    """Of all layers of a language model.

    Attributes:
        output_bias: the projection behind attention has a bias; None: as all linear layers.
        sees_spans: tokens of one span, such as those of an image, see each other.
        sandwich_norms: what attention and feed-forward add is normed before it is added.
        rotary_kinds: how many kinds of angles there are, see ``RotaryAngles``.
        rotary_kind: which of them a layer takes, by its number from 0; () for the first.
        rotary_factors: of sines and cosines, of each kind; () for 1.
    """

    output_bias: bool | None = None
    sees_spans: bool = False
    sandwich_norms: bool = False
    rotary_kinds: int = 1
    rotary_kind: tuple[int, ...] = ()
    rotary_factors: tuple[float, ...] = ()

    def kind_of_layer(self, layer: int) -> int:
        """The kind of angles of a layer, counted from 0 over the whole model."""
        return self.rotary_kind[layer] if self.rotary_kind else 0

    def factor_of_layer(self, layer: int) -> float:
        """The factor of its sines and cosines."""
        return self.rotary_factors[self.kind_of_layer(layer)] if self.rotary_factors else 1.0
