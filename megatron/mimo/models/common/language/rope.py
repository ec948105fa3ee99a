"""Rotary frequencies of the kinds that transformers has, from a configuration's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.mimo.layers.rotary import Frequencies
from megatron.mimo.models.common.language.kinds import head_size, kind_of, refuse

__all__ = ["ROPE_KINDS", "check_rope", "frequencies", "rope_by_layer"]

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_by_layer(text: Any) -> tuple[tuple[Mapping[str, Any], ...], tuple[int, ...]]:
    """The parameters of each kind of rotary embedding, and the kind of every layer; () for one."""
    rope = text.rope_parameters
    if not kind_of(text).rope_by_layer_type:
        return (rope,), ()
    types = sorted(set(text.layer_types))
    return tuple(rope[one] for one in types), tuple(types.index(one) for one in text.layer_types)


def check_rope(text: Any, rope: Mapping[str, Any]) -> None:
    """Refuse parameters that no language model here, or none of transformers, can follow."""
    kinds = ("default",) if kind_of(text).mrope else ROPE_KINDS
    if rope.get("rope_type") not in kinds:
        refuse("rope_type", rope.get("rope_type"), " or ".join(map(repr, kinds)))
    partial = rope.get("partial_rotary_factor", 1.0)
    if rope["rope_type"] != "default" and partial != 1.0:  # which the default kind does not read
        refuse("partial_rotary_factor", partial, "1.0: its model in transformers turns whole heads")


def frequencies(text: Any, rope: Mapping[str, Any]) -> Frequencies:
    """Frequencies of one kind of rotary embedding.

    Args:
        text: configuration of the language model.
        rope: the kind's parameters, as ``check_rope`` passes them.
    """
    channels, kind = head_size(text), rope["rope_type"]
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels
    turns = rope["rope_theta"] ** exponents
    inverse, factor, longest = 1.0 / turns, 1.0, None
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "dynamic":  # which scales texts beyond this length only
        longest = text.max_position_embeddings
    elif kind == "llama3":
        inverse = _llama3(inverse, rope)
    elif kind == "yarn":
        inverse, factor = _yarn(turns, rope, text), _yarn_factor(rope, text)
    return Frequencies(inverse=tuple(inverse.tolist()), factor=factor, longest=longest)


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Low frequencies divided by a factor, high ones unchanged, a blend of both in between."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    turns = trained * inverse / (2 * math.pi)  # in a text of the length it was trained with
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inverse * share + inverse / factor * (1 - share)


def _yarn(turns: Tensor, rope: Mapping[str, Any], text: Any) -> Tensor:
    """As llama3, but the blend is a ramp over the channels."""
    channels, base = 2 * len(turns), rope["rope_theta"]
    trained = rope["original_max_position_embeddings"]

    def channel(rotations: float) -> float:
        """The channel pair that turns so often in a text of the length it was trained with."""
        length = math.log(trained / (rotations * 2 * math.pi))
        return channels * length / (2 * math.log(base))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if text.rope_parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    ramp = (torch.arange(len(turns), dtype=torch.float32, device="cpu") - low) / (
        (high - low) or 0.001
    )
    share = 1 - ramp.clamp(0.0, 1.0)
    return (1.0 / (_yarn_scale(rope, text) * turns)) * (1 - share) + (1.0 / turns) * share


def _yarn_scale(rope: Mapping[str, Any], text: Any) -> float:
    scale: float | None = rope["factor"]
    if scale is None:
        scale = text.max_position_embeddings / rope["original_max_position_embeddings"]
    return scale


def _yarn_factor(rope: Mapping[str, Any], text: Any) -> float:
    """What sines and cosines are multiplied by."""
    given: float | None = rope.get("attention_factor")
    if given is not None:
        return given
    scale = _yarn_scale(rope, text)

    def grown(by: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    one, all_channels = rope.get("mscale"), rope.get("mscale_all_dim")
    return grown(one) / grown(all_channels) if one and all_channels else grown(1.0)
