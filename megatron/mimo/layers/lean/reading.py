"""Whether a built layer can be computed from its weights alone, and what it then computes.

Only what is named here counts as known. A module of another class, a hook, an adapter, a setting
that changes what a layer does: each leaves the layer to megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.activations import quick_gelu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.mimo.layers.attention.self_attention import CachingSelfAttention
from megatron.mimo.layers.fused import activate
from megatron.mimo.layers.layer_scale import ScaledAdd
from megatron.mimo.layers.norm import Norm

__all__ = ["Reading", "read_layer"]

Function = Callable[[Tensor], Tensor]

# Classes of Transformer Engine's and megatron-core's layers on it, by name: they may be absent.
_ENGINE_LINEAR = {
    "TELayerNormColumnParallelLinear",
    "TEColumnParallelLinear",
    "TERowParallelLinear",
}
_ENGINE_NORM = {"RMSNorm", "LayerNorm"}
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A layer as its modules and functions.

    Attributes:
        first_norm: before attention, of a module that holds its weight as ``weight``, or of the
            linear layer behind it, as ``layer_norm_weight``.
        second_norm: before the feed-forward.
        act: between the two products of the feed-forward.
        watched: modules that have to stay what they are: name, where it is named, class.
    """

    first_norm: Function
    second_norm: Function
    act: Function
    watched: tuple[tuple[dict[str, Any], str, nn.Module, type], ...]

    def holds(self) -> bool:
        """Whether nothing was put in a module's place or hangs on one since it was read."""
        for siblings, name, module, kind in self.watched:
            if siblings.get(name) is not module or type(module) is not kind:
                return False
            if module._forward_hooks or not all(map(_gathers, module._forward_pre_hooks.values())):
                return False
            if module._backward_hooks or module._backward_pre_hooks:
                return False
        return True

    def await_weights(self) -> None:
        """Wait for the weights that data-parallel ranks gather, as calls of the modules would."""
        for _, _, module, _ in self.watched:
            for hook in module._forward_pre_hooks.values():
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
    norms = (_norm(layer.input_layernorm, linears[0]), _norm(layer.pre_mlp_layernorm, linears[2]))
    heads = (attention.q_layernorm, attention.k_layernorm)
    act = _act(config)
    if None in norms or act is None or not all(one is None or _is_norm(one) for one in heads):
        return None
    first_norm, second_norm = norms
    assert first_norm is not None
    assert second_norm is not None
    return Reading(first_norm=first_norm, second_norm=second_norm, act=act, watched=_watched(layer))


def _is_plain(layer: Any) -> bool:
    """Whether nothing is in the layer besides, and residuals are added in a way that is known."""
    absent = (layer.pre_cross_attn_layernorm, layer.cross_attention)
    adds = (layer.self_attn_bda, layer.mlp_bda)
    return all(isinstance(one, IdentityOp) for one in absent) and all(
        one is get_bias_dropout_add or type(one) is ScaledAdd for one in adds
    )


def _is_linear(linear: Any) -> bool:
    known = type(linear) in (ColumnParallelLinear, RowParallelLinear)
    if not known and type(linear).__name__ not in _ENGINE_LINEAR:
        return False
    return getattr(linear, "gtp_remat_size", 1) == 1 and linear.weight is not None


def _is_norm(norm: Any) -> bool:
    kind = type(norm)
    is_engine = kind.__name__ in _ENGINE_NORM and kind.__module__.startswith("transformer_engine")
    return kind is Norm or is_engine


def _norm(norm: Any, linear: Any) -> Function | None:
    """The norm before a product: a module's, or that of the linear layer that has it in itself."""
    fused = getattr(linear, "layer_norm_weight", None) is not None
    if fused == (not isinstance(norm, IdentityOp)):
        return None
    if fused:
        return partial(_fused_norm, linear)
    return norm if _is_norm(norm) else None


def _fused_norm(linear: Any, hidden: Tensor) -> Tensor:
    weight, eps = linear.layer_norm_weight, linear.eps
    if linear.zero_centered_gamma:
        wide, weight = hidden.float(), weight.float() + 1
        if linear.normalization == "RMSNorm":
            return F.rms_norm(wide, weight.shape, weight, eps).to(hidden.dtype)
        bias = linear.layer_norm_bias.float()
        return F.layer_norm(wide, weight.shape, weight, bias, eps).to(hidden.dtype)
    if linear.normalization == "RMSNorm":
        return F.rms_norm(hidden, weight.shape, weight, eps)
    return F.layer_norm(hidden, weight.shape, weight, linear.layer_norm_bias, eps)


def _act(config: Any) -> Function | None:
    """The activation of a feed-forward; None for one that is not known."""
    function, gated = config.activation_func, config.gated_linear_unit
    if config.activation_func_clamp_value is not None or config.glu_linear_offset:
        return None
    kind = None
    if function is F.silu:
        kind = "silu"
    elif function is quick_gelu and not config.bias_activation_fusion:
        kind = "quick_gelu"
    elif function is F.gelu:  # megatron-core's fused one is the tanh approximation
        kind = "gelu_tanh" if config.bias_activation_fusion else "gelu"
    elif isinstance(function, partial) and function.func is F.gelu and not function.args:
        kind = {"tanh": "gelu_tanh", "none": "gelu"}.get(function.keywords.get("approximate", ""))
    if kind in ("gelu", "gelu_tanh") and not gated:
        return partial(F.gelu, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind is not None:
        return partial(activate, kind=kind, gated=gated)
    return None if gated or config.bias_activation_fusion else function


def _watched(layer: Any) -> tuple[tuple[dict[str, Any], str, nn.Module, type], ...]:
    """The modules below a layer that a lean pass does not call, or reads the weights of."""
    found = []
    for parent in (layer, layer.self_attention, layer.mlp):
        for name, module in parent._modules.items():
            if module is not None and name != "core_attention":
                found.append((parent._modules, name, module, type(module)))
    return tuple(found)
