"""MimoModel: encoders, text embedding and language model as one Megatron module.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    build_alignment_plan,
    check_input_ids,
    plan_from_indices,
)
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.models.mimo.model import tokens as checks
from megatron.core.models.mimo.model.attention_support import AttentionSupport, refuse_attention
from megatron.core.models.mimo.model.build import (
    accepts,
    build_partition_adapter,
    is_replaced,
    language_config,
    refuse_grids,
    refuse_multi_token_prediction,
)
from megatron.core.models.mimo.model.encoder_splits import (
    keep_reducible_splits,
    split_encoders,
)
from megatron.core.models.mimo.model.freezing import freeze_parts
from megatron.core.models.mimo.model.idle import idle_rows
from megatron.core.models.mimo.model.inputs import (
    ModalityInputs,
    check_count,
    check_encoder_order,
    check_modality_names,
    check_padding_mask,
    is_empty,
    refuse_row_order,
    require_token_id,
)
from megatron.core.models.mimo.model.recomputation import prepare_recomputation
from megatron.core.models.mimo.model.rotary import (
    leave_cutting_to_the_model,
    positions_to_rotate_by,
    refuse_mrope,
)
from megatron.core.models.mimo.model.streams import EmbedsStreams, Rows
from megatron.core.models.mimo.model.wrapped_modules import WrappedModules
from megatron.core.models.mimo.partition.packing import check_one_row, packed_params
from megatron.core.models.mimo.partition.utils import sequence_cut
from megatron.core.models.mimo.submodules.state import Offsets, descended_state, forgive_extra_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model

# What schedules, gradient finalisation and CUDA graph capture look up on the outermost module.
_ASKED_OF_LANGUAGE_MODEL = frozenset(
    {
        "decoder",
        "mtp",
        "position_embedding_type",
        "post_process",
        "pre_process",
        "rotary_pos_emb",
        "share_embeddings_and_output_weights",
        "shared_embedding_or_output_weight",
    }
)


class MimoModel(EmbedsStreams, WrappedModules, MegatronModule):
    """A language model that reads text and the rows of modality encoders.

    Every occurrence of a modality's special token in ``input_ids`` takes one row of that
    modality, batch-major and left to right. Encoders are built where the language model's
    embedding is: on the first pipeline stage.

    Args:
        mimo_config: what to build.
        cp_group, tp_group: process groups that cut the sequence; None for Megatron's global ones.

    Attributes:
        modality_submodules: modality -> ``ModalitySubmodules``, those of this rank.
        language_model: this rank's part of the language model.
        role: which modules this rank runs.
        partition_adapter: cuts sequences; None without context or sequence parallelism.

    Raises:
        ConfigError: (a ``ValueError``) the language model's spec holds no ``config``; encoders
            that cannot be split as asked; sections of multimodal RoPE that do not fit the heads.
        UnsupportedError: (a ``RuntimeError``) module grids; sequence parallelism with an
            embedding that scatters by itself; context parallelism or packing with an attention
            that cannot do it.
    """

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        cp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        refuse_grids(mimo_config)
        refuse_multi_token_prediction(mimo_config)
        refuse_attention(mimo_config)
        refuse_mrope(mimo_config)
        super().__init__(language_config(mimo_config))
        self.mimo_config = mimo_config
        self.special_token_ids = dict(mimo_config.special_token_ids or {})
        self.colocated_comms: dict[tuple[str, str], Any] = {}
        self.input_tensors: Any = None
        params = mimo_config.language_model_spec.params
        self.role = RankRole.uniform(
            mimo_config.modality_submodules_spec,
            pre_process=params.get("pre_process", True),
            post_process=params.get("post_process", True),
        )
        self.partition_adapter = build_partition_adapter(mimo_config, cp_group, tp_group)
        self.modality_submodules = torch.nn.ModuleDict()
        for name in self.role.modality_module_names:
            spec = mimo_config.modality_submodules_spec[name]
            self.modality_submodules[name] = spec.module.from_spec(
                spec, is_first_stage=True, is_last_stage=True
            )
        split_encoders(self.modality_submodules, mimo_config, cp_group, tp_group)
        self.language_model = build_module(mimo_config.language_model_spec)
        self._attention = AttentionSupport.of(self.language_model)
        self._rotates_in_3d = leave_cutting_to_the_model(self.language_model)
        self._takes_loss_mask = accepts(self.language_model.forward, "loss_mask")
        self._refuse_scattering_embedding()
        self.register_load_state_dict_post_hook(forgive_extra_state)  # type: ignore[no-untyped-call]
        prepare_recomputation(self)

    def __getattr__(self, name: str) -> Any:
        """Answer for the language model where Megatron asks the outermost module."""
        if name in _ASKED_OF_LANGUAGE_MODEL:
            return getattr(unwrap_model(super().__getattr__("language_model")), name)
        return super().__getattr__(name)

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

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the previous stage; they are used by the next forward only.

        Args:
            input_tensor: [S_local, B, H], a list of one, or ``{"language": tensor}``.
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
        language_model = unwrap_model(self.language_model)
        if hasattr(language_model, "set_input_tensor"):
            language_model.set_input_tensor(hidden)

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
            packing_kwargs: arguments of ``PackedSeqParams`` for a packed row (B = 1), on every
                pipeline stage. Boundaries given as integers need no wait for the device.
            modality_token_indices: ``{name: flat batch-major positions}`` for "text" and every
                modality, in place of a plan.
            alignment_plan: from ``build_alignment_plan``, made on the host; with it nothing here
                waits for the device. Without either, the plan is derived from ``input_ids``.
            span_ids: integer [B, S], on every pipeline stage: tokens of one span see each other
                in both directions, besides what the causal rule lets them see; 0 is no span.
            padding_mask: bool [B, S], on every pipeline stage: True where experts' auxiliary
                losses do not count a token.
            inference_context: megatron-core's cache of keys and values, in generation; logits are
                then those that the language model gives for it, over the whole vocabulary.

        Returns:
            ``(output, loss_mask)``. On the last stage output is the loss per token [B, S], or
            logits [B, S, V] without labels; on others the hidden states [S_local, B, H].
            ``loss_mask`` is this context-parallel rank's part.

        Raises:
            InputError: (a ``ValueError``) inputs that do not fit the model or each other.
        """
        per_token = (input_ids, position_ids, labels, loss_mask, span_ids, padding_mask)
        checks.check_tensors(*per_token, attention_mask)
        checks.check_mappings(modality_inputs, packing_kwargs, modality_token_indices)
        check_modality_names(modality_inputs, self.mimo_config.modality_submodules_spec)
        if inference_context is None:  # with which positions are those of all keys
            checks.check_shapes(*per_token[:4])
        given = {"span_ids": span_ids, "padding_mask": padding_mask}
        given |= {"inference_context": inference_context}
        spans: dict[str, Any] = {name: ids for name, ids in given.items() if ids is not None}
        no_rows: Rows = {}
        arguments = (
            input_ids, position_ids, attention_mask, loss_mask, labels, no_rows, packing_kwargs
        )  # fmt: skip
        if not self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            return self._forward_language_module(*arguments, **spans)
        plan = self._plan(input_ids, modality_token_indices, alignment_plan)
        check_encoder_order(plan.encoders, self.modality_submodules)
        rows = self._forward_encoders(input_ids, modality_inputs, None)
        for name in {**plan.counts, **rows}:
            check_count(name, plan.counts.get(name, 0), rows[name].size(0) if name in rows else 0)
        if alignment_plan is not None and input_ids is not None:
            checks.refuse_other_ids(alignment_plan, input_ids, self.special_token_ids)
        arguments = (*arguments[:5], rows, packing_kwargs)
        if is_replaced(self, MimoModel, "_forward_language_module"):  # by one that knows no plan
            refuse_row_order(plan, "_forward_language_module")
            return self._forward_language_module(*arguments, **spans)
        return self._forward_language_module(*arguments, **spans, alignment_plan=plan)

    def _plan(
        self,
        input_ids_BS: torch.Tensor | None,
        indices: Mapping[str, torch.Tensor] | None,
        plan: AlignmentPlan | None,
    ) -> AlignmentPlan:
        if input_ids_BS is None:
            raise InputError("input_ids are None; the first pipeline stage reads them as [B, S]")
        check_input_ids(input_ids_BS)
        if plan is None and indices is not None:
            return plan_from_indices(input_ids_BS, indices)
        if plan is None:
            vocab_size = getattr(unwrap_model(self.language_model), "vocab_size", None)
            return build_alignment_plan(input_ids_BS, self.special_token_ids, vocab_size=vocab_size)
        checks.check_plan(plan, input_ids_BS)
        return plan

    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,  # noqa: ARG002 - the signature that scripts override
        modality_inputs: ModalityInputs | None,
        input_tensors: Rows | None,
    ) -> Rows:
        """Rows [N, H] of every modality; [0, H] for one that has no inputs in this micro-batch."""
        rows = {}
        for name, submodule in self.modality_submodules.items():
            keep_reducible_splits(name, submodule, self.mimo_config)
            inputs = (modality_inputs or {}).get(name)
            hidden = (input_tensors or {}).get(name)
            if hidden is None and is_empty(inputs):
                idle = idle_rows(submodule, self.config.hidden_size)
                if idle is not None:
                    rows[name] = idle
                continue
            require_token_id(name, self.special_token_ids)
            encoded = submodule(
                encoder_inputs=inputs if hidden is None else None, hidden_states=hidden
            )
            if encoded is not None:
                rows[name] = encoded
        return rows

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
    ) -> tuple[Any, torch.Tensor | None]:
        """Merge the rows in ``input_tensors`` with text and run the language model."""
        adapter = self.partition_adapter
        if attention_mask is not None and adapter is not None and adapter.cfg.use_cp:
            raise UnsupportedError(
                "context parallelism requires attention_mask=None: a dense mask does not follow "
                "the sequence's cut; use the causal mask type or packing_kwargs"
            )
        if span_ids is not None:
            self._attention.check_span_ids(span_ids, attention_mask)
        packed = self._packed(
            packing_kwargs, input_ids=input_ids, position_ids=position_ids, labels=labels
        )
        embeddings_SBH = None
        if self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            plan = alignment_plan or self._plan(input_ids, None, None)
            embeddings_SBH = self._embed(input_ids, position_ids, input_tensors or {}, plan, packed)
        elif self.input_tensors is None:
            raise InputError(
                "no hidden states have arrived from the previous pipeline stage; call "
                "set_input_tensor before every forward"
            )
        cut = sequence_cut(adapter, packed)
        tokens = (labels, loss_mask, span_ids)
        labels, loss_mask, span_ids = [x if x is None else cut.context_share(x) for x in tokens]
        vocab_size = getattr(unwrap_model(self.language_model), "vocab_size", None)
        labels, loss_mask, no_label = checks.labels_in_vocabulary(labels, loss_mask, vocab_size)
        if self._rotates_in_3d:
            position_ids = positions_to_rotate_by(self.language_model, position_ids, cut)
        extra: dict[str, Any] = {"loss_mask": loss_mask} if self._takes_loss_mask else {}
        if inference_context is not None:
            extra |= {"inference_context": inference_context, "runtime_gather_output": True}
        if padding_mask is not None:
            check_padding_mask(self.language_model, padding_mask)
            extra["padding_mask"] = cut.rank_share(padding_mask)
        output = self.language_model(
            input_ids=None,
            position_ids=position_ids,
            decoder_input=embeddings_SBH,
            labels=labels,
            attention_mask=attention_mask if span_ids is None else span_ids,
            packed_seq_params=packed,
            **extra,
        )
        self._forget_input_tensor()
        return checks.without(output, no_label), loss_mask

    def _packed(
        self, packing_kwargs: Mapping[str, Any] | None, **tokens: torch.Tensor | None
    ) -> PackedSeqParams | None:
        if packing_kwargs is None:
            return None
        self._attention.check_packing()
        # The fused rotation reads boundaries on the device, whatever attention does.
        on_host = self._attention.reads_lengths_on_host and not self.config.apply_rope_fusion
        return packed_params(
            packing_kwargs,
            tokens=check_one_row(**tokens),
            cp_size=self.config.context_parallel_size,
            device=None if on_host else next(self.parameters()).device,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sharded state of the language model and the modalities of this rank."""
        metadata = ensure_metadata_has_dp_cp_group(dict(metadata or {}))
        return descended_state(self, prefix, sharded_offsets, metadata)

    def destroy(self) -> None:
        """Release process groups that this model owns; the uniform layout owns none."""
        self.colocated_comms.clear()

    def _forget_input_tensor(self) -> None:
        if self.input_tensors is None:
            return
        self.input_tensors = None
        unwrap_model(self.language_model).set_input_tensor([None])
