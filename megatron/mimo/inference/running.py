"""A micro-batch of prompts that is under way: its cache, and what the model reads next.

Legend: B prompts, P places of the longest prompt, L places of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.alignment import build_alignment_plan
from megatron.mimo.inference.prompts import PromptBatch, text_plan

__all__ = ["Running"]


class Running:
    """A micro-batch whose first step reads the prompts, and every other one token of each answer.

    Args:
        numbers: of the prompts in the call.
        prompts: their tokens, without padding.
        batch: the prompts, their tensors on the model's device.
        uniforms_BT: the draws of each answer; None where nothing is drawn.
        special_token_ids: placeholder token id of each modality.
        use_cache: False reads prompts and answers anew in each step.
        three_axes: position ids have three axes, and keys are rotated as they are read.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        prompts: Sequence[Sequence[int]],
        batch: PromptBatch,
        *,
        uniforms_BT: Tensor | None,
        special_token_ids: Mapping[str, int],
        use_cache: bool,
        three_axes: bool,
    ) -> None:
        self.numbers = list(numbers)
        self.prompts = prompts
        self._batch = batch
        self._uniforms_BT = uniforms_BT
        self._special_token_ids = special_token_ids
        self._three_axes = three_axes
        self._tokens: list[Tensor] = []
        self.context = self._new_context() if use_cache else None

    @property
    def shape(self) -> list[int]:
        """Tokens that the next step reads of each sequence, and sequences."""
        one = self.context is not None and self._tokens
        return [1 if one else self._batch.places + len(self._tokens), len(self.numbers)]

    @property
    def draws(self) -> Tensor | None:
        """The draws of the next step."""
        if self._uniforms_BT is None:
            return None
        return self._uniforms_BT[:, len(self._tokens)]

    def take(self, tokens_B: Tensor) -> None:
        """The tokens that follow what has been read; the cache moves on."""
        if self.context is not None:
            self.context.increment_sequence_len_offset(self.shape[0])
            self.context.enable_decode_mode()
        self._tokens.append(tokens_B)

    def embedding_inputs(self) -> dict[str, Any]:
        """What the stage with the embedding reads in the next step, besides ``inputs``.

        Stages to which levels of rows travel read the plan.
        """
        batch = self._batch
        if not self._tokens:
            return {
                "input_ids": batch.input_ids,
                "modality_inputs": batch.modality_inputs,
                "alignment_plan": batch.plan,
            }
        if self.context is not None:
            tokens_B = self._tokens[-1]
            return {"input_ids": tokens_B[:, None], "alignment_plan": text_plan(tokens_B)}
        ids_BS = torch.cat([batch.input_ids, torch.stack(self._tokens, dim=1)], dim=1)
        plan = build_alignment_plan(
            ids_BS, self._special_token_ids, row_order=batch.plan.row_order()
        )
        return {
            "input_ids": ids_BS,
            "modality_inputs": batch.modality_inputs,
            "alignment_plan": plan,
        }

    def inputs(self) -> dict[str, Any]:
        """What every stage reads in the next step."""
        batch = self._batch
        stop = batch.places + len(self._tokens)
        start = 0 if self._three_axes else stop - self.shape[0]
        inputs: dict[str, Any] = {"position_ids": batch.position_ids[..., start:stop]}
        if self.context is not None:
            inputs["inference_context"] = self.context
        if batch.padding_BL is not None:
            inputs["attention_mask"] = batch.padding_BL[:, None, None, :stop]
        reads_prompts = not self._tokens or self.context is None
        if batch.span_ids is not None and reads_prompts:
            new_BT = batch.span_ids.new_zeros(len(self.numbers), len(self._tokens))
            inputs["span_ids"] = torch.cat([batch.span_ids, new_BT], dim=1)
        return inputs

    def _new_context(self) -> Any:
        from megatron.core.inference.contexts import StaticInferenceContext

        return StaticInferenceContext(len(self.numbers), self._batch.position_ids.size(-1))
