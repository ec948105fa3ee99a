"""MimoModel: encoders, text embedding and language model as one Megatron module.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.alignment import AlignmentPlan, Encoded, EncodedRows
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.model.checks import (
    HeadTargets,
    ModalityInputs,
    check_count,
    check_encoder_order,
    refuse_other_ids,
)
from megatron.core.models.mimo.model.colocated import (
    Bridges,
    bridge_rows,
    build_bridges,
    building_encoders,
    drawing_stage,
    give_groups,
    groups_for_checkpoints,
    language_groups,
    refuse_encoding_alone,
    role_of,
)
from megatron.core.models.mimo.model.disjoint import DisjointRows, named_output, refuse_stages
from megatron.core.models.mimo.model.encode import Rows
from megatron.core.models.mimo.model.encoder_splits import split_encoders
from megatron.core.models.mimo.model.expert_balance import (
    EXPERT_BALANCE,
    ExpertBalance,
    balance_of,
)
from megatron.core.models.mimo.model.forward_inputs import ForwardInputs, plan_of
from megatron.core.models.mimo.model.freezing import freeze_parts
from megatron.core.models.mimo.model.heads import Heads
from megatron.core.models.mimo.model.labels import without
from megatron.core.models.mimo.model.language_call import LanguageCall, share_of_labels
from megatron.core.models.mimo.model.level_route import LevelRoute, level_route
from megatron.core.models.mimo.model.overrides import ModelOutput, StockEntryPoints
from megatron.core.models.mimo.model.ranges import named_range
from megatron.core.models.mimo.model.recomputation import prepare_recomputation
from megatron.core.models.mimo.model.refusals import (
    refuse_description,
    refuse_scattering_embedding,
    refuse_untaken_levels,
)
from megatron.core.models.mimo.model.wrapped_modules import WrappedModules, name_wrapped_modules
from megatron.core.models.mimo.partition.utils import build_partition_adapter, sequence_cut
from megatron.core.models.mimo.submodules.state import Offsets, descended_state, forgive_extra_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group


class MimoModel(StockEntryPoints, WrappedModules, MegatronModule):
    """A language model that reads text and the rows of modality encoders.

    Every occurrence of a modality's special token in ``input_ids`` takes one row of that
    modality, batch-major and left to right. Encoders are built where the language model's
    embedding is, on the first pipeline stage; with process grids of their own, on every rank of
    these.

    Args:
        mimo_config: what to build.
        cp_group, tp_group: process groups that cut the sequence; None for Megatron's global ones.

    Attributes:
        modality_submodules: modality -> ``ModalitySubmodules``, those of this rank.
        language_model: this rank's part of the language model; None on ranks of encoders alone.
        heads: further heads, on the last pipeline stage.
        role: which modules this rank runs.
        partition_adapter: cuts sequences; None without context or sequence parallelism.
        level_route: which levels of rows (deepstack) this rank's layers add or hand on.
        disjoint_rows: messages of rows where modules are on ranks of their own; else None.
        colocated_comms: (modality, "language") -> what takes its rows to the language model's
            layout; {} where no rows change ranks in a forward.

    Raises:
        ConfigError: (a ``ValueError``) the language model's spec holds no ``config``; encoders
            that cannot be split as asked; sections of multimodal RoPE that do not fit the heads.
        UnsupportedError: (a ``RuntimeError``) modules that share some ranks; sequence parallelism
            with an embedding that scatters by itself; context parallelism or packing with an
            attention that cannot do it.
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
        self.colocated_comms: Bridges = build_bridges(mimo_config)
        self.input_tensors: Any = None
        self.role = role_of(mimo_config)
        cp_group, tp_group = language_groups(mimo_config, self.role, cp_group, tp_group)
        self.partition_adapter = None
        if self.role.has_language_module:
            self.partition_adapter = build_partition_adapter(mimo_config, cp_group, tp_group)
        self.modality_submodules = torch.nn.ModuleDict()
        with building_encoders(self.role, mimo_config):
            for name in self.role.modality_module_names:
                spec = mimo_config.modality_submodules_spec[name]
                stage = self.role.modules[name]
                first, last = stage.is_first_stage, stage.is_last_stage
                with drawing_stage(name, mimo_config):
                    built = spec.module.from_spec(spec, is_first_stage=first, is_last_stage=last)
                self.modality_submodules[name] = built
        give_groups(self.modality_submodules, mimo_config)
        if mimo_config.module_to_grid_map is None:
            split_encoders(self.modality_submodules, mimo_config, cp_group, tp_group)
        self.disjoint_rows: DisjointRows | None = None
        if self.role.mode is ModuleLayout.NON_COLOCATED:
            refuse_stages(self.modality_submodules)
            self.disjoint_rows = DisjointRows(mimo_config)
        self.register_module("language_model", None)
        self.level_route = LevelRoute()
        self._balance: ExpertBalance | None = None
        self._language_call: Any = None  # of a language model, where there is one
        if self.role.has_language_module:
            self._build_language_model()
        heads = mimo_config.heads if self.role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY) else {}
        self.heads = Heads(heads, self.language_model, self.partition_adapter)
        self.register_load_state_dict_pre_hook(name_wrapped_modules)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(forgive_extra_state)  # type: ignore[no-untyped-call]
        prepare_recomputation(self)

    def _build_language_model(self) -> None:
        spec = self.mimo_config.language_model_spec
        self.language_model = build_module(spec)
        specs = self.mimo_config.modality_submodules_spec
        self.level_route = level_route(specs, self.language_model)
        self._balance = balance_of(self.language_model)
        self._language_call = LanguageCall.of(self.language_model)
        refuse_scattering_embedding(self.language_model, self.partition_adapter)
        refuse_untaken_levels(self.modality_submodules, self.language_model, self.level_route)

    @property
    def balances_experts(self) -> bool:
        """This is the last stage of a model whose experts are balanced by a loss."""
        return self._balance is not None and self._balance.part.is_last

    @property
    def has_further_losses(self) -> bool:
        """With labels, ``forward`` gives ``Losses`` on this stage."""
        return len(self.heads) > 0 or self.balances_experts

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
    ) -> tuple[Any, torch.Tensor | None]:
        """Run this rank's part of the model.

        Args:
            input_ids: long [B, S]; only the first stage reads them.
            position_ids: long [B, S], or [3, B, S] for multimodal RoPE, which every pipeline
                stage needs.
            attention_mask: as the language model takes it; None under context parallelism.
            loss_mask: float [B, S].
            labels: long [B, S], already shifted; -100 is no label, without loss or gradient.
            modality_inputs: ``{modality: {encoder: {argument: tensor}}}``. A modality that is
                left out, or whose tensors are empty, has no rows in this micro-batch.
            packing_kwargs: arguments of ``PackedSeqParams`` for a packed sequence (B = 1), on every
                pipeline stage. Boundaries given as integers need no wait for the device.
            modality_token_indices: ``{name: flat batch-major positions}`` for "text" and every
                modality, in place of a plan.
            alignment_plan: from ``build_alignment_plan``, made on the host; with it nothing here
                waits for the device. Without either, the plan is derived from ``input_ids``. Later
                stages read it where levels of rows travel to them.
            span_ids: integer [B, S], on every pipeline stage: tokens of one span see each other
                in both directions, besides what the causal rule lets them see; 0 is no span.
            padding_mask: bool [B, S], on every pipeline stage: True where experts' auxiliary
                losses do not count a token.
            inference_context: megatron-core's cache of keys and values, in generation; logits are
                then those that the language model gives for it, over the whole vocabulary.
            head_targets: ``{head: {name: [B, S, ...]}}``; "mask" says where its loss counts, which
                is where the text's does if it is left out.
            encoded_rows: modality -> rows that were encoded already, in place of
                ``modality_inputs``; as the plan orders them.
            label_rows: long [K], from ``find_label_rows``: the loss is computed at these positions
                of this context-parallel rank alone, and is zero at others. Only where
                ``takes_label_rows``.

        Returns:
            ``(output, loss_mask)``. On the last stage output is the loss per token [B, S], or
            logits [B, S, V] without labels; on others the hidden states [S_local, B, H], with
            levels of rows and sums of experts for later stages [M, 1, H] (``model/level_route.py``,
            ``model/expert_balance.py``). A model with heads, or whose experts are balanced by a
            loss, gives ``Losses`` in place of the loss per token. On ranks of encoders alone it is
            ``{modality: rows}``, and hidden states are ``{"language": ...}`` then, as Megatron's
            schedule for several modules sends them on.
            ``loss_mask`` is this context-parallel rank's part.

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
            return self._rows_to_send(inputs), loss_mask
        if not self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            return named_output(self, self._language_output(inputs, {}, None))
        plan = plan_of(inputs, self.special_token_ids, self.language_model)
        check_encoder_order(plan.encoders, self.modality_submodules)
        if encoded_rows is not None:
            rows = dict(encoded_rows)
        elif self.disjoint_rows is not None:
            refuse_encoding_alone(self.mimo_config)
            adapter = self.partition_adapter
            cp_group = adapter.cfg.cp_group if adapter is not None and adapter.cfg.use_cp else None
            rows = self.disjoint_rows.incoming(self._arrived_rows(), input_ids, cp_group)
        else:
            refuse_encoding_alone(self.mimo_config)
            rows = self._forward_encoders(input_ids, modality_inputs, None)
            rows = self._bridged(rows, plan)
        given = {name: EncodedRows.of(encoded).num_rows for name, encoded in rows.items()}
        for name in {**plan.counts, **given}:
            check_count(name, plan.counts.get(name, 0), given.get(name, 0))
        if alignment_plan is not None and input_ids is not None:
            refuse_other_ids(alignment_plan, input_ids, self.special_token_ids)
        return named_output(self, self._language_output(inputs, rows, plan))

    def _rows_to_send(self, inputs: ForwardInputs) -> dict[str, torch.Tensor]:
        """What a rank of encoders gives: modality -> rows, or hidden states between stages."""
        assert self.disjoint_rows is not None, "the language model is on ranks of its own"
        ids_BS, arrived = inputs.input_ids_BS, self._arrived_rows()
        before: Rows | None = None if arrived is None else {**arrived}
        rows = self._forward_encoders(ids_BS, inputs.modality_inputs, before)
        self._forget_input_tensor()
        return self.disjoint_rows.outgoing(rows, self.modality_submodules, arrived, ids_BS)

    @property
    def takes_label_rows(self) -> bool:
        """Whether the language model can compute the loss of some positions alone."""
        return self._language_call is not None and self._language_call.takes_label_rows

    def _bridged(self, rows: Rows, plan: AlignmentPlan) -> Rows:
        """Rows in the language model's layout; collective where there are bridges."""
        if not self.colocated_comms:
            return rows
        device, config = next(self.parameters()).device, self.config
        empty_H = torch.empty(config.hidden_size, dtype=config.params_dtype, device=device)
        comms, submodules = self.colocated_comms, self.modality_submodules
        return bridge_rows(rows, comms, submodules, plan, empty_H=empty_H)

    def _run_language_model(
        self, inputs: ForwardInputs, rows: Rows, plan: AlignmentPlan | None
    ) -> ModelOutput:
        """Merge rows with text on the first stage, and run the language model.

        Args:
            inputs: of the micro-batch, uncut.
            rows: modality -> rows, on the first stage.
            plan: where rows go, on the first stage.
        """
        adapter, call = self.partition_adapter, self._language_call
        call.check_masks(inputs, context_parallel=adapter is not None and adapter.cfg.use_cp)
        device = next(self.parameters()).device
        packed = call.packed_row(inputs, config=self.config, device=device)
        cut = sequence_cut(adapter, packed)
        tally = None if self._balance is None else self._balance.begin(inputs, cut)
        if plan is not None:
            with named_range("merge"):
                merged = self._embed(inputs, rows, plan, cut, packed)
        else:
            merged = self._arrived(inputs, cut, tally)
        labels = share_of_labels(inputs, cut, self.language_model)
        arguments = call.arguments(
            self.language_model,
            inputs,
            labels,
            decoder_input=None if plan is None else merged.hidden_SBH,
            level_rows=self.level_route.added(merged.levels),
            cut=cut,
            packed=packed,
            padding_BS=None if tally is None else tally.padding_BS,
        )
        with self.heads.reading(self.language_model) as hidden:
            output = self.language_model(**arguments)
        self._forget_input_tensor()
        counted = None
        if tally is not None:
            output, counted = tally.joined(output)
        if self.level_route.leaves:
            output = self.level_route.message(output, merged.levels)
        if counted is not None and counted.leaves:
            output = counted.message(output)
            counted = None
        output = without(output, labels.without_label_BS)
        if (hidden or counted is not None) and labels.labels_BS is not None:
            output = self.heads.losses(
                hidden[0] if hidden else None,
                output,
                labels,
                inputs.head_targets,
                cut=cut,
                tp_group=None if adapter is None else adapter.cfg.tp_group,
            )
            if counted is not None:
                output[EXPERT_BALANCE] = counted.loss(adapter)
        return output, labels.loss_mask_BS

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
        """Release process groups that this model owns; without bridges it owns none."""
        for bridge in self.colocated_comms.values():
            bridge.destroy()
        self.colocated_comms.clear()
