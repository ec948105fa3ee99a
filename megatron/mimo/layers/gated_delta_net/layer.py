"""The gated delta net, in the place of a layer's self-attention.

Legend: S tokens (``S_local`` of a rank under context parallelism), B rows, H hidden, G key heads of
this rank, R value heads of each, F channels of a key head's group, J taps of the convolution, K and
V sizes of a key and a value. Between the projections rows come first: T tokens of B rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.mimo.layers.attention.context_group import context_group
from megatron.mimo.layers.gated_delta_net.decoding import last_inputs
from megatron.mimo.layers.gated_delta_net.documents import Documents, documents_of
from megatron.mimo.layers.gated_delta_net.heads_over_ranks import (
    Dealt,
    deal_evenly,
    to_heads,
    to_tokens,
)
from megatron.mimo.layers.gated_delta_net.kernels import (
    DeltaRule,
    Kernels,
    PyTorchKernels,
    fast_kernels,
)
from megatron.mimo.layers.gated_delta_net.parameters import (
    ConvolutionWeight,
    HeadNormWeight,
    cut_by_heads,
    first_A_log,
)
from megatron.mimo.layers.gated_delta_net.sizes import Sizes, Streams
from megatron.mimo.layers.gated_delta_net.states_over_ranks import (
    Pieces,
    convolve_pieces,
    pass_states,
    pieces_of,
)
from megatron.mimo.layers.gated_delta_net.token_functions import decay_of_gate

__all__ = ["GatedDeltaNet", "GatedDeltaNetSubmodules"]


@dataclass
class GatedDeltaNetSubmodules:
    """The linear layers: ``in_proj`` column-parallel, ``out_proj`` row-parallel."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class GatedDeltaNet(MegatronModule):
    """Linear attention by the gated delta rule (Qwen3-Next's and Qwen3.5's linear layers).

    The hidden states are projected to queries, keys, values and gates; queries, keys and values
    pass a short causal convolution; ``gated_delta_rule`` mixes tokens; its outputs are normalised
    head by head, gated and projected back. There are no positions: rotary arguments change nothing.

    Weights are ordered by key heads (``weight_order``): each parameter but the norm's is cut over
    tensor-parallel ranks in plain runs of heads. Under context parallelism the ranks exchange
    tokens for heads (``heads_over_ranks``) or pass on states (``states_over_ranks``), whichever
    moves less; ``linear_num_key_heads`` has to be a multiple of tp * cp.

    Generation keeps the convolution's last inputs [J - 1, B, G, F] and the state [G, B, R, K, V] in
    ``inference_context.key_value_memory_dict[layer_number]``.

    Args:
        config: with ``linear_num_key_heads``, ``linear_num_value_heads``, ``linear_key_head_dim``,
            ``linear_value_head_dim`` and ``linear_conv_kernel_dim``. ``deterministic_mode`` keeps
            to PyTorch's kernels.
        submodules: the linear layers.
        layer_number: from 1, over the whole model.
        pg_collection: with ``tp``, and ``cp`` where it is in use; ``parallel_state``'s by default.
        cp_comm_type: of the attention layers; it changes nothing here.
        pp_layer_offset: of the pipeline stage; not needed.
        name: of the module; passed on to the linear layers.

    Attributes:
        rule: mixes the tokens; without parameters.
        in_proj, conv1d, norm, out_proj: see ``weight_order`` for the order of their weights.
        A_log, dt_bias: of the decay, one number for each value head.

    Raises:
        ConfigError: sizes that are missing or do not fit each other or the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,  # noqa: ARG002 (TransformerLayer passes it)
        pp_layer_offset: int | None = None,  # noqa: ARG002 (likewise)
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.sizes = sizes = Sizes.of(config)
        names = ["tp", "cp"] if config.context_parallel_size > 1 else ["tp"]
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(names)
        self.pg_collection = groups
        self.tp_group: dist.ProcessGroup = groups.tp
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None

        def linear(spec: Any, part: str, *widths: int, **named: Any) -> Any:
            if name is not None:
                named["name"] = f"{name}.{part}"
            shared = {"config": config, "bias": False, "is_expert": False, "tp_group": groups.tp}
            return build_module(spec, *widths, **shared, **named)

        self.in_proj = linear(
            submodules.in_proj,
            "in_proj",
            config.hidden_size,
            sizes.key_heads * sizes.projected,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
        )
        self.conv1d = ConvolutionWeight(config, sizes, groups.tp)
        self.A_log = cut_by_heads(first_A_log(sizes.value_heads), config, groups.tp)
        self.dt_bias = cut_by_heads(torch.ones(sizes.value_heads), config, groups.tp)
        self.rule = DeltaRule(sizes.operations_per_token)
        self.norm = HeadNormWeight(config, sizes.value)
        self.out_proj = linear(
            submodules.out_proj,
            "out_proj",
            sizes.value_heads * sizes.value,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        attention_bias: Tensor | None = None,
        **positions: Any,  # noqa: ARG002 (rotary tables and offsets; there are no positions here)
    ) -> tuple[Tensor, None]:
        """Mixes the tokens of each row, or of each document of a packed row.

        Args:
            hidden_states: [S_local, B, H]; a tensor-parallel share of the tokens under sequence
                parallelism.
            attention_mask: None, or bool [B, 1, 1, L], True where a token is padding, before or
                behind the row's own; the last S of L are this step's. Padding changes neither
                convolution nor state, and its own output means nothing.
            inference_context: the static context of generation.
            packed_seq_params: with ``qkv_format="thd"``, where documents begin, of the whole row.
            attention_bias: None.
            positions: what TransformerLayer passes to attention besides.

        Returns:
            [S_local, B, H] as the input is cut, and None for a bias.

        Raises:
            InputError: boundaries that do not fit the row.
            UnsupportedError: a mask between tokens, a bias, spans, or a cache with packed rows or
                of dynamic batching.
        """
        if attention_bias is not None:
            raise UnsupportedError("attention_bias in a gated delta net; expected None")
        projected_SBD, _ = self.in_proj(hidden_states)
        streams = self.sizes.split(projected_SBD)
        padding_SB = _padding(attention_mask, projected_SBD.size(0))
        if padding_SB is not None:
            streams = _without_padding(streams, padding_SB)
        if inference_context is None:
            group = context_group(self.cp_group, packed_seq_params)
            if group is not None and padding_SB is not None:
                raise UnsupportedError(
                    "context parallelism requires attention_mask=None; padding behind the tokens "
                    "needs no mask"
                )
            mixed_SBGRV = self._mix(streams, packed_seq_params, group)
        elif packed_seq_params is None:
            mixed_SBGRV = self._continue(streams, padding_SB, inference_context)
        else:
            raise UnsupportedError("packed rows with a cache; generate from rows of prompts")
        normed_SBGRV = self._fast_kernels(projected_SBD).norm(
            mixed_SBGRV, streams.gate, self._norm_weight(), self.config.layernorm_epsilon
        )
        out_SBH, _ = self.out_proj(normed_SBGRV.flatten(2))
        return out_SBH, None

    def _mix(
        self, streams: Streams, packed: PackedSeqParams | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        """The rule over whole rows: [S_local, B, G, R, V]."""
        size = 1 if group is None else group.size()
        tokens, device = streams.convolved.size(0) * size, streams.convolved.device
        documents = documents_of(packed, tokens=tokens, device=device)
        if documents is not None and streams.convolved.size(1) != 1:
            raise InputError(
                f"a packed micro-batch has {streams.convolved.size(1)} rows; expected one"
            )
        rank, order = 0, None
        if group is not None:
            pieces = pieces_of(
                tokens=tokens,
                documents=documents,
                sizes=self.sizes,
                dtype=streams.convolved.dtype,
                group=group,
            )
            if pieces is not None:
                return self._rule(streams, pieces)[0].transpose(0, 1)
            rank = group.rank()
            order = (
                deal_evenly(tokens, size, device) if documents is None else documents.dealt(size)
            )
            streams = _exchanged(streams, order, group)
        mixed_BTGRV, _ = self._rule(streams, documents, share=(rank, size))
        mixed_SBGRV = mixed_BTGRV.transpose(0, 1)
        if group is None or order is None:
            return mixed_SBGRV
        R = self.sizes.values_per_key
        return to_tokens(mixed_SBGRV.flatten(3), order, group).unflatten(3, (R, -1))

    def _rule(
        self,
        streams: Streams,
        where: Documents | Pieces | None = None,
        *,
        share: tuple[int, int] = (0, 1),
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolution and rule: [B, T, G, R, V] and the state.

        Args:
            streams: of all tokens of this rank's heads, or of its pieces.
            where: the documents of a packed row, or the pieces whose states are passed on.
            share: this rank among those that share the layer's heads by context parallelism.
            past: the convolution's last inputs and the state before the tokens.
        """
        rank, size = share
        kernels = PyTorchKernels(*past) if past else self._fast_kernels(streams.convolved)
        x_BTGF, a, b = (
            x.transpose(0, 1) for x in (streams.convolved, streams.decay, streams.strength)
        )
        weight_GFJ, A_log_GR, dt_bias_GR = (
            parameter.unflatten(0, (size, -1, width))[rank]
            for parameter, width in (
                (self.conv1d.weight.squeeze(1), self.sizes.convolved),
                (self.A_log, self.sizes.values_per_key),
                (self.dt_bias, self.sizes.values_per_key),
            )
        )
        decay = decay_of_gate(a, A_log_GR, dt_bias_GR)
        gates = decay, b.to(decay.dtype).sigmoid()
        if isinstance(where, Pieces):
            convolved_BTGF = convolve_pieces(
                partial(kernels.convolve, weight_GFJ=weight_GFJ, documents=None),
                x_BTGF,
                self.sizes.taps,
                where,
            )
            rule = partial(self.rule, kernels.delta_rule_of_pieces)
            return pass_states(rule, *self.sizes.heads(convolved_BTGF), *gates, where), None
        convolved_BTGF = kernels.convolve(x_BTGF, weight_GFJ, where)
        mixed: tuple[Tensor, Tensor | None] = self.rule(
            kernels.delta_rule, *self.sizes.heads(convolved_BTGF), *gates, where
        )
        return mixed

    def _continue(self, streams: Streams, padding_SB: Tensor | None, context: Any) -> Tensor:
        """The rule over the next tokens of each sequence: [S, B, G, R, V]; the cache moves on."""
        if not context.is_static_batching():
            raise UnsupportedError(
                "a gated delta net in dynamic batching; use a static inference context"
            )
        caches, x_SBGF = context.key_value_memory_dict, streams.convolved
        past = None
        history_JBGF = x_SBGF.new_zeros(self.sizes.taps - 1, *x_SBGF.shape[1:])
        if context.sequence_len_offset > 0:
            history_JBGF, state_GBRKV = caches[self.layer_number]
            past = history_JBGF.transpose(0, 1), state_GBRKV.transpose(0, 1)
        mixed_BTGRV, state_BGRKV = self._rule(streams, past=past)
        assert state_BGRKV is not None, "rows that are not packed have a last state"
        history_JBGF = last_inputs(x_SBGF, history_JBGF, padding_SB)
        caches[self.layer_number] = history_JBGF, state_BGRKV.transpose(0, 1)
        return mixed_BTGRV.transpose(0, 1)

    def _fast_kernels(self, projected: Tensor) -> Kernels:
        return fast_kernels(
            projected.dtype,
            projected.device,
            sizes=self.sizes,
            deterministic=self.config.deterministic_mode,
        )

    def _norm_weight(self) -> Tensor:
        """The norm's weight, whose gradient is summed over the heads of all tensor-parallel ranks.

        Under sequence parallelism ``finalize_model_grads`` sums it, with the layers' norms.
        """
        if self.config.sequence_parallel or self.tp_group.size() == 1:
            return self.norm.weight
        weight: Tensor = copy_to_tensor_model_parallel_region(self.norm.weight, group=self.tp_group)
        return weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints: every parameter but the norm's is cut by heads."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tp_group = tp_group or self.tp_group
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"A_log": 0, "dt_bias": 0},
            sharded_offsets,
            tp_group=tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group
            )
        return sharded


