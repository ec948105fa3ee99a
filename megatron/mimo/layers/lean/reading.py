"""Whether a built layer can be computed from its weights alone, and what it then computes.

Only what is named here counts as known. A module of another class, a hook, an adapter, a setting
that changes what a layer does: each leaves the layer to megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.mimo.layers.attention.core_attention import CoreAttention
from megatron.mimo.layers.attention.engine import EngineAttention, is_engine
from megatron.mimo.layers.attention.self_attention import CachingSelfAttention
from megatron.mimo.layers.fused import activate
from megatron.mimo.layers.layer_scale import ScaledAdd
from megatron.mimo.layers.lean.norms import (
    Addition,
    AddNorm,
    Function,
    addition,
    called,
    is_norm,
    known_norm,
    with_norm,
)

__all__ = ["Reading", "read_layer"]

# Classes of Transformer Engine's and megatron-core's layers on it, by name: they may be absent.
_ENGINE_LINEAR = {
    "TELayerNormColumnParallelLinear",
    "TEColumnParallelLinear",
    "TERowParallelLinear",
}
_OFF = (  # settings of a configuration that change what is computed, or when
    "fp8",
    "fp4",
    "sequence_parallel",
    "gradient_accumulation_fusion",
    "fp32_residual_connection",
    "multi_latent_attention",
    "attention_output_gate",
    "fused_single_qkv_rope",
    "fused_residual_rmsnorm",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "delay_wgrad_compute",
    "defer_embedding_wgrad_compute",
    "tp_comm_overlap",
    "use_te_activation_func",
    "activation_func_fp8_input_store",
    "quant_recipe",
    "symmetric_ar_type",
    "test_mode",
    "no_rope_freq",
    "use_kitchen",
    "inference_fuse_tp_communication",
    "overlap_moe_expert_parallel_comm",
)


@dataclass(frozen=True, slots=True)
class Linear:
    """The parameters of a linear layer: those of its module, where others may take their place."""

    parameters: dict[str, Any]
    has_bias: bool

    @property
    def weight(self) -> Tensor:
        """[F, E]."""
        weight: Tensor = self.parameters["weight"]
        return weight

    def __call__(self, hidden_TE: Tensor) -> Tensor:
        """The product, [T, F]."""
        parameters = self.parameters
        bias = parameters["bias"] if self.has_bias else None
        return F.linear(hidden_TE, parameters["weight"], bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A layer as its modules and functions.

    Attributes:
        first_norm: before attention: of the residual and nothing to add, both as vectors.
        attention: the module.
        attend: its ``core_attention``, or what that computes, without calling it.
        sizes: key heads, and the size of a head.
        head_norms: of queries and of keys, or none.
        qkv, proj: the linear layers of attention.
        second_norm: adds to the residual the output of attention, and the norm of that.
        mlp: the linear layers of the feed-forward.
        act: between them.
        add: adds to the residual the output of the feed-forward.
        places: where modules are named, and those that have to stay there.
        modules: all of them.
        kinds: their classes, which have to stay the same.
        hooks: those of the modules, which have to stay empty.
        waits: those before the modules are called, which may wait for weights.
    """

    first_norm: AddNorm
    attention: Any
    attend: Callable[..., Tensor]
    sizes: tuple[int, int]
    head_norms: tuple[Function, ...]
    qkv: Linear
    proj: Linear
    second_norm: AddNorm
    mlp: tuple[Linear, Linear]
    act: Function
    add: Addition
    places: tuple[tuple[dict[str, Any], list[nn.Module | None]], ...]
    modules: tuple[nn.Module, ...]
    kinds: list[type]
    hooks: tuple[dict[int, Any], ...]
    waits: tuple[dict[int, Any], ...]

    def holds(self) -> bool:
        """Whether nothing was put in a module's place or hangs on one since it was read."""
        for named, modules in self.places:
            if [*named.values()] != modules:
                return False
        if [*map(type, self.modules)] != self.kinds or any(self.hooks):
            return False
        return not any(self.waits) or all(
            _gathers(hook) for hooks in self.waits for hook in hooks.values()
        )

    def await_weights(self) -> None:
        """Wait for the weights that data-parallel ranks gather, as calls of the modules would."""
        if any(self.waits):
            for module, hooks in zip(self.modules, self.waits, strict=True):
                for hook in hooks.values():
                    hook(module, ())


def _gathers(hook: Any) -> bool:
    """Whether a hook waits for gathered weights (``--overlap-param-gather``)."""
    return getattr(hook, "__module__", "") == DistributedDataParallel.__module__


