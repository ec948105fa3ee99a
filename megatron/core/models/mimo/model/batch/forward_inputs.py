"""The arguments of ``MimoModel.forward`` as one value, and the plan that they bring or imply.

Legend: S sequence, B micro-batch; nothing here is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    Encoded,
    build_alignment_plan,
    check_input_ids,
    plan_from_indices,
)
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import (
    HeadTargets,
    ModalityInputs,
    check_head_targets,
    check_mappings,
    check_modality_names,
    check_plan,
    check_shapes,
    check_tensors,
)
from megatron.core.utils import unwrap_model


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardInputs:
    """What ``MimoModel.forward`` is given; its docstring says what each means.

    Attributes:
        position_ids: long [B, S], or [3, B, S] for multimodal RoPE.
        token_indices: what is called ``modality_token_indices`` there.
        plan: what is called ``alignment_plan`` there.
    """

    input_ids_BS: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    loss_mask_BS: torch.Tensor | None = None
    labels_BS: torch.Tensor | None = None
    modality_inputs: ModalityInputs | None = None
    packing_kwargs: Mapping[str, Any] | None = None
    token_indices: Mapping[str, torch.Tensor] | None = None
    plan: AlignmentPlan | None = None
    encoded_rows: Mapping[str, Encoded] | None = None
    span_ids_BS: torch.Tensor | None = None
    padding_mask_BS: torch.Tensor | None = None
    inference_context: Any = None
    head_targets: HeadTargets | None = None
    label_rows_K: torch.Tensor | None = None

    def check(self, modalities: Iterable[str], heads: Iterable[str]) -> None:
        """Raise ``InputError`` unless types, shapes and names fit each other and the model.

        Args:
            modalities: names of the model's modalities.
            heads: names of its heads, on whatever stage.
        """
        check_tensors(
            input_ids=self.input_ids_BS,
            position_ids=self.position_ids,
            labels=self.labels_BS,
            loss_mask=self.loss_mask_BS,
            span_ids=self.span_ids_BS,
            padding_mask=self.padding_mask_BS,
            attention_mask=self.attention_mask,
            label_rows=self.label_rows_K,
        )
        check_mappings(self.modality_inputs, self.packing_kwargs, self.token_indices)
        check_modality_names(self.modality_inputs, modalities)
        check_head_targets(self.head_targets, heads, self.labels_BS)
        if self.inference_context is None:  # with which positions are those of all keys
            check_shapes(self.input_ids_BS, self.position_ids, self.labels_BS, self.loss_mask_BS)

    def beyond_stock(self) -> dict[str, Any]:
        """Arguments that stock MIMO's ``_forward_language_module`` does not have, where given."""
        ours = {
            "span_ids": self.span_ids_BS,
            "padding_mask": self.padding_mask_BS,
            "inference_context": self.inference_context,
            "head_targets": self.head_targets,
            "label_rows": self.label_rows_K,
        }
        return {name: value for name, value in ours.items() if value is not None}


def plan_of(
    inputs: ForwardInputs, special_token_ids: Mapping[str, int], language_model: Any
) -> AlignmentPlan:
    """The plan that is given; else the one that positions, or the token ids themselves, give.

    Raises:
        InputError: no token ids, ids that are not [B, S] or outside of the language model's
            vocabulary, or a plan of another shape.
    """
    if inputs.input_ids_BS is None:
        raise InputError("input_ids are None; the first pipeline stage reads them as [B, S]")
    check_input_ids(inputs.input_ids_BS)
    if inputs.plan is not None:
        check_plan(inputs.plan, inputs.input_ids_BS)
        return inputs.plan
    if inputs.token_indices is not None:
        return plan_from_indices(inputs.input_ids_BS, inputs.token_indices)
    vocab_size = getattr(unwrap_model(language_model), "vocab_size", None)
    return build_alignment_plan(inputs.input_ids_BS, special_token_ids, vocab_size=vocab_size)
