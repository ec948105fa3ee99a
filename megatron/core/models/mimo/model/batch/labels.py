"""Labels that a loss can be taken of.

What lies on a device is not read, which would wait for the device.
Legend: S sequence, B micro-batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import on_host

NO_LABEL = -100  # Hugging Face's mark


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelShare:
    """Labels of the positions of a context-parallel rank.

    Attributes:
        labels_BS: long [B, S / cp]; 0 where there is none.
        loss_mask_BS: [B, S / cp].
        without_label_BS: True where there is no label; None where all are there.
    """

    labels_BS: torch.Tensor | None
    loss_mask_BS: torch.Tensor | None
    without_label_BS: torch.Tensor | None


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
    if on_host(labels_BS):
        is_none = _unlabelled(labels_BS, loss_mask_BS, vocab_size)
        if not is_none.any():
            return labels_BS, loss_mask_BS, None
        is_none_BS = torch.from_numpy(is_none)
    else:
        is_none_BS = labels_BS == NO_LABEL
    if loss_mask_BS is not None:
        loss_mask_BS = loss_mask_BS.masked_fill(is_none_BS, 0)
    return labels_BS.masked_fill(is_none_BS, 0), loss_mask_BS, is_none_BS


def zero_without_label(output: Any, is_none_BS: torch.Tensor | None) -> Any:
    """A loss per token, zero where a token has no label; anything else as it is."""
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
    if outside.any() and loss_mask_BS is not None and on_host(loss_mask_BS):
        wrong = outside & (loss_mask_BS.detach().float().numpy() != 0)  # NumPy has no bfloat16
    if wrong.any():
        sample, position = np.argwhere(wrong)[0]
        bounds = "at least 0" if vocab_size is None else f"in 0..{vocab_size - 1}"
        raise InputError(
            f"labels[{sample}, {position}] is {labels[sample, position]}; expected a token id "
            f"{bounds}, or {NO_LABEL} where there is no label"
        )
    return np.asarray(is_none | outside)