def read_layer(layer: Any) -> Reading | None:
    """How to compute a ``TransformerLayer``; None where megatron-core has to."""
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    if any(getattr(config, name, None) for name in _OFF):
        return None
    if config.tensor_model_parallel_size > 1 or config.cuda_graph_impl != "none":
        return None
    if type(attention) not in (SelfAttention, CachingSelfAttention) or type(mlp) is not MLP:
        return None
    recomputes = (
        *("recompute_input_layernorm", "recompute_pre_mlp_layernorm", "recompute_mlp"),
        *("offload_attn_norm", "offload_mlp_norm"),
    )
    if any(getattr(layer, name, False) for name in recomputes):
        return None
    if attention.checkpoint_core_attention or not _is_plain(layer):
        return None
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    if not all(_is_linear(linear) for linear in linears):
        return None
    first_norm = known_norm(layer.input_layernorm, linears[0])
    second_norm = known_norm(layer.pre_mlp_layernorm, linears[2])
    heads = (attention.q_layernorm, attention.k_layernorm)
    act = _act(config)
    has_norms = any(one is not None for one in heads)
    if first_norm is None or second_norm is None or act is None:
        return None
    if has_norms and not all(map(is_norm, heads)):
        return None
    adds = addition(layer.self_attn_bda), addition(layer.mlp_bda)
    qkv, proj, first, second = map(_linear, linears)
    parents = (layer, layer.self_attention, layer.mlp)
    places = tuple((one._modules, [*one._modules.values()]) for one in parents)
    modules = tuple(one for _, named in places for one in named if one is not None)
    return Reading(
        first_norm=with_norm(adds[0], first_norm),
        attention=attention,
        attend=_attend(attention.core_attention),
        sizes=(
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
        ),
        head_norms=tuple(map(called, heads)) if has_norms else (),
        qkv=qkv,
        proj=proj,
        second_norm=with_norm(adds[0], second_norm),
        mlp=(first, second),
        act=act,
        add=adds[1],
        places=places,
        modules=modules,
        kinds=[*map(type, modules)],
        hooks=tuple(hooks for module in modules for hooks in _hooks(module)),
        waits=tuple(module._forward_pre_hooks for module in modules),
    )


def _is_plain(layer: Any) -> bool:
    """Whether nothing is in the layer besides, and residuals are added in a way that is known."""
    absent = (layer.pre_cross_attn_layernorm, layer.cross_attention)
    adds = (layer.self_attn_bda, layer.mlp_bda)
    return all(isinstance(one, IdentityOp) for one in absent) and all(
        one is get_bias_dropout_add or type(one) is ScaledAdd for one in adds
    )


def _attend(core: Any) -> Callable[..., Tensor]:
    if is_engine(core):
        return EngineAttention(core)
    return core.attend if type(core) is CoreAttention else cast(Callable[..., Tensor], core)


def _is_linear(linear: Any) -> bool:
    known = type(linear) in (ColumnParallelLinear, RowParallelLinear)
    if not known and type(linear).__name__ not in _ENGINE_LINEAR:
        return False
    return (
        getattr(linear, "gtp_remat_size", 1) == 1 and linear._parameters.get("weight") is not None
    )


def _linear(linear: Any) -> Linear:
    parameters = linear._parameters
    bias = parameters.get("bias")
    # Transformer Engine may have an empty tensor where there is no bias.
    return Linear(parameters, bias is not None and bias.numel() > 0)


def _act(config: Any) -> Function | None:
    """The activation of a feed-forward; None for one that is not known."""
    function, gated = config.activation_func, config.gated_linear_unit
    if config.activation_func_clamp_value is not None or config.glu_linear_offset:
        return None
    kind = None
    if function is F.silu:
        kind = "silu"
    elif _is_quick_gelu(function) and not config.bias_activation_fusion:
        kind = "quick_gelu"
    elif function is F.gelu:  # megatron-core's fused one is the tanh approximation
        kind = "gelu_tanh" if config.bias_activation_fusion else "gelu"
    elif isinstance(function, partial) and function.func is F.gelu and not function.args:
        kind = {"tanh": "gelu_tanh", "none": "gelu"}.get(function.keywords.get("approximate", ""))
    if kind in ("gelu", "gelu_tanh") and not gated:
        return partial(F.gelu, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind is not None:
        return partial(activate, kind=kind, gated=gated)
    return None if gated or config.bias_activation_fusion else cast(Function, function)


def _is_quick_gelu(function: Any) -> bool:
    """By its name: it is another object before and after megatron-core's jit is taken off."""
    names = (getattr(function, "__module__", ""), getattr(function, "__name__", ""))
    return names == ("megatron.core.activations", "quick_gelu")


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._backward_hooks, module._backward_pre_hooks
