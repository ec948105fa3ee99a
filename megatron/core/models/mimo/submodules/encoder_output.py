"""What an encoder returns, as rows. Legend: N rows, B samples, S positions of one, H features."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import unwrap_model

_LAYOUTS = ("bsh", "sbh")


def levels_of(module: nn.Module | None) -> int:
    """Further levels of its rows that an encoder, or the module of a modality, says it gives."""
    levels: int = getattr(unwrap_model(module), "num_levels", 0)
    return levels


def _call(name: str, encoder: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return encoder(**inputs)
    except (TypeError, IndexError, AttributeError, RuntimeError) as error:
        # memory, devices and process groups have kinds of their own
        plain = type(error) in (TypeError, IndexError, RuntimeError)
        if not plain and all(torch.is_tensor(value) for value in inputs.values()):
            raise
        given = ", ".join(f"{key} {_described(value)}" for key, value in inputs.items())
        raise InputError(
            f"Encoder '{name}' ({type(encoder).__name__}) cannot compute its rows from "
            f"{given or 'no inputs'}: {type(error).__name__}: {error}"
        ) from error


def _described(value: Any) -> str:
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def run_encoder(name: str, encoder: nn.Module, inputs: Mapping[str, Any]) -> Encoded:
    """Call an encoder with its inputs: rows [N, H], with their levels where it gives any.

    Raises:
        InputError: inputs that it does not take, an output that is not rows, or another number of
            levels than it declares.
    """
    output = _call(name, encoder, inputs)
    if not isinstance(output, EncodedRows):
        if isinstance(output, tuple) and output:
            output = output[0]
        encoded = EncodedRows(rows_NH=as_rows(name, encoder, output))
    else:
        encoded = output.map(lambda tensor: as_rows(name, encoder, tensor))
    if len(encoded.levels) != levels_of(encoder):
        raise InputError(
            f"encoder '{name}' gave {len(encoded.levels)} levels of its rows, and its num_levels "
            f"is {levels_of(encoder)}; set num_levels to what it gives, and return them in an "
            "EncodedRows"
        )
    return encoded.simplest()


def run_stage(
    name: str, encoder: nn.Module, inputs: Mapping[str, Any], hidden: torch.Tensor | None
) -> torch.Tensor:
    """Call an encoder's pipeline stage: its output as it is, which the next stage is given.

    A stage behind the first takes ``hidden``: by ``set_input_tensor``, as Megatron's modules do,
    and as the argument ``hidden_states``; other arguments that its forward requires are None.

    Args:
        name: name of the encoder.
        encoder: its stage on this rank.
        inputs: inputs, on the first stage.
        hidden: what the stage before has given; None on the first stage.

    Raises:
        InputError: an output that is not one tensor.
    """
    bare: Any = unwrap_model(encoder)
    if hidden is not None:
        parameters = signature(bare.forward).parameters
        inputs = {
            key: None
            for key, one in parameters.items()
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        }
        if "hidden_states" in parameters:
            inputs = {**inputs, "hidden_states": hidden}
        if hasattr(bare, "set_input_tensor"):
            bare.set_input_tensor(hidden)
    output = _call(name, encoder, inputs)
    if isinstance(output, tuple) and output:
        output = output[0]
    if not torch.is_tensor(output):
        raise InputError(
            f"a stage of encoder '{name}' gave {type(output).__name__}; expected the tensor that "
            "the next stage takes"
        )
    return output


def as_rows(name: str, encoder: nn.Module, output: Any) -> torch.Tensor:
    """An encoder's output as rows [N, H]."""
    if not torch.is_tensor(output) or output.dim() not in (2, 3):
        got = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
        raise InputError(
            f"Encoder '{name}' output {got} is not supported; expected a tensor [rows, hidden] "
            "or [batch, sequence, hidden], or a tuple that starts with one"
        )
    if output.dim() == 2:
        return output
    default = "sbh" if isinstance(encoder, TransformerBlock) else "bsh"
    layout = getattr(encoder, "output_layout", default)
    if layout not in _LAYOUTS:
        raise ConfigError(
            f"Encoder '{name}' has output_layout {layout!r}; expected one of {list(_LAYOUTS)}"
        )
    if layout == "sbh":
        output = output.transpose(0, 1)
    rows_NH: torch.Tensor = output.reshape(-1, output.size(-1))
    return rows_NH
