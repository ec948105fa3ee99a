"""Checks of what a batch brings, before anything is computed from it.

What lies on a device is checked by type and shape alone: reading it would wait for the device.
Legend: S sequence, B micro-batch, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from megatron.core.models.mimo.alignment import AlignmentPlan, EncodedRows
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import (
    ConfigError,
    InputError,
    PlaceholderMismatchError,
    UnsupportedError,
)
from megatron.core.models.mimo.signatures import accepts
from megatron.core.utils import unwrap_model

HeadTargets = Mapping[str, Mapping[str, torch.Tensor] | None]
ModalityInputs = Mapping[str, Mapping[str, Mapping[str, Any]] | None]

_INTEGERS = (torch.int64, torch.int32)


def check_tensors(**values: Any) -> None:
    """Raise ``InputError`` unless each argument, given by its name, is a tensor or None.

    A tensor has values of its own: none on the device ``meta``, which has shapes only, and none
    in a sparse layout.
    """
    for name, value in values.items():
        if value is not None and not torch.is_tensor(value):
            raise _other_type(name, value, "a tensor")
        if value is not None:
            _check_values(name, value)


def check_mappings(modality_inputs: Any, packing_kwargs: Any, indices: Any) -> None:
    """Raise ``InputError`` unless arguments of ``MimoModel.forward`` are mappings, or None."""
    names = ("modality_inputs", "packing_kwargs", "modality_token_indices")
    for name, value in zip(names, (modality_inputs, packing_kwargs, indices), strict=True):
        if value is not None and not isinstance(value, Mapping):
            raise _other_type(name, value, "a mapping")
    for name, index_N in (indices or {}).items():
        if not torch.is_tensor(index_N):
            raise _other_type(f"modality_token_indices[{name!r}]", index_N, "a tensor")
    for modality, encoders in (modality_inputs or {}).items():
        _check_name("modality_inputs", modality)
        where = f"modality_inputs[{modality!r}]"
        if encoders is not None and not isinstance(encoders, Mapping):
            raise _other_type(where, encoders, "{encoder: {argument: tensor}}")
        for encoder, arguments in (encoders or {}).items():
            _check_name(where, encoder)
            if not isinstance(arguments, Mapping):
                raise InputError(
                    f"{where}[{encoder!r}] is {type(arguments).__name__}; expected {{argument: "
                    "tensor}; leave out an encoder without inputs"
                )
            for argument, value in arguments.items():
                _check_name(f"{where}[{encoder!r}]", argument)
                if torch.is_tensor(value):
                    _check_values(f"{where}[{encoder!r}][{argument!r}]", value)


def _check_values(name: str, value: torch.Tensor) -> None:
    if value.is_meta or value.layout != torch.strided:
        kind = "on the device meta" if value.is_meta else f"in the layout {value.layout}"
        raise InputError(f"{name} is {kind}; expected a dense tensor with values")


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str):
        raise InputError(f"{where} has the key {name!r}; expected names")


def _other_type(name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{name} is {type(value).__name__}; expected {expected} or None")


def check_shapes(
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    loss_mask: torch.Tensor | None,
) -> None:
    """Raise ``InputError`` unless all that is given is of one [B, S]; positions may have axes."""
    given = {"input_ids": input_ids, "labels": labels, "loss_mask": loss_mask}
    known = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not known or next(iter(known.values())).dim() != 2:  # of which the plan's check says more
        return
    first, shape = next((name, tuple(tensor.shape)) for name, tensor in known.items())
    for name, tensor in known.items():
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} has shape {list(tensor.shape)}; expected {list(shape)}, as {first} has"
            )
    if labels is not None and labels.dtype not in _INTEGERS:
        raise InputError(f"labels are {labels.dtype}; expected torch.int64 token ids")
    if position_ids is None:
        return
    batch, length = shape
    allowed = ((batch, length), (1, length), (3, batch, length))
    if tuple(position_ids.shape) not in allowed or position_ids.dtype not in _INTEGERS:
        raise InputError(
            f"position_ids are {position_ids.dtype} {list(position_ids.shape)}; expected "
            f"torch.int64 {[batch, length]}, as {first} has, or {[3, batch, length]} for "
            "multimodal RoPE"
        )


def check_head_targets(
    targets: HeadTargets | None, heads: Iterable[str], like_BS: torch.Tensor | None
) -> None:
    """Raise ``InputError`` unless targets are [B, S, ...] tensors of heads that the model has.

    Args:
        targets: head -> name -> what every position brings.
        heads: names of the model's heads.
        like_BS: of the micro-batch's [B, S]; None where it is not known.
    """
    heads = list(heads)
    for head, tensors in (targets or {}).items():
        if head not in heads:
            raise InputError(f"head_targets name {head!r}, but the model has the heads {heads}")
        for name, target in (tensors or {}).items():
            where = f"head_targets[{head!r}][{name!r}]"
            if not torch.is_tensor(target):
                raise _other_type(where, target, "a tensor")
            if like_BS is not None and target.shape[:2] != like_BS.shape:
                raise InputError(
                    f"{where} has shape {list(target.shape)}; expected {list(like_BS.shape)} "
                    "first, as labels have"
                )


def check_plan(plan: AlignmentPlan, input_ids_BS: torch.Tensor) -> None:
    """Raise ``InputError`` for what is no plan, or one of another shape."""
    if not isinstance(plan, AlignmentPlan):
        raise _other_type("alignment_plan", plan, "what build_alignment_plan gives")
    is_whole = plan.positions_S is None
    length = plan.sequence_length if is_whole else input_ids_BS.size(1)
    if (plan.batch_size, length) != tuple(input_ids_BS.shape):
        raise InputError(
            f"alignment_plan is for [B, S] = [{plan.batch_size}, {length}] and "
            f"input_ids are {list(input_ids_BS.shape)}; make the plan from these input_ids"
        )


def refuse_other_ids(
    plan: AlignmentPlan, input_ids_BS: torch.Tensor, special_token_ids: Mapping[str, int]
) -> None:
    """Raise ``InputError`` for a plan of other ids, where plan and ids are on the host."""
    if plan.pieces or not on_host(input_ids_BS, plan.text_ids_N):
        return
    ids_BS, B = input_ids_BS.numpy(), plan.batch_size
    for name, stream in plan.streams.items():
        rows_N = stream.rows_N.numpy()
        positions_N, samples_N = rows_N // B, rows_N % B
        if plan.positions_S is not None:
            positions_N = plan.positions_S.numpy()[positions_N]
        ids_N = ids_BS[samples_N, positions_N]
        if name == TEXT:
            wrong_N = ids_N != plan.text_ids_N.numpy()
        elif name in special_token_ids:
            wrong_N = ids_N != special_token_ids[name]
        else:
            continue
        if wrong_N.any():
            at = int(wrong_N.argmax())
            raise InputError(
                f"alignment_plan was made from other ids: it places {name} at "
                f"[{samples_N[at]}, {positions_N[at]}], where input_ids are {ids_N[at]}; make the "
                "plan from these input_ids"
            )


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


def refuse_levels_without_plan(encoded: Mapping[str, EncodedRows]) -> None:
    """Raise ``UnsupportedError`` for levels where a script merges rows by a way of its own."""
    names = sorted(name for name, one in encoded.items() if one.levels)
    if names:
        raise UnsupportedError(
            f"the encoders of {names} give levels of their rows, and a script merges rows itself "
            "(get_text_embeddings or align_embeddings_by_token_positions is replaced, or the "
            "embedding is not Megatron's), where levels have no place; do not replace the methods"
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


def on_host(*tensors: torch.Tensor) -> bool:
    """True where memory can be read through NumPy, which no device has to be asked for."""
    return all(type(one) is torch.Tensor and one.device.type == "cpu" for one in tensors)