def _exchanged(streams: Streams, order: Dealt, group: dist.ProcessGroup) -> Streams:
    """All tokens of this rank's heads; the output's gate stays with the tokens."""
    widths = [x.size(-1) for x in (streams.convolved, streams.strength, streams.decay)]
    joined = torch.cat([streams.convolved, streams.strength, streams.decay], dim=-1)
    convolved, strength, decay = to_heads(joined, order, group).split(widths, dim=-1)
    return dataclasses.replace(streams, convolved=convolved, strength=strength, decay=decay)


def _without_padding(streams: Streams, padding_SB: Tensor) -> Streams:
    """Nothing to convolve, no decay (softplus of -inf) and no correction where padding is."""
    padding_SB11 = padding_SB[:, :, None, None]
    return dataclasses.replace(
        streams,
        convolved=streams.convolved.masked_fill(padding_SB11, 0),
        strength=streams.strength.masked_fill(padding_SB11, -torch.inf),
        decay=streams.decay.masked_fill(padding_SB11, -torch.inf),
    )


def _padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which tokens are padding: bool [S, B], True where one is."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise UnsupportedError(
            f"attention_mask is {mask.dtype} of shape {list(mask.shape)}; a gated delta net is "
            "causal and takes padded tokens only, bool [B, 1, 1, tokens]: leave the mask out, pack "
            "documents by packing_kwargs"
        )
    return mask[:, 0, 0, mask.size(-1) - tokens :].t()
