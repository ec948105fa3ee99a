"""The methods of stock MIMO that scripts call and subclasses override, as working entry points.

The model itself takes its own, faster path wherever none of them is replaced; the result is the
same. Legend: S sequence, B micro-batch, H hidden, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from megatron.core.models.mimo.alignment import AlignmentPlan, build_alignment_plan
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import (
    HeadTargets,
    ModalityInputs,
    check_count,
    check_rows,
    refuse_row_order,
    require_token_id,
)
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs, plan_of
from megatron.core.models.mimo.model.encoding.encode import Rows, encode_modalities
from megatron.core.models.mimo.model.language.refusals import refuse_scattering_embedding
from megatron.core.models.mimo.model.language.run import ModelOutput, run_language_model
from megatron.core.models.mimo.model.merging.merge import merge_streams
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.models.mimo.signatures import is_replaced
from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel


class StockEntryPoints(nn.Module):
    """Stock MIMO's methods for scripts and subclasses; a mixin of ``MimoModel``."""

    language_model: Any  # any Megatron language model; a wrapper of one once a script wraps it
    modality_submodules: nn.ModuleDict
    partition_adapter: PartitionAdapter | None
    special_token_ids: dict[str, int]
    mimo_config: MimoModelConfig
    config: Any
    role: RankRole
    input_tensors: Any

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what previous stages have sent; it is used by the next forward only.

        Args:
            input_tensor: [S_local, B, H], a list of one, or ``{module: tensor}``: "language" for
                hidden states; a modality for its rows, which encoders on other ranks have sent.
        """
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        if isinstance(input_tensor, dict):
            input_tensor = {
                name: value[0] if isinstance(value, list) and len(value) == 1 else value
                for name, value in input_tensor.items()
            }
        self.input_tensors = input_tensor
        hidden = input_tensor
        if isinstance(input_tensor, dict):
            hidden = input_tensor.get(MIMO_LANGUAGE_MODULE_KEY)
        language_model = self.language_model
        if language_model is not None and hasattr(unwrap_model(language_model), "set_input_tensor"):
            unwrap_model(language_model).set_input_tensor(hidden)

    def forget_input_tensor(self) -> None:
        """Let go of what previous stages have sent, once it has been used."""
        if self.input_tensors is None:
            return
        self.input_tensors = None
        if self.language_model is not None:
            unwrap_model(self.language_model).set_input_tensor([None])

    def get_text_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Embeddings [N, H] of the ordinary tokens, batch-major, by the whole embedding layer.

        The model itself calls this only where a subclass overrides it: position embeddings and
        dropout belong to modality rows too, so they are applied after the merge.
        """
        refuse_scattering_embedding(self.language_model, self.partition_adapter)
        plan = build_alignment_plan(input_ids, special_token_ids)
        positions_N = None
        if position_ids is not None:
            positions_BS = position_ids[0] if position_ids.dim() == 3 else position_ids
            rows_N = plan.streams[TEXT].rows_N
            positions_N = positions_BS.t().reshape(-1).index_select(0, rows_N).unsqueeze(0)
        embedding = unwrap_model(self.language_model).embedding
        text_NBH = embedding(input_ids=plan.text_ids_N.unsqueeze(0), position_ids=positions_N)
        text_NH: torch.Tensor = text_NBH.squeeze(1)
        return text_NH

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: Mapping[str, int],
    ) -> torch.Tensor:
        """Merge rows [N, H] per stream, "text" among them, into [S, B, H].

        Raises:
            ConfigError: a modality has no special token id.
            PlaceholderMismatchError: rows and tokens of a stream differ in number.
            InputError: no streams, or rows whose width or dtype differ.
        """
        if not modality_embeddings:
            raise InputError("No modality embeddings provided; at least one modality is required")
        plan = build_alignment_plan(input_ids, special_token_ids)
        first = modality_embeddings.get(TEXT, next(iter(modality_embeddings.values())))
        for name, rows_NH in modality_embeddings.items():
            if name != TEXT:
                require_token_id(name, special_token_ids)
            check_count(name, plan.streams[name].rows_N.numel(), rows_NH.size(0))
            check_rows(name, rows_NH, first.size(-1), first.dtype)
        for name, stream in plan.streams.items():
            if name not in modality_embeddings:
                check_count(name, stream.rows_N.numel(), 0)
        return merge_streams(plan, dict(modality_embeddings))

    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,  # noqa: ARG002 - the signature that scripts override
        modality_inputs: ModalityInputs | None,
        input_tensors: Rows | None,
    ) -> Rows:
        """Rows [N, H] of every modality; see ``encode_modalities``."""
        return encode_modalities(
            self.modality_submodules,
            modality_inputs,
            input_tensors,
            mimo_config=self.mimo_config,
            special_token_ids=self.special_token_ids,
            hidden_size=self.config.hidden_size,
        )

    def _forward_language_module(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        input_tensors: Rows | None,
        packing_kwargs: Mapping[str, Any] | None = None,
        *,
        alignment_plan: AlignmentPlan | None = None,
        span_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        head_targets: HeadTargets | None = None,
        label_rows: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Merge the rows in ``input_tensors`` with text and run the language model.

        Arguments are those of ``MimoModel.forward``, and ``input_tensors`` are the rows of every
        modality as ``_forward_encoders`` gives them.
        """
        inputs = ForwardInputs(
            input_ids_BS=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            loss_mask_BS=loss_mask,
            labels_BS=labels,
            packing_kwargs=packing_kwargs,
            plan=alignment_plan,
            span_ids_BS=span_ids,
            padding_mask_BS=padding_mask,
            inference_context=inference_context,
            head_targets=head_targets,
            label_rows_K=label_rows,
        )
        plan = None
        if self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            plan = plan_of(inputs, self.special_token_ids, self.language_model)
        return run_language_model(cast("MimoModel", self), inputs, input_tensors or {}, plan)

    def _language_output(
        self, inputs: ForwardInputs, rows: Rows, plan: AlignmentPlan | None
    ) -> ModelOutput:
        """Run the language model, by a script's own method where it has replaced that."""
        if not is_replaced(self, StockEntryPoints, "_forward_language_module"):
            return run_language_model(cast("MimoModel", self), inputs, rows, plan)
        if plan is not None:
            refuse_row_order(plan, "_forward_language_module")
        return self._forward_language_module(
            inputs.input_ids_BS,
            inputs.position_ids,
            inputs.attention_mask,
            inputs.loss_mask_BS,
            inputs.labels_BS,
            rows,
            inputs.packing_kwargs,
            **inputs.beyond_stock(),
        )

    @property
    def merges_by_script(self) -> bool:
        """A script has replaced a method that stock MIMO merges rows with text by."""
        return is_replaced(
            self, StockEntryPoints, "get_text_embeddings", "align_embeddings_by_token_positions"
        )

    def merge_by_script(
        self,
        inputs: ForwardInputs,
        rows_NH: Mapping[str, torch.Tensor],
        plan: AlignmentPlan,
        packed: Any,
    ) -> torch.Tensor:
        """Merged embeddings [S_local, B, H] by stock MIMO's methods: merged whole, then cut."""
        assert inputs.input_ids_BS is not None
        refuse_row_order(plan, "align_embeddings_by_token_positions")
        ids_BS, token_ids = inputs.input_ids_BS, self.special_token_ids
        text_NH = self.get_text_embeddings(ids_BS, inputs.position_ids, token_ids)
        merged_SBH = self.align_embeddings_by_token_positions(
            {**rows_NH, TEXT: text_NH}, ids_BS, token_ids
        )
        if self.partition_adapter is None:
            return merged_SBH
        held_SBH, *_ = self.partition_adapter.shard(merged_SBH, None, None, packed)
        assert held_SBH is not None
        return held_SBH
