"""Running the modalities' encoders: rows of every modality that a micro-batch has.

Legend: N rows of one modality, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.alignment import Encoded
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.model.batch.checks import ModalityInputs, require_token_id
from megatron.core.models.mimo.model.encoding.encoder_splits import leave_out_unreduced_ranks
from megatron.core.models.mimo.model.encoding.idle import idle_rows
from megatron.core.models.mimo.ranges import named_range

Rows = dict[str, Encoded]


def encode_modalities(
    submodules: nn.ModuleDict,
    modality_inputs: ModalityInputs | None,
    hidden_states: Mapping[str, Encoded] | None,
    *,
    mimo_config: MimoModelConfig,
    special_token_ids: Mapping[str, int],
    hidden_size: int,
) -> Rows:
    """Rows [N, H] of every modality; [0, H] for one that has no inputs in this micro-batch.

    They are tensors, and ``EncodedRows`` where they have levels.

    Args:
        submodules: modality -> ``ModalitySubmodules``, those of this rank.
        modality_inputs: what the encoders are called with.
        hidden_states: modality -> rows [N, H_encoder] that were encoded already, or what a stage
            of the encoder before this one has given.
        mimo_config: what the model was built from.
        special_token_ids: placeholder token id of each modality.
        hidden_size: H.
    """
    rows = {}
    for name, submodule in submodules.items():
        leave_out_unreduced_ranks(name, submodule, mimo_config)
        inputs = (modality_inputs or {}).get(name)
        hidden = (hidden_states or {}).get(name)
        if is_empty(inputs) if hidden is None else _has_no_rows(hidden):
            idle = idle_rows(submodule, hidden_size)
            if idle is not None:
                rows[name] = idle
            continue
        require_token_id(name, special_token_ids)
        own = inputs if hidden is None else None
        with named_range(f"encode {name}"):
            encoded = submodule(encoder_inputs=own, hidden_states=hidden)
        if encoded is not None:
            rows[name] = encoded
    return rows


def _has_no_rows(hidden: Encoded) -> bool:
    tensor = hidden if torch.is_tensor(hidden) else hidden.rows_NH
    return not tensor.numel()


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
