"""MimoModel: encoders, text embedding and language model as one Megatron module.

Legend: S sequence, B micro-batch, H hidden, K label positions, M vectors of a message between
stages, V vocabulary; ``S_local`` after context/sequence sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.alignment import AlignmentPlan, Encoded
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.model.batch.checks import HeadTargets, ModalityInputs
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs, plan_of
from megatron.core.models.mimo.model.freezing import freeze_parts
from megatron.core.models.mimo.model.grids.bridges import build_bridges
from megatron.core.models.mimo.model.grids.disjoint_rows import DisjointRows, named_output
from megatron.core.models.mimo.model.grids.roles import (
    groups_for_checkpoints,
    language_groups,
    role_of,
)
from megatron.core.models.mimo.model.language.call import LanguageCall
from megatron.core.models.mimo.model.language.expert_balance import ExpertBalance, balance_of
from megatron.core.models.mimo.model.language.heads import Heads
from megatron.core.models.mimo.model.language.refusals import refuse_language_model
from megatron.core.models.mimo.model.language.run import ModelOutput
from megatron.core.models.mimo.model.merging.level_route import LevelRoute, level_route
from megatron.core.models.mimo.model.modality_modules import build_modalities
from megatron.core.models.mimo.model.overrides import StockEntryPoints
from megatron.core.models.mimo.model.recomputation import prepare_recomputation
from megatron.core.models.mimo.model.refusals import refuse_description
from megatron.core.models.mimo.model.row_source import rows_to_merge, rows_to_send
from megatron.core.models.mimo.model.wrapped_modules import WrappedModules, name_wrapped_modules
from megatron.core.models.mimo.partition.utils import build_partition_adapter
from megatron.core.models.mimo.submodules.state import Offsets, descended_state, forgive_extra_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group


class MimoModel(StockEntryPoints, WrappedModules, MegatronModule):
    """A language model that reads text and the rows of modality encoders.

    Every occurrence of a modality's special token in ``input_ids`` takes one row of that
    modality, batch-major and left to right. Encoders are built on the first pipeline stage, beside
    the embedding; with process grids of their own, on every rank of these.

    Args:
        mimo_config: what to build.
        cp_group, tp_group: process groups that cut the sequence; None for Megatron's global ones.

    Attributes:
        modality_submodules: modality -> ``ModalitySubmodules``, those of this rank.
        language_model: this rank's part of the language model; None on ranks of encoders alone.
        language_call: how the language model is called; None without one.
        expert_balance: counts what its routers choose, where a loss balances experts; else None.
        heads: further heads, on the last pipeline stage.
        role: which modules this rank runs.
        partition_adapter: cuts sequences; None without context or sequence parallelism.
        level_route: which levels of rows (deepstack) this rank's layers add or hand on.
        disjoint_rows: messages of rows where modules are on ranks of their own; else None.
        colocated_comms: (modality, "language") -> what takes its rows to the language model's
            layout; {} where no rows change ranks in a forward.

    Raises:
        ConfigError: (a ``ValueError``) a spec without ``config``; encoders that cannot be split as
            asked; sections of multimodal RoPE that do not fit the heads.
        UnsupportedError: (a ``RuntimeError``) modules that share some of their ranks; an embedding
            that scatters by itself; an attention that cannot do context parallelism or packing.
    """

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        cp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        refuse_description(mimo_config)
        super().__init__(language_config(mimo_config))
        self.mimo_config = mimo_config
        self.special_token_ids = dict(mimo_config.special_token_ids or {})
        self.colocated_comms = build_bridges(mimo_config)
        self.role = role_of(mimo_config)
        groups = language_groups(mimo_config, self.role, cp_group, tp_group)
        self.modality_submodules = build_modalities(mimo_config, self.role, *groups)
        self.disjoint_rows = DisjointRows.of(mimo_config, self.role)
        self.input_tensors: Any = None
        self.register_module("language_model", None)
        self.partition_adapter = None
        self.level_route = LevelRoute()
        self.expert_balance: ExpertBalance | None = None
        self.language_call: LanguageCall | None = None
        if self.role.has_language_module:
            self.partition_adapter = build_partition_adapter(mimo_config, *groups)
            self._build_language_model(mimo_config)
        heads = mimo_config.heads if self.role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY) else {}
        self.heads = Heads(heads, self.language_model, self.partition_adapter)
        self.register_load_state_dict_pre_hook(name_wrapped_modules)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(forgive_extra_state)  # type: ignore[no-untyped-call]
        prepare_recomputation(self)

    def _build_language_model(self, mimo_config: MimoModelConfig) -> None:
        language_model = self.language_model = build_module(mimo_config.language_model_spec)
        self.level_route = level_route(mimo_config.modality_submodules_spec, language_model)
        self.expert_balance = balance_of(language_model)
        self.language_call = LanguageCall.of(language_model)
        refuse_language_model(
            language_model, self.modality_submodules, self.level_route, self.partition_adapter
        )

    @property
    def balances_experts(self) -> bool:
        """This is the last stage of a model whose experts are balanced by a loss."""
        return self.expert_balance is not None and self.expert_balance.part.is_last

    @property
    def has_further_losses(self) -> bool:
        """With labels, ``forward`` gives ``Losses`` on this stage."""
        return len(self.heads) > 0 or self.balances_experts

    @property
    def takes_label_rows(self) -> bool:
        """The language model can compute the loss of some positions alone."""
        return self.language_call is not None and self.language_call.takes_label_rows

    def freeze(self, *names: str, frozen: bool = True) -> None:
        """Exclude parts of the model from training; call it before the optimizer is built.

        Args:
            names: "language", a modality ("images"), or the path of any module or parameter
                inside ("images.encoders.vit", "images.projections", "language.decoder.layers.0",
                numbered over all stages). Every rank gives the same names; what another
                pipeline stage may hold is no error on this one.
            frozen: False makes them trainable again.

        Raises:
            ConfigError: no such part; the message lists those that exist.
        """
        freeze_parts(self, names, frozen=frozen)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: ModalityInputs | None = None,
        packing_kwargs: Mapping[str, Any] | None = None,
        modality_token_indices: Mapping[str, torch.Tensor] | None = None,
        alignment_plan: AlignmentPlan | None = None,
        span_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        head_targets: HeadTargets | None = None,
        encoded_rows: Mapping[str, Encoded] | None = None,
        label_rows: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Run this rank's part of the model. A stage is a pipeline stage of the language model.

        Args:
            input_ids: long [B, S]; only the first stage reads them.
            position_ids: long [B, S], or [3, B, S] for multimodal RoPE, on every stage then.
            attention_mask: as the language model takes it; None under context parallelism.
            loss_mask: float [B, S].
            labels: long [B, S], already shifted; -100 is no label, without loss or gradient.
            modality_inputs: ``{modality: {encoder: {argument: tensor}}}``. A modality that is
                left out, or whose tensors are empty, has no rows in this micro-batch.
            packing_kwargs: of ``PackedSeqParams``, for a packed sequence (B = 1), on every stage.
                Boundaries given as integers need no wait for the device.
            modality_token_indices: ``{name: flat batch-major positions}`` for "text" and every
                modality, in place of a plan.
            alignment_plan: from ``build_alignment_plan`` on the host; with it nothing here waits
                for the device. Without either, the plan is derived from ``input_ids``. Later
                stages read it where levels of rows travel to them.
            span_ids: integer [B, S], on every stage: tokens of one span see each other in both
                directions, besides what the causal rule lets them see; 0 is no span.
            padding_mask: bool [B, S], on every stage: True where experts' losses skip a token.
            inference_context: megatron-core's cache of keys and values, in generation; logits
                then cover the whole vocabulary, at the positions that the language model gives.
            head_targets: ``{head: {name: [B, S, ...]}}``; "mask" says where its loss counts, which
                is where the text's does if it is left out.
            encoded_rows: modality -> rows in the plan's order, in place of ``modality_inputs``.
            label_rows: long [K], from ``find_label_rows``: only at these positions of this
                context-parallel rank is the loss computed, and it is zero at others. Needs
                ``takes_label_rows``.

        Returns:
            ``(output, loss_mask)``, the mask's share of this context-parallel rank. Output is

            - on the last stage: the loss per token [B, S]; ``Losses`` where ``has_further_losses``;
              logits [B, S, V] without labels;
            - on other stages: hidden states [S_local, B, H]; [M, 1, H] where levels of rows or
              sums of experts follow them to later stages;
            - on ranks of encoders alone: ``{modality: rows}``. Other ranks then give hidden
              states as ``{"language": ...}``, for Megatron's schedule for several modules.

        Raises:
            InputError: (a ``ValueError``) inputs that do not fit the model or each other.
        """
        inputs = ForwardInputs(
            input_ids_BS=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            loss_mask_BS=loss_mask,
            labels_BS=labels,
            modality_inputs=modality_inputs,
            packing_kwargs=packing_kwargs,
            token_indices=modality_token_indices,
            plan=alignment_plan,
            encoded_rows=encoded_rows,
            span_ids_BS=span_ids,
            padding_mask_BS=padding_mask,
            inference_context=inference_context,
            head_targets=head_targets,
            label_rows_K=label_rows,
        )
        inputs.check(self.mimo_config.modality_submodules_spec, self.mimo_config.heads)
        if not self.role.has_language_module:
            return rows_to_send(self, inputs), loss_mask
        if not self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            return named_output(self, self._language_output(inputs, {}, None))
        plan = plan_of(inputs, self.special_token_ids, self.language_model)
        rows = rows_to_merge(self, inputs, plan)
        return named_output(self, self._language_output(inputs, rows, plan))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sharded state of the language model and the modalities of this rank."""
        own, tp_group = groups_for_checkpoints(self.mimo_config, self.language_model)
        metadata = ensure_metadata_has_dp_cp_group({**(metadata or {}), **own})
        return descended_state(self, prefix, sharded_offsets, metadata, tp_group=tp_group)

    def destroy(self) -> None:
        """Release the process groups of this model's bridges."""
        for bridge in self.colocated_comms.values():
            bridge.destroy()
        self.colocated_comms.clear()
