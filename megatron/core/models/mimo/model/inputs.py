"""Checks of what a batch brings, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.errors import (
    ConfigError,
    InputError,
    PlaceholderMismatchError,
    UnsupportedError,
)
from megatron.core.models.mimo.model.build import accepts
from megatron.core.utils import unwrap_model

ModalityInputs = Mapping[str, Mapping[str, Mapping[str, Any]] | None]


def check_modality_names(modality_inputs: ModalityInputs | None, known: Iterable[str]) -> None:
    """Raise ``InputError`` for inputs of a modality that the model does not have."""
    known = list(known)
    for name in modality_inputs or {}:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"modality_inputs name {name!r}, but the model has the modalities {known}{hint}"
            )


def is_empty(inputs: Mapping[str, Mapping[str, Any]] | None) -> bool:
    """True where a modality's inputs hold no data: None, {}, or only what has no elements."""
    if not inputs:
        return True
    sizes = [
        value.numel() if torch.is_tensor(value) else len(value)
        for arguments in inputs.values()
        for value in arguments.values()
        if torch.is_tensor(value) or isinstance(value, list | tuple)
    ]
    return bool(sizes) and not any(sizes)


def check_encoder_order(
    expected: Mapping[str, tuple[str, ...]], submodules: torch.nn.ModuleDict
) -> None:
    """Raise ``InputError`` where a plan counts on another order of a modality's encoders."""
    for name, encoders in expected.items():
        got = tuple(unwrap_model(submodules[name]).encoders) if name in submodules else encoders
        if got != encoders:
            raise InputError(
                f"alignment_plan orders the rows of {name} by encoders {list(encoders)}, and the "
                f"model concatenates them in the order {list(got)}; give the collator the model's"
            )


def refuse_row_order(plan: AlignmentPlan, method: str) -> None:
    """Raise ``UnsupportedError`` where a method that sees no plan would put rows out of order."""
    if plan.encoders:
        raise UnsupportedError(
            f"alignment_plan orders the rows of {sorted(plan.encoders)} by encoder, and a script "
            f"replaced {method}, which gets no plan; give these modalities one encoder each, or "
            "do not replace the method"
        )


def check_count(modality: str, placeholders: int, rows: int) -> None:
    """Raise ``PlaceholderMismatchError`` unless every placeholder has a row and every row one."""
    if placeholders != rows:
        remedy = "the batch lacks inputs" if placeholders > rows else "the batch lacks placeholders"
        raise PlaceholderMismatchError(
            f"Number of {modality} tokens ({placeholders}) does not match number of {modality} "
            f"embeddings ({rows}); {remedy}, or they were cut apart: each placeholder token in "
            "input_ids takes exactly one row",
            modality=modality,
            placeholders=placeholders,
            rows=rows,
        )


def check_rows(modality: str, rows: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> None:
    """Raise ``InputError`` unless rows are [N, hidden_size] in the text embedding's dtype."""
    if rows.dim() != 2 or rows.size(1) != hidden_size:
        raise InputError(
            f"{modality} embeddings have shape {tuple(rows.shape)}; the language model's "
            f"hidden_size is {hidden_size}, so [N, {hidden_size}] is expected: let the "
            "projection end in that width"
        )
    if rows.dtype != dtype:
        raise InputError(
            f"{modality} embeddings are {rows.dtype} and text embeddings {dtype}; build encoder "
            "and language model with the same params_dtype, or cast in the projection"
        )


def require_token_id(modality: str, special_token_ids: Mapping[str, int]) -> None:
    """Raise ``ConfigError`` for a modality whose placeholder token is not known."""
    if modality not in special_token_ids:
        raise ConfigError(
            f"No special token ID defined for modality {modality}; special_token_ids has "
            f"{sorted(special_token_ids)}"
        )


def check_padding_mask(language_model: torch.nn.Module, padding_mask_BS: torch.Tensor) -> None:
    """Raise ``InputError`` for a mask that is not bool [B, S], or that the model does not take."""
    if padding_mask_BS.dtype != torch.bool or padding_mask_BS.dim() != 2:
        raise InputError(
            f"padding_mask is {padding_mask_BS.dtype} of shape {list(padding_mask_BS.shape)}; "
            "expected torch.bool [B, S], True where a token is padding"
        )
    model = unwrap_model(language_model)
    if not accepts(model.forward, "padding_mask"):
        raise InputError(
            f"padding_mask was given, and {type(model).__name__} does not take one; leave it out"
        )
