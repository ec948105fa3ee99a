"""Which ranks run which module of a model: components, their process grids, a drawing."""

from megatron.mimo.topology.components import (
    AXES,
    LANGUAGE,
    Component,
    check_components,
    parse_component,
)
from megatron.mimo.topology.drawing import draw
from megatron.mimo.topology.grids import Grids, build_grids

__all__ = [
    "AXES",
    "LANGUAGE",
    "Component",
    "Grids",
    "build_grids",
    "check_components",
    "draw",
    "parse_component",
]
