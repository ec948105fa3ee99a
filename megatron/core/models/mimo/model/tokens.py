"""Checks of what every token of a batch brings: ids, positions, labels, masks, and their plan.

What lies on a device is checked by type and shape alone: reading it would wait for the device.
Legend: S sequence, B micro-batch, N tokens of a stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError

NO_LABEL = -100  # Hugging Face's mark

_INTEGERS = (torch.int64, torch.int32)


_TENSORS = (
    *("input_ids", "position_ids", "labels", "loss_mask", "span_ids", "padding_mask"),
    "attention_mask",
)


def check_tensors(*values: Any) -> None:
    """Raise ``InputError`` unless each of the arguments named in ``_TENSORS`` is one, or None."""
    for name, value in zip(_TENSORS, values, strict=True):
        if value is not None and not torch.is_tensor(value):
            raise _other_type(name, value, "a tensor")


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
        where = f"modality_inputs[{modality!r}]"
        if encoders is not None and not isinstance(encoders, Mapping):
            raise _other_type(where, encoders, "{encoder: {argument: tensor}}")
        for encoder, arguments in (encoders or {}).items():
            if arguments is not None and not isinstance(arguments, Mapping):
                raise _other_type(f"{where}[{encoder!r}]", arguments, "{argument: tensor}")


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
    if plan.pieces or not _on_host(input_ids_BS, plan.text_ids_N):
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


def labels_in_vocabulary(
    labels_BS: torch.Tensor | None, loss_mask_BS: torch.Tensor | None, vocab_size: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Labels that a loss can be taken of, the loss mask, and where there is no label.

    Labels of -100, and on the host those outside of the vocabulary whose loss is masked, are no
    labels: they become 0 and their loss has to be left out.

    Args:
        labels_BS: integer [B, S].
        loss_mask_BS: [B, S].
        vocab_size: V; None where the model does not say.

    Returns:
        Labels, mask, and bool [B, S], True where there is no label (None where all are there).

    Raises:
        InputError: labels on the host that are outside of the vocabulary and not masked.
    """
    if labels_BS is None:
        return None, loss_mask_BS, None
    if _on_host(labels_BS):
        is_none = _unlabelled(labels_BS, loss_mask_BS, vocab_size)
        if not is_none.any():
            return labels_BS, loss_mask_BS, None
        is_none_BS = torch.from_numpy(is_none)
    else:
        is_none_BS = labels_BS == NO_LABEL
    if loss_mask_BS is not None:
        loss_mask_BS = loss_mask_BS.masked_fill(is_none_BS, 0)
    return labels_BS.masked_fill(is_none_BS, 0), loss_mask_BS, is_none_BS


def without(output: Any, is_none_BS: torch.Tensor | None) -> Any:
    """A loss per token without that of tokens that have no label."""
    if is_none_BS is None or not torch.is_tensor(output) or output.shape != is_none_BS.shape:
        return output
    return output.masked_fill(is_none_BS, 0)


def _unlabelled(
    labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor | None, vocab_size: int | None
) -> np.ndarray:
    """Where labels on the host are none; refuses those outside of the vocabulary that count."""
    labels = labels_BS.numpy()
    is_none = labels == NO_LABEL
    outside = (labels < 0) & ~is_none
    if vocab_size is not None:
        outside |= labels >= vocab_size
    wrong = outside
    if outside.any() and loss_mask_BS is not None and _on_host(loss_mask_BS):
        wrong = outside & (loss_mask_BS.detach().float().numpy() != 0)  # NumPy has no bfloat16
    if wrong.any():
        sample, position = np.argwhere(wrong)[0]
        bounds = "at least 0" if vocab_size is None else f"in 0..{vocab_size - 1}"
        raise InputError(
            f"labels[{sample}, {position}] is {labels[sample, position]}; expected a token id "
            f"{bounds}, or {NO_LABEL} where there is no label"
        )
    return np.asarray(is_none | outside)


def _on_host(*tensors: torch.Tensor) -> bool:
    """True where memory can be read through NumPy, which no device has to be asked for."""
    return all(type(one) is torch.Tensor and one.device.type == "cpu" for one in tensors)
