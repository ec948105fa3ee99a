"""From token ids and encoder rows to what the decoder reads, with the entry points of old scripts.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.mimo.alignment import AlignmentPlan, build_alignment_plan
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.models.mimo.model.build import is_replaced
from megatron.core.models.mimo.model.embedding import embed_streams, merge_streams
from megatron.core.models.mimo.model.idle import take_part
from megatron.core.models.mimo.model.inputs import (
    check_count,
    check_rows,
    refuse_row_order,
    require_token_id,
)
from megatron.core.models.mimo.partition.utils import PartitionAdapter, sequence_cut
from megatron.core.utils import unwrap_model

Rows = dict[str, torch.Tensor]


class EmbedsStreams(nn.Module):
    """Merges text and modality rows; a mixin of ``MimoModel``."""

    language_model: Any  # any Megatron language model; a wrapper of one once a script wraps it
    modality_submodules: nn.ModuleDict
    partition_adapter: PartitionAdapter | None
    special_token_ids: dict[str, int]

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        rows: Rows,
        plan: AlignmentPlan,
        packed: Any,
    ) -> torch.Tensor:
        """Merged embeddings [S_local, B, H], ready for the decoder."""
        assert input_ids is not None, "the plan was made from input_ids"
        adapter = self.partition_adapter
        embedding = unwrap_model(self.language_model).embedding
        self._refuse_scattering_embedding()
        # Rows [0, H] place nothing; they carry a gradient to the parameters they come from.
        idle = [rows_NH for rows_NH in rows.values() if rows_NH.size(0) == 0]
        rows = {name: rows_NH for name, rows_NH in rows.items() if rows_NH.size(0)}
        by_script = is_replaced(
            self, EmbedsStreams, "get_text_embeddings", "align_embeddings_by_token_positions"
        )
        if by_script or not isinstance(embedding, LanguageModelEmbedding):
            refuse_row_order(plan, "align_embeddings_by_token_positions")
            text_NH = self.get_text_embeddings(input_ids, position_ids, self.special_token_ids)
            merged_SBH = self.align_embeddings_by_token_positions(
                {**rows, TEXT: text_NH}, input_ids, self.special_token_ids
            )
            if adapter is not None:
                held_SBH, *_ = adapter.shard(merged_SBH, None, None, packed)
                assert held_SBH is not None
                merged_SBH = held_SBH
        else:
            own_plan = sequence_cut(adapter, packed).share_of_plan(plan)
            merged_SBH = embed_streams(embedding, own_plan, rows, position_ids)
        merged_SBH = take_part(merged_SBH, idle)
        if torch.is_grad_enabled() and not merged_SBH.requires_grad:
            # Layers that are recomputed in backward get gradients only where their input needs one.
            trains = any(p.requires_grad for p in self.language_model.parameters())
            merged_SBH.requires_grad_(trains)
        return merged_SBH

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
        self._refuse_scattering_embedding()
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

    def _refuse_scattering_embedding(self) -> None:
        adapter = self.partition_adapter
        embedding = getattr(unwrap_model(self.language_model), "embedding", None)
        scatters = getattr(embedding, "scatter_to_sequence_parallel", False)
        if adapter is not None and adapter.cfg.seq_parallel and scatters:
            raise UnsupportedError(
                "sequence parallelism requires the language model's embedding scatter to be "
                "disabled, because rows are merged first; pass "
                "scatter_embedding_sequence_parallel=False in language_model_spec.params"
            )
